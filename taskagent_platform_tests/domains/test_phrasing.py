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


def test_a_result_may_be_the_entry_that_a_slot_names_or_every_entry(tmp_path):
    line = "when is {event}? list {tag} => one(day=@1.events{event}.starts_at) ; two(id=@2.tasks*.task_id)"
    (template,) = _read(tmp_path, line)
    named, each = (value for call in template.calls for value in call.arguments.values())
    assert named == Result(1, "events.starts_at", named=Slot("event"))
    assert each == Result(2, "tasks.task_id", each=True)
    results = [
        {"events": [{"title": "a", "starts_at": "1"}, {"title": "b", "starts_at": "2"}]},
        {"tasks": [{"task_id": "7"}, {"task_id": "8"}]},
    ]
    assert isinstance(named, Result)
    assert isinstance(each, Result)
    assert named.of(results, named="b") == "2"
    assert [each.of(results, entry) for entry in range(each.entries(results))] == ["7", "8"]
    with pytest.raises(LookupError):
        named.of(results, named="c")
    with pytest.raises(LookupError, match="tasks is empty"):
        each.entries([{}, {"tasks": []}])


def test_turns_may_answer_in_words(tmp_path):
    (template,) = _read(tmp_path, 'delete it => "Which one?" || {task} => delete_task(task_id={task})')
    assert template.turns[0].answer == ("Which one?",)
    assert template.calls[0].tool == "delete_task"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("no answer here", "there is no ` => `"),
        ("add {title} => create_task(title={name})", "{name} is not in the request"),
        ("when is it => one(day=@1.events{event}.starts_at)", "{event} is not in the request"),
        ("add {title} => create_task {title}", "not a call"),
        ("add {title} => create_task({title})", "not an argument"),
        ("finish it => list() ; complete(id=@1.tasks.task.id)", "not a result: '@1.tasks.task.id'"),
        ("finish all => list() ; complete(id=@1.tasks*)", "not a result: '@1.tasks*'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, fault):
    with pytest.raises(PlatformError) as error:
        _read(tmp_path, line)
    assert "lines.txt, line 2" in str(error.value)
    assert fault in str(error.value)
