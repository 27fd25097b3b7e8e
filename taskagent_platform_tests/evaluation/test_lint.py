"""Wrong gold answers and repeated cases, found without a model."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from taskagent_platform import cli
from taskagent_platform.domains.registry import find_domain
from taskagent_platform.evaluation.lint import Finding, lint_suite
from taskagent_platform.evaluation.suite import load_suite

DOMAIN = find_domain("task_api")


def lint(folder: Path, **lists: list[dict[str, Any]]) -> list[Finding]:
    path = folder / "s.json"
    path.write_text(json.dumps(lists))
    return lint_suite(load_suite([path], DOMAIN), DOMAIN)


def kinds(findings: list[Finding]) -> list[tuple[str, bool]]:
    return [(finding.kind, finding.is_error) for finding in findings]


def extract(tool: str, **arguments: Any) -> dict[str, Any]:
    return {"input": json.dumps(arguments), "expected_tool": tool, "expected_args": arguments}


def chain(*calls: tuple[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "input": "do it", "expected_chain": [tool for tool, _ in calls],
        "expected_args": [arguments for _, arguments in calls], **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        extract("create_task", title="x", priority={"any_of": ["low", "medium"]}, tags={"optional": True}),
        extract("create_task", title="x", due_date="2024-02-29"),
        # Single calls are not executed by an evaluation: what they name need not exist.
        extract("complete_task", task_id="no such task"),
    ],
)
def test_a_right_answer_is_let_be(tmp_path: Path, case: dict[str, Any]) -> None:
    assert lint(tmp_path, argument_extraction=[case]) == []


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (extract("create_task", title="x", priority="urgent"), "create_task.priority = 'urgent'"),
        (extract("create_task", title="x", priority={"any_of": ["low", "urgent"]}), "create_task.priority = 'urgent'"),
        (extract("create_task", title="x", due_date="19.01.2024"), "create_task.due_date = '19.01.2024'"),
        (extract("create_task", title="x", tags="a"), "create_task.tags = 'a'"),
        (extract("create_task", title=3), "create_task.title = 3"),
        (extract("create_task", priority="low"), "create_task requires title"),
        (extract("create_task", title={"any_of": ["x"], "optional": True}), "create_task requires title"),
    ],
)
def test_arguments_that_do_not_validate(tmp_path: Path, case: dict[str, Any], says: str) -> None:
    findings = lint(tmp_path, argument_extraction=[case])
    assert kinds(findings) == [("invalid", True)]
    assert says in findings[0].sentence


def test_arguments_that_do_not_execute(tmp_path: Path) -> None:
    [no_day] = lint(tmp_path, argument_extraction=[extract("create_task", title="x", due_date="2023-02-29")])
    assert no_day.is_error
    [backwards] = lint(
        tmp_path, argument_extraction=[extract("get_calendar", start_date="2024-02-02", end_date="2024-02-01")]
    )
    assert (backwards.kind, backwards.is_error) == ("not executable", True)


def test_chains_are_executed_with_their_data_flow(tmp_path: Path) -> None:
    flow = {"create_task": {"project_id": "from:create_project"}}
    steps = ("create_project", {"name": "Q1"}), ("create_task", {"title": "x"})
    assert lint(tmp_path, multi_tool_chains=[chain(*steps, dependency=flow)]) == []
    nowhere = {"create_task": {"project_id": "from:create_project.color"}}
    assert kinds(lint(tmp_path, multi_tool_chains=[chain(*steps, dependency=nowhere)])) == [("not executable", True)]
    assert kinds(lint(tmp_path, multi_tool_chains=[chain(*reversed(steps), dependency=flow)])) == [("invalid", True)]


def test_what_a_chain_names_and_its_fixture_lacks_is_worth_a_note(tmp_path: Path) -> None:
    absent = chain(("complete_task", {"task_id": "no such task"}))
    assert kinds(lint(tmp_path, multi_tool_chains=[absent])) == [("missing", False)]
    present = chain(("complete_task", {"task_id": "Fix login bug"}))
    assert lint(tmp_path, multi_tool_chains=[present]) == []


def test_a_chain_that_leaves_its_arguments_open_is_not_executed(tmp_path: Path) -> None:
    case = {"input": "x", "expected_chain": ["create_project", "create_task"]}
    assert lint(tmp_path, multi_tool_chains=[case]) == []


def select(text: str, tool: str, **more: Any) -> dict[str, Any]:
    return {"input": text, "expected_tool": tool, **more}


def test_repeated_contradicting_and_similar_cases(tmp_path: Path) -> None:
    found = lint(
        tmp_path,
        tool_selection=[
            select("Show my open tasks, please", "list_tasks"),
            select("show my open tasks please!", "list_tasks"),
            select("Show my open tasks, please", "get_calendar"),
            select("Show my open tasks, pleas", "list_tasks"),
            select("Show my open tasks, please", "list_tasks", now="2024-03-01T09:00"),
            select("Delete the old one", "delete_task"),
        ],
        abstention=[{"input": "Delete the old one"}],
    )
    by_kind: dict[str, list[str]] = {}
    for finding in found:
        by_kind.setdefault(finding.kind, []).append(finding.case)
    assert by_kind["repeated"] == ["s/tool_selection[1]"]
    assert by_kind["contradicted"] == ["s/tool_selection[2]", "s/tool_selection[2]", "s/abstention[0]"]
    assert set(by_kind["near-duplicate"]) == {"s/tool_selection[3]", "s/tool_selection[4]"}
    assert not [finding for finding in found if finding.kind == "near-duplicate" and finding.is_error]


def test_the_command_says_what_it_found_and_fails_on_errors(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"argument_extraction": [extract("create_task", title="x", priority="urgent")]}))
    done = CliRunner().invoke(cli.app, ["suite", "lint", str(path), "--domain", "task_api"])
    assert done.exit_code == 1
    assert "ERROR s/argument_extraction[0]: invalid: create_task.priority = 'urgent'" in done.stdout
    assert "1 cases, 1 errors, 0 notes." in done.stdout
    cases = [select("Show my open tasks, please", "list_tasks"), select("Show my open tasks, pleas", "list_tasks")]
    path.write_text(json.dumps({"tool_selection": cases}))
    assert CliRunner().invoke(cli.app, ["suite", "lint", str(path), "--domain", "task_api"]).exit_code == 0
    strict = CliRunner().invoke(cli.app, ["suite", "lint", str(path), "--domain", "task_api", "--strict"])
    assert strict.exit_code == 1
