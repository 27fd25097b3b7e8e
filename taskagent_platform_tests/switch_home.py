"""A home folder for the domain of lamps, and the platform's processes that work in it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from taskagent_platform.serving.server import free_port
from taskagent_platform_tests.switch_base import make_switch_base
from taskagent_platform_tests.switch_domain import SWITCHES

ROOT = Path(__file__).resolve().parent.parent
# Several trainings and model servers on a busy machine.
_TIMEOUT_S = 2400


@contextmanager
def switch_home(folder: Path, domain: str, data: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yields the variables that every process in this home runs with; afterwards, nothing of it runs any more.

    Args:
        folder: an empty one; the home is made in it.
        domain: where the domain is to be imported from, as an entry point says it.
        data: how many examples of each source.
    """
    # The domain is offered as another package would: by an entry point.
    package = folder / "site" / "switches-0.1.dist-info"
    package.mkdir(parents=True)
    make_switch_base(folder / "base")
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: switches\nVersion: 0.1\n")
    (package / "entry_points.txt").write_text(f"[taskagent.domains]\n{SWITCHES.name} = {domain}\n")
    made = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("TASKAGENT_", "DAGSTER_"))},
        "PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT)]),
        "TASKAGENT_HOME": str(folder / "home"),
        "TASKAGENT_PROFILE": "smoke",
        "TASKAGENT_DOMAIN": SWITCHES.name,
        "TASKAGENT_SERVING__PORT": str(free_port()),
        "TASKAGENT_BASE_MODEL__SOURCE": str(folder / "base"),
        # Two calls are 78 tokens of the small vocabulary.
        "TASKAGENT_SERVING__MAX_TOKENS": "96",
        "TASKAGENT_TRAINING__EPOCHS": "4",
        "TASKAGENT_TRAINING__LEARNING_RATE": "3e-3",
        **{f"TASKAGENT_DATA__{name}": value for name, value in data.items()},
    }
    yield made
    taskagent(made, "stop")
    left = left_over(made)
    for process in started_here(made):
        process.kill()
    assert left == []


def taskagent(environment: dict[str, str], *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """Runs the command line in a home, with more variables if given."""
    return subprocess.run(
        [sys.executable, "-m", "taskagent_platform.cli", *arguments],
        env={**environment, **more},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )


def started_here(environment: dict[str, str]) -> list[psutil.Process]:
    """Returns the processes that run on this home folder."""
    found = []
    for process in psutil.process_iter():
        try:
            here = process.environ().get("TASKAGENT_HOME") == environment["TASKAGENT_HOME"]
            if here and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def left_over(environment: dict[str, str]) -> list[str]:
    """Returns the commands of the processes that still run when those that were told to end have had time to."""
    deadline = time.monotonic() + 10
    while (left := started_here(environment)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [" ".join(process.cmdline()) for process in left if process.is_running()]
