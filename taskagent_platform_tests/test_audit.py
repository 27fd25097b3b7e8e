import json
import multiprocessing
import os
import pwd
from datetime import timedelta
from pathlib import Path

import pytest

from taskagent_platform.audit import AuditLog, account
from taskagent_platform.errors import PlatformError


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    log = AuditLog(tmp_path / "audit.jsonl")
    for number in range(4):
        log.append("tool_call", "executed", tool="create_task", arguments={"title": f"task {number}"}, actor="ann")
    return log


def _lines(log: AuditLog) -> list[bytes]:
    return log.path.read_bytes().splitlines(keepends=True)


def test_a_line_says_who_when_what_and_how_it_ended(log: AuditLog) -> None:
    log.append("tool_call", "refused", domain="task_api", model_digest="abc", tool="delete_task",
               arguments={"task_id": "1"}, reason="no terminal", actor="bob")  # fmt: skip
    line = json.loads(_lines(log)[-1])
    assert line.pop("time").endswith("Z")
    assert len(line.pop("previous")) == 64
    assert line == {
        "actor": "bob", "action": "tool_call", "outcome": "refused", "domain": "task_api", "model_digest": "abc",
        "tool": "delete_task", "arguments": {"task_id": "1"}, "reason": "no terminal",
    }  # fmt: skip
    assert log.path.stat().st_mode & 0o077 == 0


def test_the_account_is_the_kernel_s_and_not_the_environment_s(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(variable, "somebody-else")
    assert account() == pwd.getpwuid(os.geteuid()).pw_name
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000_001)
    assert account() == "uid 4000000001"


def test_an_untouched_log_verifies(log: AuditLog) -> None:
    assert log.verify() == 4
    assert [entry.arguments for entry in log.entries()] == [{"title": f"task {n}"} for n in range(4)]
    assert log.recent(timedelta(minutes=1))[0].arguments == {"title": "task 3"}
    assert AuditLog(log.path.with_name("none.jsonl")).verify() == 0


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (lambda lines: [lines[0], lines[1].replace(b"task 1", b"task 9"), *lines[2:]], "line 3"),
        (lambda lines: [*lines[:3], lines[3].replace(b"task 3", b"task 9")], "line 4"),
        (lambda lines: [lines[0], *lines[2:]], "line 2"),
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], "line 2"),
        (lambda lines: lines[:3], "had 4 lines and has 3"),
        (lambda lines: [*lines[:3], lines[3][:20]], "line 4"),
        (lambda lines: [], "had 4 lines and has 0"),
        (lambda lines: [*lines[:3], b"{}\n"], "line 4"),
    ],
)
def test_every_kind_of_tampering_is_found_and_stops_the_log(log: AuditLog, tamper, says: str) -> None:
    log.path.write_bytes(b"".join(tamper(_lines(log))))
    with pytest.raises(PlatformError, match=says):
        log.verify()


@pytest.mark.parametrize("tamper", [lambda lines: lines[:3], lambda lines: [*lines[:3], lines[3][:20]]])
def test_nothing_is_appended_to_a_log_that_lost_its_end(log: AuditLog, tamper) -> None:
    left = b"".join(tamper(_lines(log)))
    log.path.write_bytes(left)
    with pytest.raises(PlatformError, match="move both away"):
        log.append("tool_call", "executed")
    assert log.path.read_bytes() == left


@pytest.mark.parametrize("blocked", ["audit.jsonl", "audit.jsonl.head.partial", "audit.jsonl.lock"])
def test_a_log_that_cannot_be_written_shows_before_something_is_done(tmp_path: Path, blocked: str) -> None:
    (tmp_path / blocked).mkdir()
    fresh = AuditLog(tmp_path / "audit.jsonl")
    with pytest.raises(PlatformError, match=r"audit.jsonl cannot be written \(.*let this account write it"):
        fresh.check()
    with pytest.raises(PlatformError, match="cannot be written"):
        fresh.append("tool_call", "executed")


def test_a_check_leaves_a_whole_log(log: AuditLog) -> None:
    for checked, lines in ((log, 4), (AuditLog(log.path.with_name("fresh.jsonl")), 0)):
        checked.check()
        assert checked.path.exists()
        assert checked.verify() == lines
        checked.append("tool_call", "executed")
        assert checked.verify() == lines + 1
    assert not list(log.path.parent.glob("*.partial"))


def test_a_removed_head_is_noticed(log: AuditLog) -> None:
    (log.path.parent / "audit.jsonl.head").unlink()
    with pytest.raises(PlatformError, match=r"audit.jsonl.head is missing"):
        log.append("tool_call", "executed")


def test_a_line_cut_off_by_a_power_failure_is_dropped(log: AuditLog) -> None:
    with log.path.open("ab") as file:
        file.write(b'{"time": "2024')
    assert len(log.recent(timedelta(minutes=1))) == 4, "nor is it in the way of who only reads"
    with log.path.open("ab") as file:
        file.write(b'{"time": "2024')
    log.append("tool_call", "executed", tool="list_tasks")
    assert log.verify() == 5


def test_a_line_cut_off_by_a_power_failure_is_named_with_its_remedy(log: AuditLog) -> None:
    with log.path.open("ab") as file:
        file.write(b'{"time": "2024')
    with pytest.raises(PlatformError, match=r"in the middle of line 5.* the 4 lines before .* The next call"):
        log.verify()
    log.check()
    assert log.verify() == 4


def test_no_more_lines_than_a_crash_leaves_are_taken_without_their_head(log: AuditLog) -> None:
    head = log.path.parent / "audit.jsonl.head"
    before = head.read_bytes()
    log.append("tool_call", "executed", tool="list_tasks")
    log.append("tool_call", "executed", tool="list_tasks")
    head.write_bytes(before)
    with pytest.raises(PlatformError, match="was changed: it had 4 lines and has 6"):
        log.verify()
    with pytest.raises(PlatformError, match="move both away"):
        log.append("tool_call", "executed")


def test_the_first_line_may_be_without_a_head_and_no_second_one(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    head = tmp_path / "audit.jsonl.head"
    log.append("tool_call", "executed")
    head.unlink()
    assert log.verify() == 1
    log.append("tool_call", "executed")
    assert log.verify() == 2
    head.unlink()
    with pytest.raises(PlatformError, match="is missing"):
        log.verify()


def test_a_line_whose_head_was_not_written_any_more_counts(log: AuditLog) -> None:
    head = log.path.parent / "audit.jsonl.head"
    before = head.read_bytes()
    log.append("tool_call", "executed", tool="list_tasks")
    head.write_bytes(before)
    log.append("tool_call", "executed", tool="list_tasks")
    assert log.verify() == 6


def test_lines_longer_than_a_block_are_read_from_the_end(log: AuditLog) -> None:
    log.append("tool_call", "executed", arguments={"title": "x" * 200_000})
    log.append("tool_call", "executed", arguments={"title": "short"})
    assert [len(str(entry.arguments)) for entry in log.recent(timedelta(minutes=1))][:2] == [18, 200_013]
    assert log.verify() == 6


def _append_many(path: Path) -> None:
    log = AuditLog(path)
    for number in range(20):
        log.append("tool_call", "executed", arguments={"n": number})


def test_processes_that_append_at_once_keep_the_chain_whole(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    workers = [multiprocessing.get_context("fork").Process(target=_append_many, args=(path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert AuditLog(path).verify() == 60
