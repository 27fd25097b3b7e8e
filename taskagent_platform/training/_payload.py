"""The process that trains or merges: ``python -m taskagent_platform.training._payload spec.json``.

Progress, result and error go to standard output as JSON lines; whatever else a library prints goes to standard error.
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

from taskagent_platform.errors import PlatformError

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Runs the task that the specification names; returns the exit code."""
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    _die_with(spec.pop("parent"))
    channel = _take_standard_output()

    def emit(record: dict[str, Any]) -> None:
        channel.write(json.dumps(record) + "\n")
        channel.flush()

    task = spec.pop("task")
    try:
        if task == "fine_tune" and spec["settings"]["backend"] == "unsloth":
            # Unsloth patches transformers and TRL while it is imported, so it must come before them.
            from taskagent_platform.training._unsloth import train as train_with_unsloth

            result = train_with_unsloth(spec, emit)
        elif task == "fine_tune":
            from taskagent_platform.training._trainer import train

            result = train(spec, emit)
        elif task == "merge":
            from taskagent_platform.training._merge import merge_adapter

            result = merge_adapter(spec, emit)
        else:
            raise PlatformError(f"The payload knows no task {task!r}.")
    except PlatformError as error:
        emit({"error": str(error)})
        return 2
    emit({"result": result})
    return 0


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
