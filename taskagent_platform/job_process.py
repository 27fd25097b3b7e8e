"""A job run in a process of its own, watched through the instance, and ended without leaving anything behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import uuid4

import psutil

from taskagent_platform.defs.instance import instance_environment
from taskagent_platform.process_identity import marked_process, process_mark
from taskagent_platform.serving.server import read_server, stop_server
from taskagent_platform.settings import PROJECT_ROOT, Settings

if TYPE_CHECKING:  # printing the command line's help must not wait for Dagster
    from dagster import DagsterInstance, EventLogEntry

_MODULE = "taskagent_platform.defs._run_job"
_REQUEST_TAG = "taskagent/request"
_POLL_S = 0.5
_BATCH = 500
_PATIENCE_S = 45.0
_END_PATIENCE_S = _PATIENCE_S + 15.0
_JOBS = "jobs"
"""Folder of the home that names, for every job that runs, the process that waits for it."""
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class JobProcess:
    """A run of a job that was asked for; made by :func:`start_job`."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", instance: "DagsterInstance", request: str, log: Path
    ) -> None:
        self.process = process
        self.log = log
        self._instance = instance
        self._request = request
        self._cursor: str | None = None
        self.run_id: str | None = None

    def events(self) -> Iterator["EventLogEntry | None"]:
        """Yields the run's events as they come, and None whenever there is no new one, until the process ends."""
        while True:
            ended = self.process.poll() is not None
            yield from self._new_events()
            if ended:
                return
            yield None
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_POLL_S)

    def _new_events(self) -> Iterator["EventLogEntry"]:
        if self.run_id is None:
            from dagster import RunsFilter

            runs = self._instance.get_runs(filters=RunsFilter(tags={_REQUEST_TAG: self._request}), limit=1)
            if not runs:
                return
            self.run_id = runs[0].run_id
        while True:
            page = self._instance.get_records_for_run(self.run_id, cursor=self._cursor, limit=_BATCH)
            self._cursor = page.cursor
            for record in page.records:
                yield record.event_log_entry
            if not page.has_more:
                return

    def close(self) -> None:
        """Records that the run has ended, where its process could not do so itself."""
        for _ in self._new_events():
            pass
        run = self._instance.get_run_by_id(self.run_id) if self.run_id is not None else None
        if run is not None and not run.is_finished:
            self._instance.report_run_canceled(run, message="The process of this run was ended before it finished.")

    def last_words(self) -> str:
        """Returns the last line that the process wrote, for a run that ended without an event that says why."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it wrote nothing"


@contextmanager
def start_job(
    settings: Settings,
    instance: "DagsterInstance",
    job: str,
    *,
    run_config: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[JobProcess]:
    """Starts a job and yields its process; when the block ends, by whatever, the process and all it started are gone.

    What the run has deployed by then stays: deployed servers are not its own any more.

    Raises:
        KeyboardInterrupt: inside the block, also for SIGTERM and SIGHUP.
    """
    request = uuid4().hex
    log = settings.home / "dagster" / "job.log"
    asked = {"job": job, "tags": {_REQUEST_TAG: request}, "run_config": dict(run_config or {}), "parent": os.getpid()}
    environment = instance_environment(settings)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT_ROOT), environment.get("PYTHONPATH")]))
    with _as_keyboard_interrupt(), _recorded(settings, job), log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, json.dumps(asked)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        running = JobProcess(process, instance, request, log)
        try:
            yield running
        finally:
            _end(running, settings, say)


def stop_jobs(settings: Settings) -> list[str]:
    """Interrupts every process that waits for a job, and waits until it has ended the run and itself.

    Returns:
        What was stopped, and what could not be, one text each.
    """
    told = []
    for record in sorted((settings.home / _JOBS).glob("*")):
        try:
            mark = record.read_text()
        except FileNotFoundError:
            continue  # the job has just ended
        process = marked_process(mark)
        if process is None:
            record.unlink(missing_ok=True)
            continue
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            # Taken as Ctrl-C is, which itself passes by what a shell started in the background.
            process.terminate()
        name = f"the run of the job {record.stem} (process {process.pid})"
        deadline = time.monotonic() + _END_PATIENCE_S
        while (goes_on := marked_process(mark) is not None) and time.monotonic() < deadline:
            time.sleep(0.1)
        told.append(f"not {name}: it goes on after {_END_PATIENCE_S:.0f} s" if goes_on else name)
    return told


@contextmanager
def _recorded(settings: Settings, job: str) -> Iterator[None]:
    """Leaves word of this process for :func:`stop_jobs` during the block."""
    record = settings.home / _JOBS / f"{job}.{os.getpid()}"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(process_mark(psutil.Process()))
    try:
        yield
    finally:
        record.unlink(missing_ok=True)


def _end(running: JobProcess, settings: Settings, say: Callable[[str], None]) -> None:
    process = running.process
    # Asked again while it is busy with that, the user means at once.
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        if process.poll() is None:
            say("Stopping the run; its processes are being ended …")
            process.send_signal(signal.SIGINT)
            process.wait(_PATIENCE_S)
    # Asked a third time, it would leave processes behind.
    with _deaf():
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # They lead groups of their own and would end by themselves in a while; whoever waits here wants them gone now.
        for record_file in (settings.home / settings.profile).glob("*/servers/*.json"):
            server = read_server(record_file)
            if server is not None and not server.detached and server.owner_pid == process.pid:
                stop_server(server)
        running.close()


@contextmanager
def _deaf() -> Iterator[None]:
    """Lets no signal but SIGKILL end this process in the block, which is short."""
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in (signal.SIGINT, *_SIGNALS)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _as_keyboard_interrupt() -> Iterator[None]:
    """Lets a termination signal unwind the block as Ctrl-C does."""

    def interrupt(signum: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(signal.Signals(signum).name)

    before = {signum: signal.signal(signum, interrupt) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
