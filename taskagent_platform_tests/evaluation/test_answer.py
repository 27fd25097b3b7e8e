"""What counts as a call, an attempted call, and plain text."""

import json
from typing import Any

import pytest

from taskagent_platform.evaluation.answer import Answer, Attempt, has_type, is_valid, read_answer
from taskagent_platform_tests.light_domain import LIGHTS

NAMES = [tool.name for tool in LIGHTS.tools]
TOOLS = {tool.name: tool.parameters() for tool in LIGHTS.tools}
CALL = '<tool_call>{"name": "add_lamp", "arguments": {"room": "hall"}}</tool_call>'


def read(content: str | None, *calls: tuple[str, str]) -> Answer:
    tool_calls = [{"id": "1", "type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    return read_answer({"role": "assistant", "content": content, "tool_calls": tool_calls}, NAMES)


def test_a_call_is_read() -> None:
    answer = read(None, ("add_lamp", '{"room": "hall"}'))
    assert answer.calls == (Attempt("add_lamp", '{"room": "hall"}', {"room": "hall"}),)
    assert not answer.is_malformed


@pytest.mark.parametrize("arguments", ["", "{", '"text"', "[1]", "null", '{"room": }', "room=hall"])
def test_arguments_that_are_no_object_are_malformed(arguments: str) -> None:
    answer = read(None, ("add_lamp", arguments))
    assert answer.is_malformed
    assert answer.calls[0].arguments is None
    assert not is_valid(answer.calls[0], TOOLS)


@pytest.mark.parametrize(
    "text", ["Hello!", "", "I can add_lamp for you.", 'Say {"a": 1}.', "Lamps (two) are on.", "{}"]
)
def test_plain_text_is_no_attempt(text: str) -> None:
    answer = read(text)
    assert answer.attempts == ()
    assert not answer.is_malformed


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        "Sure. " + CALL,
        '<tool_call>{"name": "add_lamp", "arguments": {"room": "ha',
        "<tool_call>",
        "</tool_call>",
        "<tool_call>add_lamp(room='hall')</tool_call>",
        '{"name": "add_lamp", "arguments": {"room": "hall"}}',
        '```json\n{"name": "add_lamp", "parameters": {"room": "hall"}}\n```',
        '[{"name": "add_lamp", "arguments": {}}]',
        "add_lamp(room='hall')",
        "[add_lamp(room='hall')]",
        "Of course:\nadd_lamp(room='hall')",
        'add_lamp{"room": "hall"}',
        "<|python_tag|>anything",
        '[TOOL_CALLS][{"x": 1}]',
        "<function=add_lamp>",
        "<tool_use>add_lamp",
        '{"room": "hall"}',
        '```json\n{"room": "hall"',
        '[{"room": "hall"}]',
    ],
)
def test_what_looks_like_a_call_is_malformed(text: str) -> None:
    answer = read(text)
    assert answer.is_malformed
    assert answer.calls == ()
    assert len(answer.attempts) == 1


def test_each_call_of_an_unreadable_answer_is_an_attempt() -> None:
    answer = read(CALL + '<tool_call>{"name": "add_lamp", "arguments": {"room"' + CALL)
    assert [attempt.name for attempt in answer.failed_calls] == ["add_lamp", "", "add_lamp"]
    assert [is_valid(attempt, TOOLS) for attempt in answer.attempts] == [True, False, True]


@pytest.mark.parametrize(
    ("name", "arguments", "valid"),
    [
        ("set_light", {"room": "hall", "level": 5}, True),
        ("set_light", {"room": "hall", "level": "5"}, False),
        ("set_light", {"room": "hall", "level": 5, "size": 3}, True),  # undeclared: an argument fault, not JSON
        ("set_light", {}, True),  # missing: as well
        ("set_light", {"tags": ["a", 1]}, False),
        ("fly", {}, False),
    ],
)
def test_validity_is_about_names_and_types(name: str, arguments: dict[str, Any], valid: bool) -> None:
    assert is_valid(Attempt(name, json.dumps(arguments), arguments), TOOLS) is valid


@pytest.mark.parametrize(
    ("value", "schema", "right"),
    [
        ("a", {"type": "string"}, True),
        (1, {"type": "string"}, False),
        (1, {"type": "integer"}, True),
        (1.0, {"type": "integer"}, True),
        (1.5, {"type": "integer"}, False),
        (True, {"type": "integer"}, False),
        (True, {"type": "number"}, False),
        (1.5, {"type": "number"}, True),
        (True, {"type": "boolean"}, True),
        (None, {"type": "string"}, False),
        (None, {"type": ["string", "null"]}, True),
        (["a"], {"type": "array", "items": {"type": "string"}}, True),
        ([1], {"type": "array", "items": {"type": "string"}}, False),
        ([1], {"type": "array"}, True),
        ({"a": 1}, {"type": "object", "properties": {"a": {"type": "string"}}}, False),
        ({"b": 1}, {"type": "object", "properties": {"a": {"type": "string"}}}, True),
        (1, {"anyOf": [{"type": "string"}, {"type": "integer"}]}, True),
        ([], {"anyOf": [{"type": "string"}, {"type": "integer"}]}, False),
        ("x", {"enum": ["a"]}, True),
        (1, {"enum": ["a"]}, False),
        (object(), {}, True),
    ],
)
def test_types(value: Any, schema: dict[str, Any], right: bool) -> None:
    assert has_type(value, schema) is right


@pytest.mark.parametrize(
    "arguments",
    [
        '{"level": NaN}',
        '{"level": -Infinity}',
        '{"room": "\\ud83d"}',
        '{"\\udc00": 1}',
        '{"a": ' + "[" * 100_000,
        "9" * 5000,
    ],
)
def test_no_arguments_end_the_evaluation(arguments: str) -> None:
    answer = read_answer({"tool_calls": [{"function": {"name": "add_lamp", "arguments": arguments}}]}, TOOLS)
    assert answer.is_malformed
    assert read(f'<tool_call>{{"name": "add_lamp", "arguments": {arguments}}}</tool_call>').is_malformed
