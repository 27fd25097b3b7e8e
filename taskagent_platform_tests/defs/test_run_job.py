"""The process that runs a job for the command line."""

import os
import subprocess
import sys

import dagster as dg

from taskagent_platform.launchers.routes import PROCESS_TAG

PROGRAM = """
import os, sys
import dagster as dg
from taskagent_platform.defs import _run_job
from taskagent_platform.launchers.routes import PROCESS_TAG

@dg.op
def seen(context):
    print(os.getpid(), context.run.tags[PROCESS_TAG], flush=True)

@dg.job(executor_def=dg.in_process_executor)
def look():
    seen()

_run_job.resolve_job = lambda name: look
sys.exit(_run_job.main("look", {"asked": "yes"}, {}, os.getppid() + int(sys.argv[1])))
"""


def run(home: str, stranger: int = 0) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "DAGSTER_HOME": home}
    command = [sys.executable, "-c", PROGRAM, str(stranger)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_run_names_its_process_from_the_start(tmp_path):
    done = run(str(tmp_path))
    assert done.returncode == 0, done.stderr
    pid, mark = done.stdout.split()
    assert mark.startswith(f"{pid}@")
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        (made,) = instance.get_runs()
    assert (made.tags["asked"], made.tags[PROCESS_TAG]) == ("yes", mark)


def test_a_process_whose_starter_is_gone_runs_nothing(tmp_path):
    assert run(str(tmp_path), stranger=1).returncode == 1
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert not instance.get_runs()
