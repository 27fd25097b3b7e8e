"""Jobs that the launcher's tests send about: what they saw, and how they behave, is said by files in one folder."""

import os
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg

from taskagent_platform.launchers.routes import GPU_POOL

FOLDER_VARIABLE = "GPU_JOBS_FOLDER"


def _folder() -> Path:
    return Path(os.environ[FOLDER_VARIABLE])


def _work(name: str) -> None:
    """Notes what it sees, starts a child, and goes on until the file ``go`` is there."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    attempt = len(list(_folder().glob(f"{name}.*")))
    seen = f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'all')} {os.getpid()} {child.pid}"
    scratch = _folder() / f".{name}"
    scratch.write_text(seen)
    scratch.rename(_folder() / f"{name}.{attempt}")
    while not (_folder() / "go").exists():
        time.sleep(0.1)


@dg.asset(pool=GPU_POOL)
def trained() -> None:
    _work("trained")


@dg.asset
def written() -> None:
    _work("written")


@dg.asset
def stubborn() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _work("stubborn")


defs = dg.Definitions(
    assets=[trained, written, stubborn],
    jobs=[
        dg.define_asset_job("train", [trained]),
        dg.define_asset_job("write", [written]),
        dg.define_asset_job("both", [trained, written]),
        dg.define_asset_job("defy", [stubborn]),
    ],
    executor=dg.in_process_executor,
)


def job(name: str) -> dg.JobDefinition:
    return defs.resolve_job_def(name)
