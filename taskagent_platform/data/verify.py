"""Checks that a training example does what it teaches: it is valid, and its calls really give its results."""

import json
from datetime import datetime

from pydantic import ValidationError

from taskagent_platform.data.jsonl import Record
from taskagent_platform.domains.base import Backend, Domain, ToolError
from taskagent_platform.errors import PlatformError


def verify(domain: Domain, record: Record, place: str) -> None:
    """Validates every call against its tool's schema and executes it on the domain's backend.

    Args:
        domain: whose tools and backend.
        record: ``messages``, ``tools`` and ``meta``; ``meta.now`` and ``meta.state`` set the backend up.
        place: where the example comes from, for the error.

    Raises:
        PlatformError: a call is unknown, invalid or in another order than its schema, or a result differs from what
            the backend returns.
    """
    meta = record["meta"]
    for name in ("now", "state"):
        if name not in meta:
            raise PlatformError(f"{place}, field meta.{name} is missing; without it the calls cannot be executed.")
    backend = domain.backend(datetime.fromisoformat(meta["now"]))
    backend.load(meta["state"])
    results: dict[str, str] = {}
    for index, message in enumerate(record["messages"]):
        here = f"{place}, messages[{index}]"
        for call in message.get("tool_calls") or []:
            results[call["id"]] = _execute(domain, backend, call["function"], here)
        if message["role"] == "tool":
            expected = results.pop(message.get("tool_call_id", ""), None)
            if message["content"] != expected:
                raise PlatformError(f"{here}: the tool returned {expected}, the example says {message['content']}.")


def _execute(domain: Domain, backend: Backend, function: dict[str, str], place: str) -> str:
    name = function["name"]
    arguments = json.loads(function["arguments"])
    try:
        model = domain.tool(name).arguments
    except KeyError:
        raise PlatformError(f"{place}: {domain.name} has no tool {name!r}.") from None
    try:
        model.model_validate(arguments)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise PlatformError(f"{place}: {name}.{field} = {problem['input']!r}: {problem['msg']}.") from error
    order = [field for field in model.model_fields if field in arguments]
    if list(arguments) != order:
        raise PlatformError(f"{place}: the arguments of {name} come as {list(arguments)}, not as {order}.")
    try:
        result = backend.execute(name, arguments)
    except ToolError as error:
        result = error.as_result()
    return json.dumps(result, ensure_ascii=False)
