"""Which process a record means: a pid names one for good only together with the moment the process was created."""

import re

import psutil

CREATE_TIME_TOLERANCE_S = 1.0
"""The creation time is derived from the boot time, which moves when the clock is set."""
_MARK = re.compile(r"(\d+)@(\d+\.\d+)")


def living_process(pid: int, create_time: float) -> psutil.Process | None:
    """Returns the process of that pid if it was created then and still runs; a zombie has ended.

    Args:
        pid: the process.
        create_time: when it was created, in seconds since the epoch.
    """
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - create_time) <= CREATE_TIME_TOLERANCE_S
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def process_mark(process: psutil.Process) -> str:
    """Returns what names one process for good, as a text that fits into a run's tag."""
    return f"{process.pid}@{process.create_time():.2f}"


def marked_process(mark: str) -> psutil.Process | None:
    """Returns the living process that a mark names, or None."""
    match = _MARK.fullmatch(mark)
    return living_process(int(match[1]), float(match[2])) if match else None
