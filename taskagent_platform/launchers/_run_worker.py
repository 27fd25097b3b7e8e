"""Supervises the process of one run: ``python -m taskagent_platform.launchers._run_worker FOLDER PATIENCE -- COMMAND``.

It leads the process group that the run's process and its children belong to. A file ``stop`` in the folder, or
SIGTERM, interrupts the run as Ctrl-C would; after the patience, and whenever the run's process has ended, whatever is
left of the group is killed. Processes that lead groups of their own (a model server that the run deployed) look after
themselves. If this process is killed, the kernel kills the run's with it.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from taskagent_platform.launchers.worker_files import RECORD, STOP, write_ending

_POLL_S = 0.5
_HEARTBEAT_S = 10.0
_RECORD_TIMEOUT_S = 15.0
_NOT_STARTED = 127
_PR_SET_PDEATHSIG = 1


def main(folder: Path, patience_s: float, command: list[str]) -> int:
    """Runs the command to its end and returns its exit status."""
    asked_by_signal = False

    def ask(_signum: int, _frame: FrameType | None) -> None:
        nonlocal asked_by_signal
        asked_by_signal = True

    signal.signal(signal.SIGTERM, ask)
    if not _wait_for_record(folder):
        return 1
    try:
        child = subprocess.Popen(command, preexec_fn=_die_with_parent)
    except OSError as error:
        print(f"The run's process cannot be started: {error}", flush=True)
        write_ending(folder, _NOT_STARTED, asked=False)
        return _NOT_STARTED
    # Whoever is interrupted in the same terminal is not meant.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kill_at: float | None = None
    beat = time.monotonic()
    while True:
        with suppress(subprocess.TimeoutExpired):
            child.wait(_POLL_S)
            break
        if kill_at is None and (asked_by_signal or (folder / STOP).exists()):
            kill_at = time.monotonic() + patience_s
            child.send_signal(signal.SIGINT)
        if kill_at is not None and time.monotonic() > kill_at:
            child.kill()
        if time.monotonic() - beat > _HEARTBEAT_S:
            beat = time.monotonic()
            with suppress(FileNotFoundError):
                os.utime(folder / RECORD)
    _kill_rest_of_group()
    write_ending(folder, child.returncode, kill_at is not None)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _wait_for_record(folder: Path) -> bool:
    deadline = time.monotonic() + _RECORD_TIMEOUT_S
    while not (folder / RECORD).exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _kill_rest_of_group() -> None:
    me = os.getpid()
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if process.pid != me and os.getpgid(process.pid) == me:
                process.kill()


def _die_with_parent() -> None:
    # A background process starts with SIGINT ignored, which is inherited.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    separator = sys.argv.index("--")
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[separator + 1 :]))
