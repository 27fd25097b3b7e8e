import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from taskagent_platform import process_identity
from taskagent_platform.process_identity import boot_id, living_process, marked_process, process_mark, start_ticks

Odd = subprocess.Popen[bytes]


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Odd]:
    """A process whose name holds what the kernel puts around names."""
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "600"]) as process:
        yield process
        process.kill()


def test_a_process_is_known_again_after_the_clock_was_set(odd: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    process = psutil.Process(odd.pid)
    mark, created = process_mark(process), process.create_time()
    booted = psutil.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: booted + 3600)
    assert psutil.Process(odd.pid).create_time() == pytest.approx(created + 3600)
    assert marked_process(mark) == process


def test_a_process_of_another_start_or_boot_and_one_that_ended_are_not_meant(
    odd: Odd, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks, boot = start_ticks(odd.pid), boot_id()
    assert living_process(odd.pid, ticks, boot) is not None
    assert living_process(odd.pid, ticks - 1, boot) is None
    assert living_process(odd.pid, ticks, "another") is None
    mark = process_mark(psutil.Process(odd.pid))
    monkeypatch.setattr(process_identity, "boot_id", lambda: "another")
    assert marked_process(mark) is None
    monkeypatch.undo()
    odd.kill()
    os.waitid(os.P_PID, odd.pid, os.WEXITED | os.WNOWAIT)
    assert marked_process(mark) is None
    odd.wait()
    with pytest.raises(psutil.NoSuchProcess):
        start_ticks(odd.pid)


def test_marks_of_former_releases_name_no_process(odd: Odd) -> None:
    assert marked_process(f"{odd.pid}@{psutil.Process(odd.pid).create_time():.2f}") is None
