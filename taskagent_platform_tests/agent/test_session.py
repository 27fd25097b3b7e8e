import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from taskagent_platform.agent.approvals import Call, Decision, LimitedApprover, approve_all
from taskagent_platform.agent.execution import ExecutedCall, ToolExecutor
from taskagent_platform.agent.session import agent_smoke, ask
from taskagent_platform.agent.state import stored_backend
from taskagent_platform.audit import AuditLog, audit_log
from taskagent_platform.domains.task_api import DOMAIN
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform_tests.agent.scripted_server import ScriptedServer, call
from taskagent_platform_tests.serving.fake_server import serve

NOW = datetime(2024, 1, 15, 9)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    return load_settings(profile="smoke", serving={"destructive_per_minute": 2})


@pytest.fixture
def run(settings: Settings) -> Iterator[Callable[..., Any]]:
    with ExitStack() as stack:

        def run(server: ScriptedServer, text: str = "do it", **options: Any) -> Any:
            url = stack.enter_context(serve(server.app))
            lines: list[str] = []
            answer = ask(settings, DOMAIN, text, now=NOW, base_url=f"{url}/v1", echo=lines.append, **options)
            return answer, "\n".join(lines)

        yield run


def _titles(settings: Settings) -> list[str]:
    return [task["title"] for task in stored_backend(settings, DOMAIN).snapshot()["tasks"]]


def _outcomes(settings: Settings) -> list[tuple[str | None, str]]:
    return [(entry.tool, entry.outcome) for entry in audit_log(settings).entries()]


def test_calls_are_executed_shown_audited_and_remembered_by_the_next_request(
    settings: Settings, run: Callable[..., Any]
) -> None:
    server = ScriptedServer([call("create_task", title="Review Q4", priority="high")], "Added it.")
    answer, shown = run(server, "Create a high-priority task called 'Review Q4'")
    assert answer.text == "Added it."
    assert (answer.model_digest, answer.is_finished) == ("digest-1", True)
    assert [(made.tool, made.outcome) for made in answer.calls] == [("create_task", "executed")]
    assert 'create_task(title="Review Q4", priority="high")' in shown
    assert shown.endswith("Added it.")
    assert json.loads(server.body(1)["messages"][-1]["content"])["title"] == "Review Q4"
    assert "Review Q4" in _titles(settings)
    (entry,) = audit_log(settings).entries()
    assert (entry.tool, entry.arguments, entry.outcome, entry.model_digest, entry.domain) == (
        "create_task", {"title": "Review Q4", "priority": "high"}, "executed", "digest-1", "task_api",
    )  # fmt: skip
    # A second process would see the task: the state lies in a file.
    answer, _ = run(ScriptedServer([call("complete_task", task_id="Review Q4")], "Done."))
    assert answer.calls[0].result["status"] == "completed"


def test_the_model_is_asked_with_the_domains_own_prompt_and_schemas(run: Callable[..., Any]) -> None:
    server = ScriptedServer("Hello!")
    run(server, "hi")
    body = server.body()
    assert body["tools"] == DOMAIN.openai_tools()
    assert body["messages"] == [
        {"role": "system", "content": DOMAIN.system_prompt(NOW)}, {"role": "user", "content": "hi"},
    ]  # fmt: skip
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("task_api", 0, 48)


def test_parallel_calls_run_in_the_order_in_which_they_were_written(
    settings: Settings, run: Callable[..., Any]
) -> None:
    calls = [call("create_task", title=f"task number {number}") for number in range(5)]
    answer, _ = run(ScriptedServer(calls, "Added five."))
    assert _titles(settings)[-5:] == [f"task number {number}" for number in range(5)]
    assert len(answer.calls) == 5


def test_a_destructive_call_without_a_terminal_is_refused_and_the_conversation_ends(
    settings: Settings, run: Callable[..., Any]
) -> None:
    server = ScriptedServer([call("delete_task", task_id="task_001")], "Deleted it!")
    answer, shown = run(server)
    assert answer.text.startswith("Not done: delete_task was refused, there is no terminal")
    assert "Deleted it!" not in shown
    assert len(server.bodies) == 1
    assert "Review budget proposal" in _titles(settings)
    assert _outcomes(settings) == [("delete_task", "refused")]


def test_a_refusal_stops_everything_in_the_same_answer(settings: Settings, run: Callable[..., Any]) -> None:
    server = ScriptedServer([call("create_task", title="Not me"), call("delete_task", task_id="task_001")], "never")
    answer, _ = run(server)
    assert [(made.tool, made.outcome) for made in answer.calls] == [
        ("delete_task", "refused"), ("create_task", "refused"),
    ]  # fmt: skip
    assert "Not me" not in _titles(settings)


def test_approved_and_harmless_calls_of_an_answer_run_in_its_order(settings: Settings, run: Callable[..., Any]) -> None:
    calls = [call("delete_task", task_id="T-19"), call("create_task", title="new"), call("delete_task", task_id="new")]
    server = ScriptedServer(calls, "Done.")
    answer, _ = run(server, yes=True)
    assert [made.tool for made in answer.calls] == ["delete_task", "create_task", "delete_task"]
    assert all(made.outcome == "executed" for made in answer.calls)
    results = [message["tool_call_id"] for message in server.body(1)["messages"] if message["role"] == "tool"]
    assert results == ["call_1_0", "call_1_1", "call_1_2"]


def test_yes_approves_and_the_approval_is_on_record_before_the_execution(
    settings: Settings, run: Callable[..., Any]
) -> None:
    server = ScriptedServer([call("delete_task", task_id="task_001")], "Deleted.")
    answer, _ = run(server, yes=True, actor="ann")
    assert answer.text == "Deleted."
    assert "Review budget proposal" not in _titles(settings)
    entries = list(audit_log(settings).entries())
    assert [(entry.outcome, entry.actor, entry.reason) for entry in entries] == [
        ("approved", "ann", "--yes"), ("executed", "ann", None),
    ]  # fmt: skip
    assert json.loads(server.body(1)["messages"][-1]["content"])["deleted"] is True


def test_a_person_sees_the_exact_call_and_decides(settings: Settings, run: Callable[..., Any]) -> None:
    seen: list[Call] = []

    def only_the_first(shown: Call) -> Decision:
        seen.append(shown)
        return Decision(len(seen) == 1, "the person said so")

    server = ScriptedServer([call("delete_task", task_id="task_001"), call("delete_task", task_id="task_003")], "never")
    answer, _ = run(server, approver=only_the_first)
    assert seen == [Call("delete_task", {"task_id": "task_001"}), Call("delete_task", {"task_id": "task_003"})]
    # Both belong to one answer of the model: refusing one of them stops it before either has run.
    assert {"Review budget proposal", "Fix login bug"} <= set(_titles(settings))
    entries = [(entry.arguments, entry.outcome) for entry in audit_log(settings).entries()]
    first, second = {"task_id": "task_001"}, {"task_id": "task_003"}
    assert entries == [(first, "approved"), (second, "refused"), (first, "refused")]
    assert [made.outcome for made in answer.calls] == ["refused", "refused"]
    assert answer.text.startswith("Not done: delete_task was refused, the person said so")


def test_an_interrupted_question_refuses_the_whole_answer_and_goes_on(
    settings: Settings, run: Callable[..., Any]
) -> None:
    def leave(shown: Call) -> Decision:
        raise KeyboardInterrupt

    server = ScriptedServer([call("create_task", title="Not me"), call("delete_task", task_id="task_001")], "never")
    with pytest.raises(KeyboardInterrupt):
        run(server, approver=leave)
    assert [(entry.tool, entry.outcome, entry.reason) for entry in audit_log(settings).entries()] == [
        ("delete_task", "refused", "interrupted"),
        ("create_task", "refused", "delete_task of the same answer was refused"),
    ]
    assert "Not me" not in _titles(settings)
    assert "Review budget proposal" in _titles(settings)


def test_no_more_destructive_calls_are_approved_in_a_minute_than_the_limit(
    settings: Settings, run: Callable[..., Any]
) -> None:
    for task in ("task_001", "task_002"):
        run(ScriptedServer([call("delete_task", task_id=task)], "Deleted."), yes=True)
    answer, _ = run(ScriptedServer([call("delete_task", task_id="task_003")], "Deleted."), yes=True)
    assert "serving.destructive_per_minute is 2" in answer.text
    assert "Fix login bug" in _titles(settings)


@pytest.mark.parametrize("error", [BrokenPipeError(), UnicodeEncodeError("ascii", "→", 0, 1, "ordinal not in range")])
def test_calls_are_on_record_where_they_cannot_be_shown(settings: Settings, error: Exception) -> None:
    lines: list[str] = []

    def echo(line: str) -> None:
        if not line.isascii() or isinstance(error, BrokenPipeError):
            raise error
        lines.append(line)

    with serve(ScriptedServer([call("create_task", title="Zürich")], "Added.").app) as url:
        answer = ask(settings, DOMAIN, "do it", now=NOW, base_url=f"{url}/v1", echo=echo)
    assert answer.text == "Added."
    assert _outcomes(settings) == [("create_task", "executed")]
    if isinstance(error, UnicodeError):
        assert lines[0] == r'\u2192 create_task(title="Z\xfcrich")'
        assert len(lines) == 3


def test_a_call_is_on_record_before_anybody_is_told_of_it(settings: Settings) -> None:
    def fail(shown: ExecutedCall) -> None:
        raise RuntimeError("the page is closed")

    log = audit_log(settings)
    approver = LimitedApprover(approve_all("--yes"), log, per_minute=1)
    executor = ToolExecutor(DOMAIN, DOMAIN.backend(NOW), log, approver, on_call=fail)
    with pytest.raises(RuntimeError, match="the page is closed"):
        executor.execute("create_task", '{"title": "one"}')
    assert _outcomes(settings) == [("create_task", "executed")]


def test_what_the_service_refuses_goes_back_to_the_model(settings: Settings, run: Callable[..., Any]) -> None:
    server = ScriptedServer([call("complete_task", task_id="no such task")], "There is no such task.")
    answer, _ = run(server)
    assert json.loads(server.body(1)["messages"][-1]["content"])["error"] == "not_found"
    assert (answer.calls[0].outcome, answer.text) == ("failed", "There is no such task.")
    assert _outcomes(settings) == [("complete_task", "failed")]


def test_malformed_and_unknown_calls_execute_nothing_and_are_on_record(
    settings: Settings, run: Callable[..., Any]
) -> None:
    before = stored_backend(settings, DOMAIN).snapshot()
    broken = [{"name": "create_task", "arguments": '{"title": '}, call("drop_database", now=True)]
    server = ScriptedServer(broken, "Sorry.")
    answer, _ = run(server)
    assert answer.text == "Sorry."
    results = {message["tool_call_id"]: json.loads(message["content"])["error"]
               for message in server.body(1)["messages"] if message["role"] == "tool"}  # fmt: skip
    assert results == {"call_1_0": "invalid_argument", "call_1_1": "unknown_tool"}
    assert sorted(_outcomes(settings)) == [("create_task", "failed"), ("drop_database", "refused")]
    assert stored_backend(settings, DOMAIN).snapshot() == before


def test_a_model_that_never_stops_calling_is_stopped(settings: Settings, run: Callable[..., Any]) -> None:
    turns = [[call("list_tasks")] for _ in range(5)]
    answer, _ = run(ScriptedServer(*turns))
    assert answer.text == "Stopped: the model was still calling tools after 3 turns."
    assert not answer.is_finished
    assert len(answer.calls) == 3


def test_an_answer_cut_off_before_its_first_word_is_an_answer_without_calls(run: Callable[..., Any]) -> None:
    answer, shown = run(ScriptedServer(""))
    assert (answer.calls, answer.is_finished) == ((), False)
    assert shown.startswith("The model gave no usable answer: ")


@pytest.mark.parametrize(
    "arguments",
    ['{"title": "\\ud83d"}', '{"title": "\ud83d"}', '{"title": ' + "[" * 300 + "]" * 300 + "}", "[" * 100_000],
    ids=["half an escaped emoji", "half an emoji", "nested", "nested without an end"],
)
def test_arguments_that_nothing_can_take_are_no_usable_answer(
    settings: Settings, run: Callable[..., Any], arguments: str
) -> None:
    calls = [call("list_tasks"), {"name": "create_task", "arguments": arguments}]
    answer, shown = run(ScriptedServer(calls, "never"))
    assert answer.text.startswith("The model gave no usable answer: the call of create_task holds half a character")
    assert _outcomes(settings) == [("list_tasks", "refused"), ("create_task", "refused")]
    assert [made.outcome for made in answer.calls] == ["refused", "refused"]
    shown.encode()
    assert audit_log(settings).verify() == 2


def test_answers_that_the_sdk_cannot_take_are_no_usable_answers(run: Callable[..., Any]) -> None:
    _, shown = run(ScriptedServer([call("list_tasks")], "never", call_id=None))
    assert shown == "The model gave no usable answer: call_id: Input should be a valid string"
    _, shown = run(ScriptedServer(("half \ud83d", [call("list_tasks")]), "never"))
    assert "The model gave no usable answer: " in shown
    _, shown = run(ScriptedServer("half \ud83d"))
    assert shown == "half \\ud83d"


def test_a_request_that_is_no_text_is_refused(settings: Settings) -> None:
    with pytest.raises(PlatformError, match="The request is not UTF-8 text"):
        ask(settings, DOMAIN, "delete \udcff", base_url="http://127.0.0.1:9/v1")


def test_text_of_models_and_tools_cannot_drive_the_terminal(run: Callable[..., Any]) -> None:
    evil = "\x1b[2Jgone\u202e"
    _, shown = run(ScriptedServer([call("create_task", title=evil)], f"Created {evil}\nfine"))
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "Created \\x1b[2Jgone\\u202e\nfine" in shown


def test_nobody_at_home_is_one_sentence(settings: Settings) -> None:
    with pytest.raises(PlatformError, match=r"Nothing answers at http://127\.0\.0\.1:9/v1"):
        ask(settings, DOMAIN, "hi", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(PlatformError, match="nothing to ask"):
        ask(settings, DOMAIN, "  ")


def test_a_server_that_is_too_slow_is_told_apart(
    settings: Settings, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(request: httpx.Request) -> None:
        raise httpx.ReadTimeout("too slow", request=request)

    from taskagent_platform.agent import agent

    monkeypatch.setattr(
        agent, "DefaultAsyncHttpxClient", lambda **options: httpx.AsyncClient(event_hooks={"request": [slow]})
    )
    with pytest.raises(PlatformError, match=r"has not answered within 300 s"):
        run(ScriptedServer("never"))


@pytest.mark.parametrize("key", ["tk-1\n", "tk 1", "tk-\x07", "tk-ü"])
def test_a_key_that_no_header_holds_is_refused_without_being_shown(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("TASKAGENT_API_KEY", key)
    with pytest.raises(PlatformError, match=r"The API key \(TASKAGENT_API_KEY\) holds a blank") as caught:
        ask(settings, DOMAIN, "hi", base_url="http://127.0.0.1:9/v1")
    assert "tk" not in str(caught.value)


def test_a_refused_request_says_what_the_server_said(run: Callable[..., Any]) -> None:
    with pytest.raises(PlatformError, match=r"answered 400: .*the script is at its end"):
        run(ScriptedServer())


def test_nothing_is_executed_when_the_audit_log_was_tampered_with(settings: Settings, run: Callable[..., Any]) -> None:
    run(ScriptedServer([call("create_task", title="one")], "Added."))
    log = audit_log(settings)
    log.path.write_bytes(log.path.read_bytes().replace(b"one", b"two"))
    with pytest.raises(PlatformError, match="was changed"):
        run(ScriptedServer([call("create_task", title="three")], "Added."))
    assert "three" not in _titles(settings)


def test_nothing_is_asked_or_executed_where_the_audit_log_cannot_be_written(
    settings: Settings, run: Callable[..., Any]
) -> None:
    asked: list[Call] = []

    def person(shown: Call) -> Decision:
        asked.append(shown)
        return Decision(True, "yes")

    log = audit_log(settings)
    log.path.with_name(log.path.name + ".head.partial").mkdir()
    for calls in ([call("create_task", title="three")], [call("delete_task", task_id="task_001")]):
        before = _titles(settings)
        with pytest.raises(PlatformError, match="cannot be written"):
            run(ScriptedServer(calls, "Done."), approver=person)
        assert _titles(settings) == before
    assert asked == []


def test_a_damaged_state_is_named(settings: Settings, run: Callable[..., Any]) -> None:
    run(ScriptedServer([call("create_task", title="one")], "Added."))
    file = settings.folder("task_api") / "state.json"
    file.write_text("{")
    with pytest.raises(PlatformError, match=r"state.json is damaged .*delete it"):
        run(ScriptedServer([call("create_task", title="two")], "Added."))


def test_the_smoke_test_asserts_the_tool_of_each_request_on_a_fresh_fixture(settings: Settings) -> None:
    good = ScriptedServer(
        [call("create_task", title="review the Q4 budget", priority="high")], "Added.",
        [call("list_tasks")], "Here they are.", [call("complete_task", task_id="task_001")], "Done.",
    )  # fmt: skip
    with serve(good.app) as url:
        report = agent_smoke(settings, DOMAIN, base_url=f"{url}/v1")
    assert report.passed
    assert [result.called for result in report.results] == [("create_task",), ("list_tasks",), ("complete_task",)]
    assert report.model_digest == "digest-1"
    bad = ScriptedServer("Sure!", [call("list_tasks")], "Here.", [call("complete_task", task_id="task_999")], "Done.")
    with serve(bad.app) as url:
        report = agent_smoke(settings, DOMAIN, base_url=f"{url}/v1")
    assert [result.passed for result in report.results] == [False, True, False]
    assert not report.passed
    assert [result.called for result in report.results] == [(), ("list_tasks",), ("complete_task (failed)",)]
    assert "review the Q4 budget" not in _titles(settings)


def test_the_audit_chain_holds_after_all_of_this(settings: Settings, run: Callable[..., Any]) -> None:
    run(ScriptedServer([call("create_task", title="a"), call("delete_task", task_id="a")], "Done."), yes=True)
    log: AuditLog = audit_log(settings)
    assert log.verify() == 3
