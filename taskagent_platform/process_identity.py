"""Which process a record means: a pid names one for good only together with the boot and the moment of its start.

The moment is counted in the kernel's clock ticks since the boot, which setting the clock does not move, as it moves the
date that this makes.
"""

import re
from pathlib import Path

import psutil

_MARK = re.compile(r"(\d+)@(\d+)@([\w-]*)")
# Counted from the process's state, the third field of /proc/PID/stat.
_START_TICKS = 19


def boot_id() -> str:
    """Returns the id of this boot of the machine; empty where the kernel tells none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def start_ticks(pid: int) -> int:
    """Returns when a process was started, in clock ticks since the boot.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    # The command's name before it stands in parentheses and may hold spaces and parentheses itself.
    return int(stat.rpartition(b")")[2].split()[_START_TICKS])


def living_process(pid: int, ticks: float, boot: str) -> psutil.Process | None:
    """Returns the process of that pid if it is the one that was started then and still runs; a zombie has ended.

    Args:
        pid: the process.
        ticks: when it was started, in clock ticks since the boot.
        boot: that boot's id.
    """
    try:
        process = psutil.Process(pid)
        same = (start_ticks(pid), boot_id()) == (ticks, boot)
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def process_mark(process: psutil.Process) -> str:
    """Returns what names one process for good, as a text that fits into a run's tag."""
    return f"{process.pid}@{start_ticks(process.pid)}@{boot_id()}"


def marked_process(mark: str) -> psutil.Process | None:
    """Returns the living process that a mark names, or None."""
    match = _MARK.fullmatch(mark)
    return living_process(int(match[1]), int(match[2]), match[3]) if match else None
