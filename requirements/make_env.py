"""Makes `.venv` from the lock of this machine: `python3 requirements/make_env.py` (or `make env`).

Needs nothing but Python >= 3.11 and pip or uv. Variables that it reads:

- ``TASKAGENT_PROFILE``: ``cpu`` takes the CPU lock on a machine with a GPU, ``gpu`` the GPU lock without one;
- ``UV_FIND_LINKS`` or ``PIP_FIND_LINKS``: places with wheels; a CPU build of torch there is taken;
- ``TASKAGENT_TORCH_INDEX``: an index with the CPU build of torch; without it, PyTorch's own CPU index;
- ``UV_TORCH_BACKEND``: with a GPU, another CUDA build of torch (``auto`` suits it to the driver);
- ``UV_DEFAULT_INDEX`` or ``PIP_INDEX_URL``, ``UV_INDEX`` or ``PIP_EXTRA_INDEX_URL``, ``SSL_CERT_FILE`` or
  ``PIP_CERT``: where packages come from.
"""

import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from tempfile import TemporaryFile

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".made-from"
PRIVATE_UV = ROOT / ".venv-uv"
OLDEST_UV = (0, 7)
PYTHONS = ((3, 11), (3, 13))
"""Oldest and newest Python that the locks hold for."""
BUILT_HERE = ("arctic-inference",)
"""Packages without wheels. Built by themselves they would download a CUDA build of torch to build against."""
DISK_GIB = {"cpu": 8, "gpu": 25}
"""Free space needed: the environment and the downloads that it is made of."""
# pip names a setting by one variable, uv by another; whoever has set pip up has said enough.
PIP_SETTINGS = {
    "UV_FIND_LINKS": "PIP_FIND_LINKS",
    "UV_DEFAULT_INDEX": "PIP_INDEX_URL",
    "UV_INDEX": "PIP_EXTRA_INDEX_URL",
    "SSL_CERT_FILE": "PIP_CERT",
}
CAUSES = {
    r"No space left on device": "The disk is full: free some space and run `make env` again.",
    r"error sending request|dns error|Could not connect|timed out|Failed to fetch|Connection": (
        "A package could not be downloaded: check the network (and UV_DEFAULT_INDEX, UV_FIND_LINKS or "
        "TASKAGENT_TORCH_INDEX where packages come from elsewhere), then run `make env` again."
    ),
    r"only found wheels|no wheels with a matching|has no wheels|No solution found|not found in the package registry": (
        "A package of the lock is not to be had for this Python and system: use Python 3.11 on Linux."
    ),
}


class SetupError(Exception):
    """What is wrong and what to do, in one sentence."""


def main() -> None:
    """Makes or updates the environment, unless it is as its stamp says."""
    check_system()
    lock = choose_lock()
    finished = stamp_text(lock)
    if STAMP.exists() and STAMP.read_text() == finished:
        return
    check_disk(lock)
    environment = uv_environment(lock)
    uv = find_uv(environment)
    make_venv(uv, environment, lock)
    pins = [line for line in lock_file(lock).read_text().splitlines() if "==" in line]
    torch = [pin for pin in pins if "+cpu" in pin]
    built = [pin for pin in pins if pin.split("==")[0] in BUILT_HERE]
    ready = [pin for pin in pins if pin not in torch and pin not in built]
    # No dependencies: the lock is whole, and some packages ask for more than is used (see overrides-*.txt).
    install = [uv, "pip", "install", "--no-deps"]
    if torch:
        say(f"Installing {', '.join(torch)}")
        run_uv([*install, *torch, *torch_source(environment)], environment)
    say(f"Installing {len(ready)} packages (several GB on disk, minutes of downloads the first time)")
    run_uv([*install, "-r", "-"], environment, "\n".join(ready))
    if built and compiler():
        say(f"Compiling {', '.join(built)}")
        run_uv([*install, "--no-build-isolation", *built], environment)
    elif built:
        say(
            f"Left out {', '.join(built)}: there is no C++ compiler, or no Python headers. Everything works, answers "
            "take longer; install both (Debian and Ubuntu: g++ and python3-dev), then run `make env` again."
        )
    run_uv([*install, "-e", str(ROOT)], environment)
    STAMP.write_text(finished)
    say(f"The environment is ready: {VENV.name} ({lock}).")


def check_system() -> None:
    """Refuses a Python or a system that the locks do not hold for."""
    oldest, newest = PYTHONS
    if not oldest <= sys.version_info[:2] <= newest:
        raise SetupError(
            f"Python {platform.python_version()} does not suit: install Python {_dotted(oldest)} to {_dotted(newest)} "
            "and run `make env PYTHON=python3.11`."
        )
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise SetupError(
            f"The locks hold for Linux on x86_64, not for {platform.system()} on {platform.machine()}: a virtual "
            "machine or WSL 2 will do."
        )


def choose_lock() -> str:
    """Returns ``cpu`` or ``gpu``: as the profile says, else as the machine is."""
    profile = os.environ.get("TASKAGENT_PROFILE")
    if profile in ("cpu", "gpu"):
        return profile
    program = shutil.which("nvidia-smi")
    if program is None:
        return "cpu"
    found = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, check=False)
    return "gpu" if found.returncode == 0 and found.stdout.strip() else "cpu"


def check_disk(lock: str) -> None:
    """Refuses a disk that a new environment would not fit on."""
    if VENV.exists():
        return
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < DISK_GIB[lock]:
        raise SetupError(f"Only {free:.1f} GiB of disk are free here and {DISK_GIB[lock]} are needed: free some space.")


def uv_environment(lock: str) -> dict[str, str]:
    """Returns the variables that uv runs with: this process's, completed from pip's."""
    environment = dict(os.environ)
    for uv_name, pip_name in PIP_SETTINGS.items():
        if pip_name in os.environ:
            value = os.environ[pip_name]
            if uv_name == "UV_FIND_LINKS":
                value = ",".join(value.split())
            environment.setdefault(uv_name, value)
    if lock == "gpu" and cpu_torch(environment):
        # `torch==2.13.0` is satisfied by 2.13.0+cpu too, and that would win.
        del environment["UV_FIND_LINKS"]
    if lock == "cpu":
        environment.pop("UV_TORCH_BACKEND", None)
    environment["VIRTUAL_ENV"] = str(VENV)
    environment["PATH"] = os.pathsep.join([str(VENV / "bin"), environment["PATH"]])
    return environment


def cpu_torch(environment: dict[str, str]) -> bool:
    """Tells whether a folder of wheels holds a CPU build of torch for this Python."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    folders = [Path(place.removeprefix("file://")) for place in environment.get("UV_FIND_LINKS", "").split(",")]
    return any(next(folder.glob(f"torch-*+cpu-{tag}-*.whl"), None) for folder in folders if folder.is_dir())


def torch_source(environment: dict[str, str]) -> list[str]:
    """Returns uv's options that say where the CPU build of torch comes from."""
    if cpu_torch(environment):
        return []
    if index := environment.get("TASKAGENT_TORCH_INDEX"):
        return ["--default-index", index]
    return ["--torch-backend", "cpu"]


def find_uv(environment: dict[str, str]) -> str:
    """Returns a uv that is new enough: from PATH, else a private one, installed by pip on first use."""
    private = PRIVATE_UV / "bin" / "uv"
    for candidate in (shutil.which("uv"), str(private)):
        if candidate is not None and uv_version(candidate) >= OLDEST_UV:
            return candidate
    say(f"Installing uv into {PRIVATE_UV.name}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "--upgrade", "--target", str(PRIVATE_UV), "uv"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode and "No module named pip" in done.stderr:
        raise SetupError(
            f"{sys.executable} has no pip: install it (Debian and Ubuntu: `apt install python3-pip`) or install uv, "
            "then run `make env` again."
        )
    if done.returncode:
        raise SetupError(f"{explain(done.stderr, 'uv could not be installed by pip.')}\n{tail(done.stderr)}")
    return str(private)


def uv_version(program: str) -> tuple[int, ...]:
    """Returns the version of a uv, or an empty tuple where it does not run."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return ()
    match = re.match(r"uv (\d+)\.(\d+)", done.stdout)
    return tuple(map(int, match.groups())) if match and done.returncode == 0 else ()


def make_venv(uv: str, environment: dict[str, str], lock: str) -> None:
    """Makes `.venv`, unless a sound one for the same lock and folder is there, which is then only updated."""
    python = VENV / "bin" / "python"
    origin = f"{lock}\n{ROOT}\n"
    if not (python.exists() and runs(python) and (not STAMP.exists() or STAMP.read_text().startswith(origin))):
        say(f"Creating {VENV.name} with Python {platform.python_version()}")
        options = ["--clear", "--quiet", "--python", sys.executable, "--no-python-downloads"]
        run_uv([uv, "venv", *options, str(VENV)], environment)
    # Interrupted from here on, the environment is gone on with, and is not taken for finished.
    STAMP.write_text(origin)


def runs(python: Path) -> bool:
    """Tells whether an environment's Python starts and suits the locks."""
    code = f"import sys; sys.exit(not {PYTHONS[0]} <= sys.version_info[:2] <= {PYTHONS[1]})"
    return subprocess.run([str(python), "-c", code], capture_output=True, check=False).returncode == 0


def run_uv(command: list[str], environment: dict[str, str], requirements: str = "") -> None:
    """Runs uv, shows that it is at work, and turns a failure into a sentence."""
    with TemporaryFile("w+") as given, TemporaryFile("w+", errors="replace") as output:
        given.write(requirements)
        given.seek(0)
        process = subprocess.Popen(command, stdin=given, stdout=output, stderr=output, env=environment, cwd=ROOT)
        try:
            show_progress(process)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        output.seek(0)
        text = output.read()
    if process.returncode:
        cause = explain(text, f"uv could not finish (`uv {' '.join(command[1:4])}`).")
        raise SetupError(f"{cause}\n{tail(text)}")


def show_progress(process: subprocess.Popen[bytes]) -> None:
    """Waits for uv; tells the time every second on a terminal, every half minute elsewhere."""
    start = time.monotonic()
    live = sys.stdout.isatty()
    while True:
        try:
            process.wait(timeout=1 if live else 30)
        except subprocess.TimeoutExpired:
            passed = f"  … {time.monotonic() - start:.0f} s"
            print(f"\r{passed}" if live else passed, end="" if live else "\n", flush=True)
        else:
            if live:
                print("\r\033[K", end="", flush=True)
            return


def explain(output: str, otherwise: str) -> str:
    """Returns the sentence for a failure that is known by its output."""
    return next((sentence for pattern, sentence in CAUSES.items() if re.search(pattern, output)), otherwise)


def tail(output: str, lines: int = 12) -> str:
    """Returns the end of a program's output, indented."""
    return "\n".join(f"    {line}" for line in output.strip().splitlines()[-lines:])


def compiler() -> str | None:
    """Returns the C++ compiler that can build Python extensions here, if any."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return None
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)


def lock_file(lock: str) -> Path:
    """Returns the file of a lock."""
    return ROOT / "requirements" / f"{lock}.txt"


def stamp_text(lock: str) -> str:
    """Returns what the stamp of a finished environment says: its lock, its folder, what it was made from."""
    inputs = (lock_file(lock), ROOT / "pyproject.toml", Path(__file__))
    sha = hashlib.sha256(b"\0".join(path.read_bytes() for path in inputs))
    return f"{lock}\n{ROOT}\n{sha.hexdigest()}\ncompiler: {compiler()}\n"


def say(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


if __name__ == "__main__":
    # `kill` ends like Ctrl-C, so that no download is left running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except SetupError as error:
        sys.exit(f"make env: {error}")
    except KeyboardInterrupt:
        sys.exit("make env: interrupted; run it again to go on.")
