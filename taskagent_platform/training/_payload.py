"""The process that works on weights: ``python -m taskagent_platform.training._payload spec.json``.

Progress, result and error go to standard output as JSON lines; whatever else a library prints goes to standard error.
Where several processes train together, this one becomes accelerate's launcher, which starts this module once for each;
the first of them speaks for all.
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn, TextIO

from taskagent_platform.errors import PlatformError
from taskagent_platform.training._process import OnLog, record_of

_PR_SET_PDEATHSIG = 1
_LAUNCHER = "TASKAGENT_LAUNCHER"
"""Environment variable of the processes that train together: the pid of their launcher."""


def main() -> int:
    """Runs the task that the specification names; returns the exit code."""
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    launcher = os.environ.get(_LAUNCHER)
    _die_with(spec.pop("parent") if launcher is None else int(launcher))
    if launcher is None and spec.get("processes", 1) > 1 and not spec["ray_address"]:
        _become_launcher(spec["processes"])
    first = launcher is None or os.environ["RANK"] == "0"
    channel = _take_standard_output()

    def emit(record: dict[str, Any]) -> None:
        if first or "error" in record:
            channel.write(json.dumps(record) + "\n")
            channel.flush()

    task = spec.pop("task")
    try:
        if task == "fine_tune" and spec["ray_address"]:
            from taskagent_platform.training._ray import train as train_on_ray

            result = train_on_ray(spec, emit)
        elif task == "fine_tune":
            result = train_here(spec, emit)
        elif task == "held_out_loss":
            from taskagent_platform.training._held_out import held_out_loss

            result = held_out_loss(spec, emit)
        elif task == "base_model":
            from taskagent_platform.training._base_model import write_base_model

            result = write_base_model(spec)
        elif task == "merge":
            from taskagent_platform.training._merge import merge_adapter

            result = merge_adapter(spec, emit)
        else:
            raise PlatformError(f"The payload knows no task {task!r}.")
    except PlatformError as error:
        emit(record_of(error))
        return 2
    emit({"result": result})
    return 0


def train_here(spec: dict[str, Any], emit: OnLog) -> dict[str, Any]:
    """Trains in this process, which may be one of several; returns the details."""
    if spec["settings"]["backend"] == "unsloth":
        # Unsloth patches transformers and TRL while it is imported, so it must come before them.
        from taskagent_platform.training._unsloth import train as train_with_unsloth

        return train_with_unsloth(spec, emit)
    from taskagent_platform.training._trainer import train

    return train(spec, emit)


def _become_launcher(processes: int) -> NoReturn:
    """Turns this process, with its parent and its standard output, into accelerate's launcher."""
    threads = str(max(1, int(os.environ["OMP_NUM_THREADS"]) // processes))
    variables = {_LAUNCHER: str(os.getpid()), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [
        # Without --multi_gpu accelerate starts one process where it sees no GPU.
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
        "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--module", __spec__.name, sys.argv[1],
    ]  # fmt: skip
    os.execve(sys.executable, command, {**os.environ, **variables})


def _die_with(parent: int) -> None:
    """Asks the kernel to kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _take_standard_output() -> TextIO:
    """Keeps standard output for records and sends everything else that is printed to standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


if __name__ == "__main__":
    sys.exit(main())
