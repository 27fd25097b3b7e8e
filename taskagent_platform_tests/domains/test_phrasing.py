from pathlib import Path
from typing import Any

import pytest

from taskagent_platform.domains.phrasing import Result, Slot, read_templates
from taskagent_platform.errors import PlatformError


def _read(tmp_path: Path, line: str):
    path = tmp_path / "lines.txt"
    path.write_text("# a comment\n" + line + "\n")
    return read_templates(path)


def test_a_line_becomes_a_request_and_its_call(tmp_path):
    line = 'add {title}, "due" {date} => create_task(title={title}, tags=["a", {title}], due={date})'
    (template,) = _read(tmp_path, line)
    assert template.line == 2
    assert template.turns[0].request == ("add ", Slot("title"), ', "due" ', Slot("date"))
    (call,) = template.calls
    assert call.tool == "create_task"
    assert call.arguments == {"title": (Slot("title"),), "tags": [("a",), (Slot("title"),)], "due": (Slot("date"),)}


def test_steps_are_sequential_and_calls_within_one_parallel(tmp_path):
    (template,) = _read(tmp_path, "do {a} {b} => one(x={a}) ; two(p=@1.id) & three(x={b}, y={a}T{b})")
    first, second = template.turns[0].steps
    assert [call.tool for call in first] == ["one"]
    assert [call.tool for call in second] == ["two", "three"]
    assert second[0].arguments == {"p": Result(1, "id")}
    assert second[1].arguments["y"] == (Slot("a"), "T", Slot("b"))


def test_a_result_may_be_the_first_entry_of_a_list():
    results: list[dict[str, Any]] = [{"count": 1, "tasks": [{"task_id": "7", "title": "a"}]}, {"id": "x", "tasks": []}]
    assert Result(1, "tasks.task_id").of(results) == "7"
    assert Result(2, "id").of(results) == "x"
    with pytest.raises(LookupError):
        Result(2, "tasks.task_id").of(results)


def test_turns_may_answer_in_words(tmp_path):
    (template,) = _read(tmp_path, 'delete it => "Which one?" || {task} => delete_task(task_id={task})')
    assert template.turns[0].answer == ("Which one?",)
    assert template.calls[0].tool == "delete_task"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("no answer here", "there is no ` => `"),
        ("add {title} => create_task(title={name})", "{name} is not in the request"),
        ("add {title} => create_task {title}", "not a call"),
        ("add {title} => create_task({title})", "not an argument"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, fault):
    with pytest.raises(PlatformError) as error:
        _read(tmp_path, line)
    assert "lines.txt, line 2" in str(error.value)
    assert fault in str(error.value)
