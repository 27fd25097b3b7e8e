import asyncio
import io
import os
import pty
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from taskagent_platform.agent.approvals import (
    SMOKE_ACTOR,
    Call,
    Decision,
    LimitedApprover,
    approve_all,
    ask_on_terminal,
    describe,
    printable,
)
from taskagent_platform.audit import AuditLog


def test_a_call_is_shown_in_one_line_complete_and_exact() -> None:
    assert describe(Call("delete_task", {"task_id": "task_001"})) == 'delete_task(task_id="task_001")'
    long = "x" * 500
    assert long in describe(Call("send_response", {"ticket_id": "7", "message": long}))
    assert describe(Call("create_task", {"title": "Zürich 東京", "tags": ["a", "b"]})) == (
        'create_task(title="Zürich 東京", tags=["a", "b"])'
    )
    assert describe(Call("create_task", '{"title":')) == 'create_task({"title":)'


@pytest.mark.parametrize(
    "trick", ["\x1b[2K", "\r", "\n", "\b", "\u202e", "\u200b", "\u2028", "\x9b", "\ufeff", "\ud800"]
)
def test_what_could_hide_or_rewrite_a_line_is_escaped(trick: str) -> None:
    shown = describe(Call(f"delete{trick}task", {f"a{trick}": f"task{trick}_001"}))
    assert trick not in shown
    assert trick not in printable(f"a{trick}b")
    assert printable(f"a{trick}b", keep="\n") == (f"a{trick}b" if trick == "\n" else printable(f"a{trick}b"))


@contextmanager
def terminal() -> Iterator[int]:
    """Makes a terminal of standard input and error; yields the descriptor at which a person sits."""
    person, program = pty.openpty()
    with (
        open(program, closefd=False) as reading,
        open(program, "w", closefd=False) as writing,
        # Not in a fixture: pytest puts its own streams there between a fixture and the test.
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "stdin", reading)
        patch.setattr(sys, "stderr", writing)
        yield person
    os.close(person)
    os.close(program)


def _answer_when_asked(person: int, answer: bytes) -> tuple[threading.Thread, list[str]]:
    shown: list[str] = [""]

    def sit() -> None:
        while "[y/N]" not in shown[0]:
            shown[0] += os.read(person, 1000).decode()
        os.write(person, answer)

    thread = threading.Thread(target=sit, daemon=True)
    thread.start()
    return thread, shown


@pytest.mark.parametrize(
    ("answer", "approved"), [(b"y\n", True), (b"YES\n", True), (b"\n", False), (b"n\n", False), (b"yep\n", False)]
)
def test_only_a_plain_yes_approves(answer: bytes, approved: bool) -> None:
    with terminal() as seat:
        person, shown = _answer_when_asked(seat, answer)
        decision = ask_on_terminal(Call("delete_task", {"task_id": "task_001"}))
        person.join(5)
    assert decision.approved is approved
    assert 'delete_task(task_id="task_001")' in shown[0]


def test_what_was_typed_before_the_question_does_not_answer_it() -> None:
    with terminal() as seat:
        os.write(seat, b"y\n")
        person, _ = _answer_when_asked(seat, b"n\n")
        assert not ask_on_terminal(Call("delete_task", {"task_id": "task_001"})).approved
        person.join(5)


def test_the_first_ctrl_c_at_the_question_ends_it(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    approver = LimitedApprover(ask_on_terminal, log, per_minute=3)

    async def approve() -> Decision:
        return approver(Call("delete_task", {"task_id": "task_001"}), domain="task_api", model_digest=None)

    def interrupt() -> None:
        shown = ""
        while "[y/N]" not in shown:
            shown += os.read(seat, 1000).decode()
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        # Without an end at Ctrl-C, this would be the answer.
        time.sleep(0.5)
        os.write(seat, b"y\n")

    # A shell starts what runs in the background, these tests for instance, with the signal ignored.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with terminal() as seat:
            person = threading.Thread(target=interrupt)
            person.start()
            with pytest.raises(KeyboardInterrupt):
                asyncio.run(approve())
            person.join(5)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, ours)
    assert [(entry.outcome, entry.reason) for entry in log.entries()] == [("refused", "interrupted")]


def test_without_a_terminal_nothing_is_approved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    decision = ask_on_terminal(Call("delete_task", {"task_id": "task_001"}))
    assert decision == Decision(False, "there is no terminal to ask on, and --yes was not given")


def test_the_limit_counts_approvals_of_every_process_and_spares_other_domains(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    call = Call("delete_task", {"task_id": "1"})
    decisions = []
    for _ in range(4):
        # A new log and approver each time, as another process would have.
        approver = LimitedApprover(approve_all("--yes"), AuditLog(path), per_minute=3)
        decisions.append(approver(call, domain="task_api", model_digest="d").approved)
    assert decisions == [True, True, True, False]
    assert approver(call, domain="support", model_digest="d").approved
    assert [entry.outcome for entry in AuditLog(path).entries()] == ["approved"] * 3 + ["refused", "approved"]


def test_the_limit_counts_calls_alone_and_the_smoke_test_apart(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append("gate_override", "approved", domain="task_api", reason="Ann said so")
    approver = LimitedApprover(approve_all("--yes"), log, per_minute=1)
    call = Call("delete_task", {"task_id": "1"})
    actors = (SMOKE_ACTOR, None, SMOKE_ACTOR, None)
    decisions = [approver(call, domain="task_api", model_digest=None, actor=actor).approved for actor in actors]
    assert decisions == [True, True, False, False]


def test_over_the_limit_nobody_is_even_asked(tmp_path: Path) -> None:
    asked: list[Call] = []

    def person(call: Call) -> Decision:
        asked.append(call)
        return Decision(True, "yes")

    approver = LimitedApprover(person, AuditLog(tmp_path / "audit.jsonl"), per_minute=1)
    for _ in range(2):
        approver(Call("delete_task", {"task_id": "1"}), domain="task_api", model_digest=None)
    assert len(asked) == 1
