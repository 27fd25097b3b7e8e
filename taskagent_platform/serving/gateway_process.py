"""The gateway's process: detached, known again by pid, boot and start, and ended alone."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from taskagent_platform.artifacts import code_version
from taskagent_platform.errors import PlatformError
from taskagent_platform.process_identity import boot_id, living_process, start_ticks
from taskagent_platform.serving.active import active_file, endpoint_url
from taskagent_platform.serving.server import check_port
from taskagent_platform.settings import Settings

_START_TIMEOUT_S = 60.0
_STOP_PATIENCE_S = 35.0
_POLL_S = 0.1


class GatewayProcess(BaseModel):
    """A gateway that was started, as its record says.

    Attributes:
        pid: its process.
        create_time: when it was started, in clock ticks since the boot; with pid and boot it names one process.
        boot_id: the boot of the machine that the pid belongs to.
        host: where it listens.
        port: where it listens.
        requests_per_minute: its limit for each client.
        log_file: takes its log; what is older is in the file of this name with ``.1``.
        code_version: of the source files that it runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int
    create_time: float
    boot_id: str = ""
    host: str
    port: int
    requests_per_minute: int
    log_file: Path
    code_version: str = ""


def running_gateway(settings: Settings) -> GatewayProcess | None:
    """Returns the profile's gateway where it runs. Raises PlatformError where its record is damaged."""
    record = _read(settings)
    return record if record is not None and _process(record) is not None else None


def start_gateway(settings: Settings) -> GatewayProcess:
    """Returns the running gateway; starts it where none runs, and anew where settings or code changed.

    One that ran before runs on where the other cannot start.

    Raises:
        PlatformError: something else listens on ``serving.port``, or it does not start.
    """
    serving = settings.serving
    running = running_gateway(settings)
    if running is None:
        return _start(settings)
    as_it_runs = {"host": running.host, "port": running.port, "requests_per_minute": running.requests_per_minute}
    before = serving.model_copy(update=as_it_runs)
    if before == serving and running.code_version == _code_version():
        return running
    check_gateway_port(settings)
    stop_gateway(settings)
    try:
        return _start(settings)
    except BaseException:
        # Why the other does not start is what is to be told.
        with suppress(PlatformError):
            _start(settings.model_copy(update={"serving": before}))
        raise


def check_gateway_port(settings: Settings) -> None:
    """Raises PlatformError if the gateway cannot listen where the settings put it.

    Where it has that port already, on whatever host, only its own end would tell.
    """
    running = running_gateway(settings)
    if running is None or running.port != settings.serving.port:
        check_port(settings.serving.host, settings.serving.port)


def stop_gateway(settings: Settings) -> bool:
    """Ends the profile's gateway, after the requests on their way, and returns whether it ran."""
    record = _read(settings)
    process = _process(record) if record is not None else None
    if process is not None:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
            if not _ends(process):
                process.kill()
                _ends(process)
    _record_file(settings).unlink(missing_ok=True)
    return process is not None


def _start(settings: Settings) -> GatewayProcess:
    serving = settings.serving
    check_port(serving.host, serving.port)
    active = active_file(settings)
    active.parent.mkdir(parents=True, exist_ok=True)
    log_file = active.with_name("gateway.log")
    command = [
        sys.executable, "-m", "taskagent_platform.serving.gateway", "--active", str(active), "--host", serving.host,
        "--port", str(serving.port), "--requests-per-minute", str(serving.requests_per_minute),
        "--log-file", str(log_file),
    ]  # fmt: skip
    # It imports this package also where that is used from a checkout that is not installed.
    root = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": search},
            cwd=active.parent,
            start_new_session=True,
        )
    try:
        started = GatewayProcess(
            pid=process.pid,
            create_time=start_ticks(process.pid),
            boot_id=boot_id(),
            host=serving.host,
            port=serving.port,
            requests_per_minute=serving.requests_per_minute,
            log_file=log_file,
            code_version=_code_version(),
        )
        _write(settings, started)
        _wait_until_up(settings, process, log_file)
    except BaseException:
        process.kill()
        process.wait()
        _record_file(settings).unlink(missing_ok=True)
        raise
    return started


def _code_version() -> str:
    # An older gateway cannot read an active.json that has grown a field; the gates are part of that.
    return code_version("serving", "evaluation/gate.py")


def _process(record: GatewayProcess) -> psutil.Process | None:
    return living_process(record.pid, record.create_time, record.boot_id)


def _ends(process: psutil.Process) -> bool:
    """Waits for a process to end; one that its parent does not reap has ended, too."""
    deadline = time.monotonic() + _STOP_PATIENCE_S
    while time.monotonic() < deadline:
        with suppress(ChildProcessError):  # of this process only if it started the gateway
            os.waitpid(process.pid, os.WNOHANG)
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(_POLL_S)
    return False


def _wait_until_up(settings: Settings, process: subprocess.Popen[bytes], log_file: Path) -> None:
    # A proxy of the environment must not answer for this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = endpoint_url(settings).removesuffix("/v1") + "/health"
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log_file.read_text(errors="replace").splitlines() or ["it wrote nothing"]
            raise PlatformError(f"The gateway ended while starting: {lines[-1]} The whole output is in {log_file}.")
        try:
            opener.open(url, timeout=2).close()
            return
        except urllib.error.HTTPError as error:
            with suppress(ValueError, AttributeError):
                # Its own words for having nothing to serve yet.
                if "deployments" in json.load(error):
                    return
        except OSError:
            pass
        time.sleep(_POLL_S)
    raise PlatformError(f"The gateway did not answer at {url} within {_START_TIMEOUT_S:.0f} s; look at {log_file}.")


def _record_file(settings: Settings) -> Path:
    return active_file(settings).with_name("gateway.json")


def _read(settings: Settings) -> GatewayProcess | None:
    path = _record_file(settings)
    try:
        return GatewayProcess.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise PlatformError(f"{path} is damaged ({error}); delete it.") from error


def _write(settings: Settings, record: GatewayProcess) -> None:
    path = _record_file(settings)
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(record.model_dump_json(indent=1))
    scratch.replace(path)
