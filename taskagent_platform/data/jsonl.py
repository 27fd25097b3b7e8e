"""Datasets as JSON lines, one training example a line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from taskagent_platform.errors import PlatformError

Record = dict[str, Any]
"""``messages``, ``tools`` and ``meta`` of one example."""

_ROLES = ("system", "user", "assistant", "tool")


def write_jsonl(path: Path, records: Iterable[Record]) -> int:
    """Writes records one a line and returns how many there were."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: Path) -> Iterator[Record]:
    """Yields the examples of a file, each checked for the training format.

    Raises:
        PlatformError: the file or a line of it cannot be used; names file, line, field and value.
    """
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise PlatformError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
        lines = enumerate(file, start=1)
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise PlatformError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
            if line.strip():
                yield _record(line, f"{path}, line {number}")


def _record(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise PlatformError(f"{place}: not JSON ({error.msg} at column {error.colno}).") from error
    if not isinstance(record, dict):
        raise PlatformError(f"{place}: an example is a JSON object, not {type(record).__name__}.")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise PlatformError(f"{place}, field messages: a list of at least one message is wanted, got {messages!r}.")
    for index, message in enumerate(messages):
        _check_message(message, f"{place}, field messages[{index}]")
    if messages[-1]["role"] != "assistant":
        raise PlatformError(f"{place}: the last message must be the assistant's, not {messages[-1]['role']!r}.")
    for name, kind in (("tools", list), ("meta", dict)):
        if not isinstance(record.setdefault(name, kind()), kind):
            raise PlatformError(f"{place}, field {name}: {kind.__name__} wanted, got {record[name]!r}.")
    return record


def _check_message(message: Any, place: str) -> None:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise PlatformError(f"{place}.role: one of {', '.join(_ROLES)} is wanted, got {role!r}.")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise PlatformError(f"{place}.tool_calls: a list is wanted, got {calls!r}.")
    if not isinstance(message.get("content"), str) and not calls:
        raise PlatformError(f"{place}.content: text is wanted, got {message.get('content')!r}.")
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise PlatformError(f"{place}.tool_calls[{index}].function.name is missing in {call!r}.")
        try:
            arguments = json.loads(function.get("arguments", ""))
        except (TypeError, json.JSONDecodeError):
            arguments = None
        if not isinstance(arguments, dict):
            raise PlatformError(
                f"{place}.tool_calls[{index}].function.arguments: a JSON object in a string is wanted, "
                f"got {function.get('arguments')!r}."
            )
