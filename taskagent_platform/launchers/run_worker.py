"""Run workers on this machine: processes that execute one run each, with a lease on GPUs while they live.

A worker is a supervisor (:mod:`taskagent_platform.launchers._run_worker`) and the run's own process below it, in a
process group of their own. Its folder holds ``worker.json`` as long as it runs, ``exit.json`` afterwards, and
``output.log``. The record is the lease, too: a GPU is taken as long as a worker lives that was given it, so that the
leases of dead runs need no clearing up.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from taskagent_platform.errors import PlatformError
from taskagent_platform.launchers.worker_files import EXIT, RECORD, STOP
from taskagent_platform.process_identity import boot_id, living_process, start_ticks
from taskagent_platform.settings import PROJECT_ROOT

RUN_VARIABLE = "TASKAGENT_RUN"
"""Names the run in the environment of everything that it starts."""
FOLDER = "run_workers"
"""Where workers keep their records, inside the instance's folder."""
LOG = "output.log"
_MODULE = "taskagent_platform.launchers._run_worker"
_HEARTBEAT_TIMEOUT_S = 60.0
_KEPT_S = 7 * 24 * 3600.0


class Worker(BaseModel):
    """One worker, as its record says.

    Attributes:
        run_id: the run that it executes.
        attempt: 0 at first, then the number of the resumption.
        host: the machine or container that it runs in; its pid means nothing elsewhere.
        pid: its supervisor's, and its process group's.
        create_time: when it was started, in clock ticks since the boot; with pid and boot it names one process.
        boot_id: the boot of the machine that the pid belongs to.
        gpus: the GPUs that are its own while it lives.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    attempt: int
    host: str
    pid: int
    create_time: float
    boot_id: str = ""
    gpus: tuple[str, ...]


class Ending(BaseModel):
    """How a worker ended.

    Attributes:
        code: its exit status; negative for the signal that ended it.
        asked: whether it had been told to stop.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: int
    asked: bool

    def sentence(self) -> str:
        """Says it in words."""
        if self.code == -signal.SIGKILL and not self.asked:
            return "The run's process was killed (SIGKILL), most likely for want of memory."
        if self.code < 0:
            return f"The run's process was ended by {signal.Signals(-self.code).name}."
        return f"The run's process ended with status {self.code}."


class NoFreeGpuError(PlatformError):
    """Every GPU is leased: a run has to wait."""


class RunWorkers:
    """The workers of one folder; several processes, and containers that share the folder, may work with it.

    Args:
        folder: where workers keep their records.
        gpus: the GPUs that may be leased, as CUDA_VISIBLE_DEVICES takes them.
        patience_s: how long a run that is told to stop may take before its processes are killed.
    """

    def __init__(self, folder: Path, *, gpus: Sequence[str] = (), patience_s: float = 45.0) -> None:
        self.folder = folder
        self._gpus = tuple(gpus)
        self._patience_s = patience_s
        # Dead children stay zombies until they are waited for.
        self._children: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        run_id: str,
        command: Sequence[str],
        *,
        gpus: int = 0,
        attempt: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> Worker:
        """Starts a run's process and leases GPUs to it.

        Args:
            run_id: the run.
            command: its process.
            gpus: how many it needs; with none it sees no GPU that could be leased to another.
            attempt: the number of the resumption, 0 for the first start.
            environment: variables beside those of this process.

        Raises:
            NoFreeGpuError: too few are free now.
            PlatformError: there are too few for it at all.
        """
        if gpus > len(self._gpus):
            raise PlatformError(
                f"The run asks for {gpus} GPUs and there are {len(self._gpus)} to lease ({', '.join(self._gpus)}); "
                "list more under the launcher's gpu.local.gpus, or ask for fewer."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            self._reap()
            taken = self._take(gpus)
            folder = self._folder(run_id, attempt)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            return self._spawn(folder, run_id, attempt, command, taken, environment or {})

    def stop(self, run_id: str) -> bool:
        """Tells a run's worker to stop, wherever it runs, and returns whether there is one.

        The run is interrupted as by Ctrl-C; what is left of its processes after the patience is killed.
        """
        worker = self.find(run_id)
        if worker is None:
            return False
        (self._folder(run_id, worker.attempt) / STOP).touch()
        return True

    def stop_all(self, announce: Callable[[str], None] = lambda run_id: None) -> list[str]:
        """Stops every worker of this machine, waits until they are gone, and returns the ids of their runs.

        Args:
            announce: is told each run before its worker is stopped; a monitoring daemon that has not heard of it would
                take the worker for lost and resume the run.
        """
        stopped = [worker for worker in self._living() if worker.host == socket.gethostname()]
        for worker in stopped:
            # Whatever keeps it from being told, the worker is to end.
            with suppress(Exception):
                announce(worker.run_id)
            self.stop(worker.run_id)
        deadline = time.monotonic() + self._patience_s + 15.0
        while any(self._is_alive(worker) for worker in stopped) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [worker.run_id for worker in stopped]

    def find(self, run_id: str) -> Worker | None:
        """Returns the living worker of a run, or None."""
        self._reap()
        return next((worker for worker in self._living() if worker.run_id == run_id), None)

    def ending(self, run_id: str) -> Ending | None:
        """Returns how the last worker of a run ended; None if it was lost without a word, or there was none."""
        for folder in reversed(self._attempts(run_id)):
            try:
                return Ending.model_validate_json((folder / EXIT).read_bytes())
            except (FileNotFoundError, ValidationError):
                return None
        return None

    def leases(self) -> dict[str, str]:
        """Returns which run holds which GPU."""
        return {gpu: worker.run_id for worker in self._living() for gpu in worker.gpus}

    def log_tail(self, run_id: str, lines: int = 20) -> str:
        """Returns the last lines that a run's process wrote; empty if it wrote nothing."""
        for folder in reversed(self._attempts(run_id)):
            with suppress(FileNotFoundError):
                return "\n".join((folder / LOG).read_text(errors="replace").splitlines()[-lines:])
        return ""

    def clear_up(self, run_id: str) -> None:
        """Kills what a lost worker's process group left running, and removes its record."""
        for folder in self._attempts(run_id):
            worker = _read(folder / RECORD)
            if worker is not None and not self._is_alive(worker):
                self._forget(folder, worker)

    def _take(self, count: int) -> tuple[str, ...]:
        for record in self.folder.glob(f"*/*/{RECORD}"):
            worker = _read(record)
            if worker is not None and not self._is_alive(worker):
                self._forget(record.parent, worker)
        self._forget_old()
        leased = self.leases()
        free = [gpu for gpu in self._gpus if gpu not in leased]
        if len(free) < count:
            holders = ", ".join(f"GPU {gpu} by run {run_id[:8]}" for gpu, run_id in sorted(leased.items()))
            raise NoFreeGpuError(f"{len(free)} of {len(self._gpus)} GPUs are free and {count} are needed: {holders}.")
        return tuple(free[:count])

    def _spawn(
        self,
        folder: Path,
        run_id: str,
        attempt: int,
        command: Sequence[str],
        gpus: tuple[str, ...],
        environment: Mapping[str, str],
    ) -> Worker:
        search = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))
        variables = {**os.environ, **environment, "PYTHONPATH": search, RUN_VARIABLE: run_id}
        if self._gpus:
            # Numbered as nvidia-smi does; without a lease, none is visible.
            variables |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        with (folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(folder), str(self._patience_s), "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
        self._children.append(process)
        worker = Worker(
            run_id=run_id,
            attempt=attempt,
            host=socket.gethostname(),
            pid=process.pid,
            create_time=start_ticks(process.pid),
            boot_id=boot_id(),
            gpus=gpus,
        )
        # The supervisor waits for it: without its record it starts nothing.
        scratch = folder / f"{RECORD}.partial"
        scratch.write_text(worker.model_dump_json())
        scratch.replace(folder / RECORD)
        return worker

    def _living(self) -> Iterator[Worker]:
        for record in sorted(self.folder.glob(f"*/*/{RECORD}")):
            worker = _read(record)
            if worker is not None and self._is_alive(worker):
                yield worker

    def _is_alive(self, worker: Worker) -> bool:
        if worker.host == socket.gethostname():
            return living_process(worker.pid, worker.create_time, worker.boot_id) is not None
        # Another container's processes cannot be seen; its supervisor touches the record as long as it lives.
        try:
            touched = (self._folder(worker.run_id, worker.attempt) / RECORD).stat().st_mtime
        except FileNotFoundError:
            return False
        return time.time() - touched < _HEARTBEAT_TIMEOUT_S

    def _forget(self, folder: Path, worker: Worker) -> None:
        if worker.host == socket.gethostname():
            _kill_group(worker)
        (folder / RECORD).unlink(missing_ok=True)

    def _forget_old(self) -> None:
        for ended in self.folder.glob(f"*/*/{EXIT}"):
            with suppress(OSError):
                if time.time() - ended.stat().st_mtime > _KEPT_S:
                    shutil.rmtree(ended.parent.parent, ignore_errors=True)

    def _reap(self) -> None:
        self._children = [child for child in self._children if child.poll() is None]

    def _attempts(self, run_id: str) -> list[Path]:
        return sorted((self.folder / run_id).glob("*/"), key=lambda folder: int(folder.name))

    def _folder(self, run_id: str, attempt: int) -> Path:
        return self.folder / run_id / str(attempt)


def visible_gpus() -> tuple[str, ...]:
    """Returns the indices of this machine's NVIDIA GPUs; none where no driver answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    return tuple(line.strip() for line in found.stdout.splitlines() if line.strip()) if found.returncode == 0 else ()


def _read(path: Path) -> Worker | None:
    """Returns the worker of a record; None where it has just gone. Raises PlatformError for a damaged one."""
    try:
        return Worker.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise PlatformError(f"{path} is damaged ({error}); delete it once its run has ended.") from error


def _kill_group(worker: Worker) -> None:
    """Kills the processes of a group whose leader is gone; the mark of the run tells them from a later group's."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            ours = os.getpgid(process.pid) == worker.pid
            if ours and process.environ().get(RUN_VARIABLE) == worker.run_id:
                process.kill()
