"""The Task API as a REST service.

    python -m taskagent_platform.task_api.service --port 8220

Every endpoint is one operation of :class:`~taskagent_platform.domains.task_api.backend.TaskApiBackend`: arguments come
from the path, the query (GET) or a JSON body, and a refused operation answers with the status of its ``ToolError``. The
state is the file that ``taskagent ask`` uses, so that both see the same tasks. There are no accounts: it listens on
the loopback interface and answers to no other name, so that no page in a browser can reach it.
"""

import argparse
import json
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from taskagent_platform.agent.state import stored_backend
from taskagent_platform.domains.base import Backend, ToolError
from taskagent_platform.domains.task_api import DOMAIN
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import settings

DEFAULT_PORT = 8220
MAX_BODY_BYTES = 1 << 20
_LOOPBACK_NAMES = ["127.0.0.1", "localhost", "[::1]"]
_LISTS = ("tags",)


class Operation(NamedTuple):
    """How one tool is reached: ``{task_id}`` in the path is the argument of that name."""

    method: str
    path: str
    tool: str


OPERATIONS = (
    Operation("POST", "/tasks", "create_task"),
    Operation("GET", "/tasks", "list_tasks"),
    Operation("POST", "/tasks/{task_id:path}/complete", "complete_task"),
    Operation("POST", "/tasks/{task_id:path}/reminders", "create_reminder"),
    Operation("PATCH", "/tasks/{task_id:path}", "update_task"),
    Operation("DELETE", "/tasks/{task_id:path}", "delete_task"),
    Operation("POST", "/projects", "create_project"),
    Operation("GET", "/calendar", "get_calendar"),
)
"""Every operation; a task is named by its id, or by its title, as an agent's calls name it."""


def create_app(backend: Backend) -> Starlette:
    """Builds the service on a backend."""
    routes = [
        Route(operation.path, _endpoint(operation, backend), methods=[operation.method]) for operation in OPERATIONS
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK_NAMES)],
        exception_handlers={ToolError: _refused, PlatformError: _broken},
    )


def _endpoint(operation: Operation, backend: Backend) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        given = _query(request) if operation.method == "GET" else await _body(request)
        if clash := given.keys() & request.path_params.keys():
            raise ToolError(400, "invalid_argument", f"{min(clash)} stands in the path and in the body")
        # The backend waits for a file lock; other requests go on meanwhile.
        result = await run_in_threadpool(backend.execute, operation.tool, {**given, **request.path_params})
        return JSONResponse(result, 201 if operation.tool.startswith("create_") else 200)

    return endpoint


def _query(request: Request) -> dict[str, Any]:
    return {
        name: request.query_params.getlist(name) if name in _LISTS else value
        for name, value in request.query_params.items()
    }


async def _body(request: Request) -> dict[str, Any]:
    # A page of another site can send a plain form or text here without asking, but not JSON.
    if request.method == "POST" and request.headers.get("content-type", "").split(";")[0] != "application/json":
        raise ToolError(415, "unsupported_media_type", "send Content-Type: application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ToolError(413, "too_large", f"the body is larger than {MAX_BODY_BYTES} bytes")
    try:
        parsed = json.loads(body) if body else {}
    except ValueError as error:
        raise ToolError(400, "invalid_argument", f"the body is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ToolError(400, "invalid_argument", "the body must be a JSON object")
    return parsed


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ToolError)
    return JSONResponse(error.as_result(), error.status)


async def _broken(request: Request, error: Exception) -> Response:
    """Says what is wrong with the stored state, in the form of a refused operation."""
    return JSONResponse(ToolError(500, "internal_error", str(error)).as_result(), 500)


def main() -> None:
    """Serves the state of the current profile until it is told to stop."""
    parser = argparse.ArgumentParser(description="The Task API.")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    arguments = parser.parse_args()
    uvicorn.run(create_app(stored_backend(settings(), DOMAIN)), host="127.0.0.1", port=arguments.port)


if __name__ == "__main__":
    main()
