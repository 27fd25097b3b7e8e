"""A real HTTP receiver and a real SMTP server on this machine, for alerts to be delivered to."""

import json
import smtplib
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HttpReceiver:
    """What was posted, and the status that the next posts are answered with."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.posted: list[dict[str, Any]] = []
        self.tries = 0
        self.status = 200

    @property
    def url(self) -> str:
        """Its address, as Apprise writes it."""
        return f"json://127.0.0.1:{self.port}/alerts"


@contextmanager
def http_receiver() -> Iterator[HttpReceiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.tries += 1
            if receiver.status == 200:
                receiver.posted.append(json.loads(body))
            self.send_response(receiver.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = HttpReceiver(server.server_address[1])
    with _serving(server):
        yield receiver


class SmtpReceiver:
    """The mails that were taken."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.mails: list[EmailMessage] = []

    @property
    def url(self) -> str:
        """Its address, as Apprise writes it."""
        return f"mailto://127.0.0.1:{self.port}?mode=insecure&from=platform@example.org&to=on-call@example.org"


@contextmanager
def smtp_receiver() -> Iterator[SmtpReceiver]:
    class Handler(socketserver.StreamRequestHandler):
        """As much of RFC 5321 as a client needs to hand over a mail."""

        def handle(self) -> None:
            self._say("220 receiver")
            while line := self.rfile.readline():
                verb = line.split(b" ")[0].strip().upper()
                if verb in (b"EHLO", b"HELO"):
                    self._say("250 receiver")
                elif verb == b"DATA":
                    self._say("354 go on")
                    receiver.mails.append(self._mail())
                    self._say("250 taken")
                elif verb == b"QUIT":
                    self._say("221 bye")
                    return
                else:
                    self._say("250 ok")

        def _mail(self) -> EmailMessage:
            lines = []
            while (line := self.rfile.readline()) not in (b".\r\n", b""):
                lines.append(line[1:] if line.startswith(b".") else line)
            mail = message_from_bytes(b"".join(lines), policy=policy.default)
            assert isinstance(mail, EmailMessage)
            return mail

        def _say(self, text: str) -> None:
            self.wfile.write(text.encode() + smtplib.CRLF.encode())

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    receiver = SmtpReceiver(server.server_address[1])
    with _serving(server):
        yield receiver


@contextmanager
def _serving(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
