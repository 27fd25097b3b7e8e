"""Runs one model server as its child, and ends it when the process that it was started for is gone.

Run as ``python -m taskagent_platform.serving._supervisor RECORD -- COMMAND ...``. It leads a session of its own, so
that its process group is the model server with all its workers. Until the record says ``detached``, the server
belongs to the process named as ``owner_pid`` there: when that one ends, even by SIGKILL, the whole group is ended.

Starts for every server and stays beside it, so it imports no more than the standard library and psutil.
"""

import ctypes
import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from taskagent_platform.process_identity import living_process

_POLL_S = 1.0
_PATIENCE_S = 15.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(record_file: Path, command: list[str]) -> int:
    """Runs the command and returns its exit status, or 143 when it was ended with its owner."""
    # Workers whose parent was killed come to this process, which ends and reaps them.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child = subprocess.Popen(command, preexec_fn=_die_with_parent)

    def forward(signum: int, _frame: FrameType | None) -> None:
        child.send_signal(signum)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    wanted = True
    while child.poll() is None:
        try:
            child.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            wanted = _is_wanted(record_file)
            if not wanted:
                print("The process that this model server was started for is gone: ending it.", flush=True)
                _end(child)
    if child.returncode == -signal.SIGKILL and wanted:
        # The kernel says so nowhere that the server's user would look.
        print("Killed: SIGKILL ended the model server, most likely for want of memory.", flush=True)
    _end_children()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _is_wanted(record_file: Path) -> bool:
    try:
        record = json.loads(record_file.read_text())
    except FileNotFoundError:
        return False
    if record["detached"]:
        return True
    return living_process(record["owner_pid"], record["owner_create_time"], record["boot_id"]) is not None


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        _end_children()


def _end_children() -> None:
    """Kills and reaps everything below this process, so that nothing is left to an init that may not reap."""
    deadline = time.monotonic() + _PATIENCE_S
    while (children := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=1)


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    separator = sys.argv.index("--")
    # The record is written by the parent right after this process starts.
    deadline = time.monotonic() + _PATIENCE_S
    path = Path(sys.argv[1])
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    sys.exit(main(path, sys.argv[separator + 1 :]))
