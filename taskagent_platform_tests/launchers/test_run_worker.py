"""Run workers with processes that cost nothing: leases, stopping, killing, and what is told of an end."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from taskagent_platform.errors import PlatformError
from taskagent_platform.launchers.run_worker import LOG, RUN_VARIABLE, NoFreeGpuError, RunWorkers
from taskagent_platform.launchers.worker_files import RECORD

TIMEOUT_S = 60.0
# Notes its GPUs, its run and its own and its child's pid, then sleeps.
NOTE = (
    "import os, pathlib, subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    f"seen = [os.environ.get('CUDA_VISIBLE_DEVICES', 'all'), os.environ['{RUN_VARIABLE}'], os.getpid(), child.pid]\n"
    "path = pathlib.Path(sys.argv[1])\n"
    "path.with_suffix('.part').write_text(' '.join(map(str, seen)))\n"
    "path.with_suffix('.part').rename(path)\n"
    "time.sleep(600)\n"
)
DEFY = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"


@pytest.fixture
def workers(tmp_path) -> Iterator[RunWorkers]:
    made = RunWorkers(tmp_path / "workers", gpus=("0", "1"), patience_s=2.0)
    yield made
    made.stop_all()


def start(workers: RunWorkers, run_id: str, *, program: str = NOTE, **more: Any) -> Any:
    return workers.start(run_id, [sys.executable, "-c", program, str(note(workers, run_id))], **more)


def note(workers: RunWorkers, run_id: str) -> Path:
    return workers.folder.parent / f"{run_id}.txt"


def seen(workers: RunWorkers, run_id: str) -> tuple[str, str, int, int]:
    wait_for(note(workers, run_id).exists)
    gpus, run, pid, child = note(workers, run_id).read_text().split(" ")
    return gpus, run, int(pid), int(child)


def wait_for(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_gpus_are_leased_one_by_one_until_none_is_free(workers):
    start(workers, "first", gpus=1)
    start(workers, "second", gpus=1)
    assert workers.leases() == {"0": "first", "1": "second"}
    assert seen(workers, "first")[:2] == ("0", "first")
    assert seen(workers, "second")[:2] == ("1", "second")
    with pytest.raises(NoFreeGpuError, match="0 of 2 GPUs are free and 1 are needed: GPU 0 by run first"):
        start(workers, "third", gpus=1)
    start(workers, "other")
    assert seen(workers, "other")[0] == "", "a run without a lease sees no GPU that another may hold"


def test_more_gpus_than_there_are_is_no_matter_of_waiting(workers):
    with pytest.raises(PlatformError, match="asks for 3 GPUs and there are 2") as raised:
        start(workers, "greedy", gpus=3)
    assert not isinstance(raised.value, NoFreeGpuError)


def test_a_machine_without_gpus_leaves_the_environment_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    workers = RunWorkers(tmp_path / "workers", patience_s=2.0)
    try:
        start(workers, "run")
        assert seen(workers, "run")[0] == "7"
    finally:
        workers.stop_all()


def test_a_stopped_run_ends_with_its_children_and_gives_its_gpus_back(workers):
    start(workers, "run", gpus=2)
    _, _, pid, child = seen(workers, "run")
    assert workers.stop("run")
    wait_for(lambda: workers.find("run") is None)
    wait_for(lambda: is_gone(pid) and is_gone(child))
    assert workers.leases() == {}
    ending = workers.ending("run")
    assert ending is not None
    assert ending.asked
    assert not workers.stop("run")


def test_a_run_is_stopped_also_where_nobody_can_be_told(workers):
    start(workers, "run")
    _, _, pid, child = seen(workers, "run")

    def fail(run_id: str) -> None:
        raise OSError("the database does not answer")

    assert workers.stop_all(fail) == ["run"]
    wait_for(lambda: is_gone(pid) and is_gone(child))


def test_a_run_that_ignores_the_interrupt_is_killed(workers):
    start(workers, "run", program=DEFY + NOTE)
    _, _, pid, child = seen(workers, "run")
    workers.stop("run")
    wait_for(lambda: is_gone(pid) and is_gone(child))
    wait_for(lambda: workers.ending("run") is not None)
    ending = workers.ending("run")
    assert ending is not None
    assert (ending.code, ending.asked) == (-signal.SIGKILL, True)


def test_a_killed_run_is_said_to_lack_memory(workers):
    start(workers, "run", gpus=1)
    _, _, pid, child = seen(workers, "run")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: workers.ending("run") is not None)
    ending = workers.ending("run")
    assert ending is not None
    assert "most likely for want of memory" in ending.sentence()
    assert workers.leases() == {}
    wait_for(lambda: is_gone(child))


def test_the_lease_of_a_lost_worker_is_taken_back_and_its_processes_are_ended(workers):
    lost = start(workers, "lost", gpus=2)
    _, _, pid, child = seen(workers, "lost")
    os.kill(lost.pid, signal.SIGKILL)
    wait_for(lambda: is_gone(lost.pid) and is_gone(pid))
    assert not is_gone(child), "the kernel ends the run's own process with its supervisor, not what that started"
    start(workers, "next", gpus=2)
    assert workers.leases() == {"0": "next", "1": "next"}
    wait_for(lambda: is_gone(child))
    assert workers.ending("lost") is None


def test_a_pid_that_another_process_got_is_no_worker(workers):
    worker = start(workers, "run", gpus=1)
    seen(workers, "run")
    record = workers.folder / "run" / "0" / RECORD
    forged = worker.model_copy(update={"pid": os.getpid(), "create_time": 1.0})
    kept = record.read_text()
    record.write_text(forged.model_dump_json())
    assert workers.leases() == {}
    record.write_text(kept)
    assert workers.leases() == {"0": "run"}


def test_a_worker_is_known_again_after_the_clock_was_set(workers, monkeypatch):
    start(workers, "run", gpus=1)
    seen(workers, "run")
    booted = psutil.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: booted + 3600)
    assert workers.leases() == {"0": "run"}


def test_a_worker_of_another_container_lives_as_long_as_it_touches_its_record(workers):
    worker = start(workers, "run", gpus=1)
    seen(workers, "run")
    record = workers.folder / "run" / "0" / RECORD
    kept = record.read_text()
    record.write_text(worker.model_copy(update={"host": "elsewhere"}).model_dump_json())
    assert workers.leases() == {"0": "run"}
    os.utime(record, (0, 0))
    assert workers.leases() == {}
    record.write_text(kept)


def test_a_run_that_ended_by_itself_says_with_what_status_and_what_it_wrote(workers):
    start(workers, "run", program="print('no bulb')\nraise SystemExit(3)")
    wait_for(lambda: workers.ending("run") is not None)
    ending = workers.ending("run")
    assert ending is not None
    assert ending.sentence() == "The run's process ended with status 3."
    assert workers.log_tail("run") == "no bulb"
    assert (workers.folder / "run" / "0" / LOG).exists()
    assert workers.find("run") is None
