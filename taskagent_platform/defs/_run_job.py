"""The process that runs a job on the platform's instance: ``python -m taskagent_platform.defs._run_job REQUEST``, JSON.

It leads a process group of its own, so that whoever started it can end it with everything that it started, and asks
the kernel to be told to end when its parent is gone.
"""

import ctypes
import json
import os
import signal
import sys

import dagster as dg
import psutil

from taskagent_platform.launchers.routes import PROCESS_TAG
from taskagent_platform.process_identity import process_mark

_PR_SET_PDEATHSIG = 1


def resolve_job(name: str) -> dg.JobDefinition:
    """Returns a job of the code location."""
    from taskagent_platform.definitions import defs

    return defs.resolve_job_def(name)


def main(name: str, tags: dict[str, str], run_config: dict[str, object], parent: int) -> int:
    """Runs the job; returns 0 if it succeeded."""
    # Whoever started this in the background of a shell passed on that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        return 1
    job = dg.build_reconstructable_job("taskagent_platform.defs._run_job", "resolve_job", (name,))
    with dg.DagsterInstance.get() as instance:
        # From the start: a daemon that watches runs must not take this one for lost.
        marked = {**tags, PROCESS_TAG: process_mark(psutil.Process())}
        result = dg.execute_job(job, instance, run_config=run_config, tags=marked)
    return 0 if result.success else 1


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    sys.exit(main(request["job"], request["tags"], request["run_config"], request["parent"]))
