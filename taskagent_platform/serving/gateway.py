"""The gateway: the endpoint's stable address, in front of whichever model server is deployed.

    python -m taskagent_platform.serving.gateway --active FILE --host 127.0.0.1 --port 8210

It forwards ``/v1/…`` (streams too) to the active deployment of the domain whose model is asked for, and follows
``active.json``: a promotion or a rollback takes effect with the next request, and requests on their way finish where
they are. ``/health`` says whether the deployed servers answer, ``/deployment`` what is deployed and why it was allowed.

Message bodies and keys are never logged; the log has method, path, status, milliseconds and client.
"""

import argparse
import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import sys
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from filelock import FileLock
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from taskagent_platform.errors import PlatformError
from taskagent_platform.serving.active import DIGEST_HEADER, ActiveDeployments, Deployment, read_active

MAX_BODY_BYTES = 4 << 20
_LOG_BYTES = 10 << 20
_WINDOW_S = 60.0
_MAX_CLIENTS = 10_000
_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 600.0
_HEALTH_TIMEOUT_S = 5.0
# RFC 9110, section 7.6.1: they concern one connection, not the message; length and host are set anew.
_HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade", "host", "content-length",
}  # fmt: skip
# Credentials are for the gateway alone; the model server is asked for plain bodies, which pass through as they are.
_NOT_FORWARDED = _HOP_BY_HOP | {"authorization", "cookie", "accept-encoding", "expect"}
_log = logging.getLogger("taskagent.gateway")


class ActiveFile:
    """``active.json``, read again whenever it was replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._active = ActiveDeployments()

    def read(self) -> ActiveDeployments:
        """Returns what is deployed now. Raises PlatformError where the file is damaged."""
        try:
            stat = self._path.stat()
            stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        except FileNotFoundError:
            stamp = None
        if stamp != self._seen or stamp is None:
            self._active = read_active(self._path)
            self._seen = stamp
        return self._active


class RateLimit:
    """Allows each client a number of requests in any minute.

    Args:
        per_minute: the number.
        clock: seconds that only grow.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def wait_s(self, client: str) -> float:
        """Counts a request and returns 0, or returns the seconds until the next one is allowed."""
        now = self._clock()
        times = self._times.setdefault(client, deque())
        self._times.move_to_end(client)
        while len(self._times) > _MAX_CLIENTS:
            self._times.popitem(last=False)
        while times and times[0] <= now - _WINDOW_S:
            times.popleft()
        if len(times) >= self._per_minute:
            return times[0] + _WINDOW_S - now
        times.append(now)
        return 0.0


def api_keys_file(active_path: Path) -> Path:
    """Returns where the keys of the gateway that serves ``active.json`` are kept."""
    return active_path.with_name("api_keys.json")


class ApiKeys:
    """The keys that clients must show, as sha256 in a JSON file ``{"name": "sha256"}``; none if there is no file.

    The keys are random, 256 bits long, so that a plain hash cannot be searched.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def required(self) -> bool:
        """Whether clients have to show a key."""
        return self._path.exists()

    def owner(self, key: str) -> str | None:
        """Returns the name that a key was made for, or None for a key that is not known."""
        shown = _key_hash(key)
        found = None
        for name, stored in self._read().items():
            # As bytes: of texts it takes ASCII only, and the file may hold anything.
            if hmac.compare_digest(stored.encode("utf-8", "surrogatepass"), shown.encode()):
                found = name
        return found

    def names(self) -> list[str]:
        """Returns whom keys were made for. Raises PlatformError for a damaged file."""
        return sorted(self._read()) if self.required() else []

    def add(self, name: str) -> str:
        """Makes a key and returns it; it cannot be read again. From the first key on, every client needs one.

        Raises:
            PlatformError: there is a key of that name.
        """
        key = "tk-" + secrets.token_urlsafe(32)
        with self._lock():
            stored = self._read() if self.required() else {}
            if name in stored:
                raise PlatformError(f"There is a key for {name!r} already; remove it first, or choose another name.")
            self._write({**stored, name: _key_hash(key)})
        return key

    def remove(self, name: str) -> int:
        """Takes a key back and returns how many are left; clients need one even where none is left.

        Raises:
            PlatformError: there is no key of that name.
        """
        with self._lock():
            stored = self._read() if self.required() else {}
            if name not in stored:
                raise PlatformError(f"There is no key for {name!r}; there are: {', '.join(sorted(stored)) or 'none'}.")
            del stored[name]
            self._write(stored)
        return len(stored)

    def _lock(self) -> FileLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self._path.with_name(f".{self._path.name}.lock"))

    def _write(self, stored: dict[str, str]) -> None:
        scratch = self._path.with_name(self._path.name + ".partial")
        scratch.touch(mode=0o600)
        scratch.write_text(json.dumps(stored, indent=1))
        scratch.replace(self._path)

    def _read(self) -> dict[str, str]:
        try:
            stored = json.loads(self._path.read_text())
            if not isinstance(stored, dict) or not all(isinstance(value, str) for value in stored.values()):
                raise ValueError("not an object of texts")
        except ValueError as error:
            raise PlatformError(f"{self._path} is damaged ({error}); no key is accepted until it is mended.") from error
        return stored


def create_app(active_path: Path, *, requests_per_minute: int, clock: Callable[[], float] = time.monotonic) -> ASGIApp:
    """Builds the gateway.

    Args:
        active_path: ``active.json``; ``api_keys.json`` beside it switches API keys on.
        requests_per_minute: the limit of each client: a key where keys are on, an address elsewhere.
        clock: seconds that only grow, for the limit.
    """
    gateway = _Gateway(ActiveFile(active_path), ApiKeys(api_keys_file(active_path)),
                       RateLimit(requests_per_minute, clock))  # fmt: skip

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        timeout = httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        # The servers are on this machine; a proxy of the environment is not asked for them.
        async with httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as client:
            gateway.client = client
            yield

    app = Starlette(
        routes=[
            Route("/health", gateway.health),
            Route("/deployment", gateway.deployment),
            Route("/v1/models", gateway.models),
            Route("/v1/{path:path}", gateway.forward, methods=["GET", "POST"]),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error, PlatformError: _platform_error, Exception: _fault},
    )
    return _AccessLog(app)


class _Gateway:
    def __init__(self, active: ActiveFile, keys: ApiKeys, limit: RateLimit) -> None:
        self.client: httpx.AsyncClient
        self._active = active
        self._keys = keys
        self._limit = limit

    async def health(self, request: Request) -> Response:
        deployed = _champions(self._active.read())
        answers = await asyncio.gather(*(self._answers(deployment) for deployment in deployed))
        states = {
            deployment.domain: {"model_digest": deployment.model_digest, "healthy": healthy}
            for deployment, healthy in zip(deployed, answers, strict=True)
        }
        healthy = bool(states) and all(answers)
        body = {"status": "ok" if healthy else "unavailable", "deployments": states}
        return JSONResponse(body, status_code=200 if healthy else 503)

    async def deployment(self, request: Request) -> Response:
        self._admit(request)
        return JSONResponse(self._active.read().model_dump(mode="json")["domains"])

    async def models(self, request: Request) -> Response:
        self._admit(request)
        deployed = _champions(self._active.read())
        if not deployed:
            raise _nothing_deployed()
        answers = await asyncio.gather(*(self._models_of(deployment) for deployment in deployed))
        # One domain's server that is down hides no other domain's models.
        listed = [
            (deployment.model_digest, models)
            for deployment, models in zip(deployed, answers, strict=True)
            if models is not None
        ]
        if not listed:
            raise _unavailable(deployed[0])
        data = [model for _, models in listed for model in models]
        headers = {DIGEST_HEADER: ", ".join(digest for digest, _ in listed)}
        return JSONResponse({"object": "list", "data": data}, headers=headers)

    async def forward(self, request: Request) -> Response:
        self._admit(request)
        path = request.path_params["path"]
        # A deployment was judged as it stands: nothing that changes what is served passes, nor a path that the
        # server could read differently.
        if "lora_adapter" in path or any(part in (".", "..", "") for part in path.split("/")):
            raise HTTPException(404, f"There is no /v1/{path} here.")
        body = await _read_body(request)
        deployment = self._choose(body)
        try:
            answer = await self._send(deployment, request, body)
        except httpx.ConnectError as error:
            # It may have been replaced and stopped since the file was read.
            replacement = self._choose(body)
            if replacement == deployment:
                raise _unavailable(deployment) from error
            deployment = replacement
            try:
                answer = await self._send(deployment, request, body)
            except httpx.HTTPError as again:
                raise _unavailable(deployment) from again
        except httpx.HTTPError as error:
            raise _unavailable(deployment) from error
        relayed = StreamingResponse(_relay(answer), answer.status_code, {DIGEST_HEADER: deployment.model_digest})
        relayed.raw_headers += _passing(answer.headers.raw, _HOP_BY_HOP | {DIGEST_HEADER})
        return relayed

    async def _send(self, deployment: Deployment, request: Request, body: bytes) -> httpx.Response:
        query = request.scope["query_string"]
        raw_path = request.scope["raw_path"] + (b"?" + query if query else b"")
        outgoing = self.client.build_request(
            request.method,
            # As the client wrote it: both addresses have their API under /v1.
            httpx.URL(deployment.base_url).copy_with(raw_path=raw_path),
            headers=[*_passing(request.headers.raw, _NOT_FORWARDED), (b"accept-encoding", b"identity")],
            content=body or None,
        )
        sending = asyncio.ensure_future(self.client.send(outgoing, stream=True))
        leaving = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                # Nobody waits for this answer any more; closing the connection makes the server stop computing it.
                raise ClientDisconnect
            return sending.result()
        finally:
            leaving.cancel()
            if not sending.done():
                sending.cancel()

    def _admit(self, request: Request) -> None:
        client = request.client.host if request.client else "unknown"
        if self._keys.required():
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            owner = self._keys.owner(key.strip()) if scheme.lower() == "bearer" else None
            if owner is None:
                raise HTTPException(
                    401, "This endpoint needs an API key: Authorization: Bearer …", {"www-authenticate": "Bearer"}
                )
            client = f"key {owner}"
        request.scope["taskagent.client"] = client
        wait = self._limit.wait_s(client)
        if wait > 0:
            seconds = str(int(wait) + 1)
            raise HTTPException(429, f"Too many requests; try again in {seconds} s.", {"retry-after": seconds})

    def _choose(self, body: bytes) -> Deployment:
        """Returns the deployment whose model a body asks for; with a single one, its server judges the name."""
        deployed = _champions(self._active.read())
        if not deployed:
            raise _nothing_deployed()
        if len(deployed) == 1:
            return deployed[0]
        try:
            parsed = json.loads(body) if body else {}
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"The body is not JSON: {error}") from error
        wanted = parsed.get("model") if isinstance(parsed, dict) else None
        for deployment in deployed:
            if deployment.model_name == wanted:
                return deployment
        names = ", ".join(deployment.model_name for deployment in deployed)
        raise HTTPException(404, f"There is no model {wanted!r} here; there are {names}.")

    async def _models_of(self, deployment: Deployment) -> list[Any] | None:
        """Returns what a deployment's server lists; None for one that does not answer."""
        try:
            answer = await self.client.get(f"{deployment.base_url}/models", timeout=_HEALTH_TIMEOUT_S)
            answer.raise_for_status()
            return list(answer.json()["data"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None

    async def _answers(self, deployment: Deployment) -> bool:
        url = deployment.base_url.removesuffix("/v1") + "/health"
        try:
            return (await self.client.get(url, timeout=_HEALTH_TIMEOUT_S)).status_code == 200
        except httpx.HTTPError:
            return False


class _AccessLog:
    """Logs each request in one line, without what it carries."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            status = 499
        finally:
            client = scope.get("taskagent.client") or (scope["client"] or ("unknown",))[0]
            milliseconds = (time.monotonic() - started) * 1000
            _log.info("%s %s %d %.0f ms %s", scope["method"], ascii(scope["path"]), status, milliseconds, ascii(client))


def _champions(active: ActiveDeployments) -> list[Deployment]:
    return [deployments.active for deployments in active.domains.values()]


def _passing(headers: Iterable[tuple[bytes, bytes]], held_back: Collection[str]) -> list[tuple[bytes, bytes]]:
    """Returns the headers that pass, in lower case and otherwise as they came: a value may hold any bytes."""
    return [(name.lower(), value) for name, value in headers if name.decode("latin-1").lower() not in held_back]


async def _read_body(request: Request) -> bytes:
    too_large = HTTPException(413, f"The body is larger than {MAX_BODY_BYTES} bytes.")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    return bytes(body)


async def _relay(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        # Also when the client left in the middle: the server stops computing once its connection is closed.
        await answer.aclose()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _nothing_deployed() -> HTTPException:
    return HTTPException(503, "Nothing is deployed: a model has to pass its gates first.")


def _unavailable(deployment: Deployment) -> HTTPException:
    return HTTPException(
        503, f"The model server of {deployment.domain} does not answer; see `taskagent status`.", {"retry-after": "5"}
    )


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}))


async def _platform_error(request: Request, error: Exception) -> Response:
    return _error(503, str(error), {})


async def _fault(request: Request, error: Exception) -> Response:
    # What went wrong is in the log; a client may not be meant to read it.
    return _error(500, "The gateway failed; its log says why.", {})


def _error(status: int, message: str, headers: dict[str, str]) -> Response:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    # The shape in which OpenAI's clients look for the message.
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(body, status_code=status, headers=headers)


def _key_hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def main() -> None:
    """Runs the gateway until it is told to stop."""
    parser = argparse.ArgumentParser(description="The platform's gateway.")
    parser.add_argument("--active", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--requests-per-minute", type=int, required=True)
    parser.add_argument("--log-file", type=Path, help="takes the log; standard error if not given")
    arguments = parser.parse_args()
    # Moved aside when it is full, so that the last part is always there; whoever starts this may append to it, too.
    handler = (
        logging.StreamHandler(sys.stderr)
        if arguments.log_file is None
        else RotatingFileHandler(arguments.log_file, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8")
    )
    logging.basicConfig(handlers=[handler], format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    uvicorn.run(
        create_app(arguments.active, requests_per_minute=arguments.requests_per_minute),
        host=arguments.host,
        port=arguments.port,
        access_log=False,
        # Its own would write past the log file.
        log_config=None,
        log_level="warning",
        # An address that a client claims in a header is not the one that the limit counts.
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=30,
    )


if __name__ == "__main__":
    main()
