"""A stand-in for the HTTP interfaces of Docker, Kubernetes and Ray: it keeps what it is asked and answers as told."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Asked(NamedTuple):
    """One request."""

    method: str
    path: str
    query: str
    body: Any


class FakeApi:
    """The requests, and the answers by method and pattern of the path; an unknown one is answered with 404."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.asked: list[Asked] = []
        self.answers: list[tuple[str, str, int, Callable[[Asked], Any]]] = []

    def answer(self, method: str, pattern: str, body: Any, status: int = 200) -> None:
        """Sets an answer; a later one goes before an earlier one. ``body`` may be made from the request."""
        made = body if callable(body) else lambda _asked: body
        self.answers.insert(0, (method, pattern, status, made))

    def find(self, method: str, pattern: str) -> list[Asked]:
        """Returns the requests that match."""
        return [asked for asked in self.asked if asked.method == method and re.fullmatch(pattern, asked.path)]


@contextmanager
def fake_api() -> Iterator[FakeApi]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            data = self.rfile.read(length)
            parts = urlsplit(self.path)
            asked = Asked(self.command, parts.path, parts.query, json.loads(data) if data else None)
            api.asked.append(asked)
            status, body = 404, {"message": f"nothing is known of {self.path}"}
            for method, pattern, code, make in api.answers:
                if method == self.command and re.fullmatch(pattern, parts.path):
                    status, body = code, make(asked)
                    break
            content = b"" if body is None else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = _answer  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    api = FakeApi(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
