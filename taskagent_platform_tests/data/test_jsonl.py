import json

import pytest

from taskagent_platform.data.jsonl import Record, read_jsonl, write_jsonl
from taskagent_platform.errors import PlatformError

GOOD: Record = {
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    "tools": [],
    "meta": {},
}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    assert write_jsonl(path, [GOOD, GOOD]) == 2
    assert list(read_jsonl(path)) == [GOOD, GOOD]


def _call(arguments):
    return {
        "messages": [
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "t", "arguments": arguments}}]}
        ]
    }


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object, not list"),
        ("{}", "field messages"),
        (json.dumps({"messages": [{"role": "robot", "content": ""}]}), "messages[0].role"),
        (json.dumps({"messages": [{"role": "user", "content": 3}]}), "messages[0].content"),
        (json.dumps({"messages": GOOD["messages"][:1]}), "last message"),
        (json.dumps(_call("{")), "tool_calls[0].function.arguments"),
        (json.dumps(_call({"a": 1})), "tool_calls[0].function.arguments"),
        (json.dumps({**GOOD, "tools": 5}), "field tools"),
    ],
)
def test_a_wrong_line_is_named_with_file_line_and_field(tmp_path, line, fault):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(PlatformError) as error:
        list(read_jsonl(path))
    assert "bad.jsonl, line 2" in str(error.value)
    assert fault in str(error.value)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path):
    with pytest.raises(PlatformError, match=r"none\.jsonl cannot be read"):
        list(read_jsonl(tmp_path / "none.jsonl"))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(PlatformError, match=r"bytes\.jsonl is not UTF-8"):
        list(read_jsonl(tmp_path / "bytes.jsonl"))
