"""Runs a training payload in a process of its own and passes its progress on.

The payload (:mod:`taskagent_platform.training._payload`) gets memory-allocator settings and a thread count that only a
fresh process can take, keeps torch out of the caller, and ends with it.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import PROJECT_ROOT

_ERROR_LINE = re.compile(r"(?:\[rank\d+\]:\s*)?(?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?::|$)")
OnLog = Callable[[dict[str, Any]], None]

_MODULE = "taskagent_platform.training._payload"
# glibc hands large freed blocks back to the kernel and faults them in again at the next step; a third of a training
# step went there. These settings make it keep them.
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(512 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
}


class DivergenceError(PlatformError):
    """A training whose loss grows or is no number: another learning rate may do better."""


def payload_environment(*, may_download: bool = False) -> dict[str, str]:
    """Returns the environment that a payload runs in."""
    variables = payload_variables()
    if may_download:
        del variables["HF_HUB_OFFLINE"]
    return {**os.environ, **variables}


def payload_variables() -> dict[str, str]:
    """Returns the variables that the platform sets for a payload: allocator, threads, no network."""
    threads = str(len(os.sched_getaffinity(0)))
    path = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))
    return {
        **_ALLOCATOR,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "MKL_NUM_THREADS": os.environ.get("MKL_NUM_THREADS", threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
    }


def run_payload(
    task: str,
    spec: Mapping[str, Any],
    log_file: Path,
    on_log: OnLog | None = None,
    *,
    may_download: bool = False,
) -> dict[str, Any]:
    """Runs one task of the payload and waits for its result.

    Args:
        task: the payload's function: ``base_model``, ``fine_tune``, ``held_out_loss`` or ``merge``.
        spec: its arguments, JSON-able.
        log_file: gets everything that the process writes besides its progress.
        on_log: called in this thread with every progress record.
        may_download: whether it may ask the hub for a model.

    Returns:
        The task's result.

    Raises:
        DivergenceError: the loss of a training diverged.
        PlatformError: the task failed; the message is its own, or the last line it wrote.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] | None = None
    failure: PlatformError | None = None
    with TemporaryDirectory() as folder, log_file.open("wb") as log:
        spec_file = Path(folder) / "spec.json"
        spec_file.write_text(json.dumps({"task": task, "parent": os.getpid(), **spec}))
        # A group of its own, so that its children end with it; it also asks the kernel to end it with this process.
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(spec_file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=payload_environment(may_download=may_download),
            start_new_session=True,
            text=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                record = json.loads(line)
                if "result" in record:
                    result = record["result"]
                elif "error" in record:
                    failure = error_of(record)
                elif on_log is not None:
                    on_log(record)
            code = process.wait()
        finally:
            _end_group(process)
    if failure is not None:
        raise failure
    if code == -signal.SIGKILL:
        raise PlatformError(f"The process of {task} was killed, most likely for want of memory; see {log_file}.")
    if code != 0 or result is None:
        raise PlatformError(f"The process of {task} ended with code {code}: {_last_line(log_file)} (all in {log_file})")
    return result


def record_of(error: PlatformError) -> dict[str, Any]:
    """Returns the record by which a payload tells an error."""
    return {"error": str(error), "diverged": isinstance(error, DivergenceError)}


def error_of(record: Mapping[str, Any]) -> PlatformError:
    """Returns the error that :func:`record_of` tells."""
    return (DivergenceError if record["diverged"] else PlatformError)(record["error"])


def _end_group(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(path: Path) -> str:
    """Returns the last line of a log that names an error, which a launcher's summary may follow; else the last one."""
    last, error = "it wrote nothing", None
    with path.open(errors="replace") as file:
        for line in filter(None, map(str.strip, file)):
            last = line
            if _ERROR_LINE.match(line) and "ChildFailedError" not in line:
                error = line
    return error or last
