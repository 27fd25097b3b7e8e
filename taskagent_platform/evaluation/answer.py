"""What a model answered: the calls it attempted, the text it wrote, and whether it can be read at all."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Schema = Mapping[str, Any]
ToolSchemas = Mapping[str, Schema]
"""The JSON schema of every tool's arguments, by the tool's name, in the order that they are offered."""

CALL_MARK = "<tool_call>"
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|$)", re.DOTALL)
# Marks by which other formats announce a call: Llama, Mistral, XML-like, code fences around a call.
_FOREIGN_MARKS = re.compile(
    r"</?tool_(?:call|use|response)|<\|(?:python_tag|tool_call)|\[TOOL_CALLS\]|<function[=_]", re.IGNORECASE
)
# Nobody is answered with a bare object: a text that begins as one, fenced or not, is the arguments of a call.
_BARE_OBJECT = re.compile(r'\s*(?:```\w*\s*)?\[?\s*\{\s*"')
_CALL_OBJECT = re.compile(r'[{\[]\s*"(?:name|function|tool|type)"\s*:', re.DOTALL)
_ARGUMENTS_KEY = re.compile(r'"(?:arguments|parameters|args)"\s*:')


@dataclass(frozen=True)
class Attempt:
    """One attempted call.

    Attributes:
        name: the tool's name as the model wrote it; empty if it cannot be read.
        text: the arguments as the model wrote them.
        arguments: the arguments; None if they are no JSON object.
    """

    name: str
    text: str
    arguments: Mapping[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        """Returns the call as plain data, for reports."""
        return {"tool": self.name, "arguments": self.text if self.arguments is None else dict(self.arguments)}


@dataclass(frozen=True)
class Answer:
    """One answer of a model.

    Attributes:
        calls: the calls that the server recognised.
        text: what the model wrote beside them.
        failed_calls: calls that the model attempted and the server did not recognise, as far as they can be read.
    """

    calls: tuple[Attempt, ...]
    text: str
    failed_calls: tuple[Attempt, ...] = ()

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Every call that the model attempted."""
        return self.calls + self.failed_calls

    @cached_property
    def is_malformed(self) -> bool:
        """Whether the model attempted a call that cannot be read; such an answer is never an abstention."""
        return bool(self.failed_calls) or any(call.arguments is None for call in self.calls)


def read_answer(message: Mapping[str, Any], tool_names: Iterable[str]) -> Answer:
    """Reads an assistant's message in OpenAI's chat format.

    Args:
        message: with ``content`` and ``tool_calls``, both of which may be missing.
        tool_names: the tools offered; a text that calls one of them like a function is an attempted call.
    """
    calls = tuple(
        Attempt(
            call["function"]["name"] or "", call["function"]["arguments"] or "", _object(call["function"]["arguments"])
        )
        for call in message.get("tool_calls") or []
    )
    text = message.get("content") or ""
    return Answer(calls, text, tuple(_failed_calls(text, tool_names)))


def has_type(value: Any, schema: Schema) -> bool:
    """Tells whether a value has the JSON type that a schema asks for; says nothing about enums, patterns, bounds."""
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return any(has_type(value, option) for option in options)
    kinds = schema.get("type")
    if kinds is None:
        return "enum" not in schema or any(type(value) is type(choice) for choice in schema["enum"])
    if not any(_is_kind(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if isinstance(value, list):
        return all(has_type(item, schema.get("items") or {}) for item in value)
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        return all(has_type(item, properties[name]) for name, item in value.items() if name in properties)
    return True


def is_valid(attempt: Attempt, tools: ToolSchemas) -> bool:
    """Tells whether a call parses, names a known tool, and gives its declared arguments in their declared types."""
    if attempt.arguments is None or attempt.name not in tools:
        return False
    properties = tools[attempt.name].get("properties", {})
    return all(has_type(value, properties[name]) for name, value in attempt.arguments.items() if name in properties)


def _is_kind(value: Any, kind: str) -> bool:
    if kind == "integer":
        return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value % 1 == 0))
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    types = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}
    return isinstance(value, types[kind])


def _failed_calls(text: str, tool_names: Iterable[str]) -> Iterable[Attempt]:
    """Yields what looks like a call in a text.

    A server that finds one unreadable call in an answer hands the whole answer back as text, readable calls included.
    """
    if CALL_MARK in text:
        for match in _CALL.finditer(text):
            yield _read_call(match[1])
    elif (
        _FOREIGN_MARKS.search(text)
        or _BARE_OBJECT.match(text)
        or (_CALL_OBJECT.search(text) and _ARGUMENTS_KEY.search(text))
    ):
        yield Attempt("", text, None)
    else:
        names = "|".join(map(re.escape, tool_names))
        if names and re.search(rf"^\W*(?:{names})\W*[({{]", text, re.MULTILINE):
            yield Attempt("", text, None)


def _read_call(text: str) -> Attempt:
    call = _object(text) or {}
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return Attempt("", text, None)
    return Attempt(name, json.dumps(arguments), arguments)


def _object(text: str | None) -> Mapping[str, Any] | None:
    """Returns a JSON object, None for anything else that a model may write: nothing of it may end the evaluation."""
    try:
        value = json.loads(text or "", parse_constant=_no_constant)
        # Half a surrogate pair is no text: neither a report nor the next request could hold it.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
