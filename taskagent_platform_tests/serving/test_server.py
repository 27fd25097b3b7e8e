"""A server's life: started, known again, ended exactly, and never left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from taskagent_platform.artifacts import new_artifact
from taskagent_platform.errors import PlatformError
from taskagent_platform.serving import _supervisor
from taskagent_platform.serving import server as module
from taskagent_platform.serving.server import (
    Server,
    check_port,
    detach,
    free_port,
    last_error,
    memory_held_gib,
    read_server,
    server_command,
    server_environment,
    server_is_alive,
    server_is_healthy,
    start_server,
    stop_server,
    why_ended,
)
from taskagent_platform.settings import Settings, load_settings

STUB = Path(__file__).with_name("stub_vllm.py")
Start = Callable[..., Server]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path / "home"))
    return load_settings(profile="smoke", serving={"start_timeout_s": 60})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    with new_artifact(folder, kind="merged_model", inputs={}, settings={}, code_version="1") as scratch:
        (scratch / "config.json").write_text("{}")
        (scratch / "chat_template.jinja").write_text("x")
        (scratch / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def start(settings: Settings, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    started: list[Server] = []

    def run(mode: str = "serve", settings: Settings = settings, **options: Any) -> Server:
        def command(_: Settings, folder: Path, *, name: str, host: str, port: int) -> list[str]:
            return [sys.executable, str(STUB), mode, str(port), name, str(folder)]

        monkeypatch.setattr(module, "server_command", command)
        monkeypatch.setattr(module, "_check_packages", lambda _: None)
        files = {"log_file": tmp_path / "s.log", "record_file": tmp_path / "s.json"}
        server = start_server(settings, model, name="lights", **{**files, **options})
        started.append(server)
        return server

    yield run
    for server in started:
        stop_server(server, patience_s=1)


def group_of(server: Server) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == server.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def ends(server: Server, within_s: float = 30) -> bool:
    deadline = time.monotonic() + within_s
    while group_of(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not group_of(server)


def test_a_server_is_started_recorded_and_ended_with_its_workers(start: Start, tmp_path: Path) -> None:
    told: list[str] = []
    server = start(on_progress=told.append)
    assert server_is_alive(server)
    assert server_is_healthy(server)
    assert read_server(tmp_path / "s.json") == server
    assert server.base_url == f"http://127.0.0.1:{server.port}/v1"
    assert server.cold_start_s is not None
    assert told
    assert len(group_of(server)) >= 3  # supervisor, API server, worker
    assert memory_held_gib(server) > 0
    assert stop_server(server)
    assert memory_held_gib(server) == 0
    assert group_of(server) == []
    assert not server_is_alive(server)
    assert not (tmp_path / "s.json").exists()
    assert not stop_server(server)


def test_a_server_that_does_not_listen_to_signals_is_killed(start: Start) -> None:
    server = start("stubborn")
    assert stop_server(server, patience_s=1)
    assert ends(server, 5)


def test_a_server_whose_leader_was_killed_is_still_ended(start: Start) -> None:
    server = start("stubborn")
    leader = psutil.Process(server.pid)
    for child in leader.children(recursive=True):
        child.suspend()  # so that they cannot end by themselves when the leader is gone
    leader.kill()
    psutil.wait_procs([leader], timeout=5)
    assert not server_is_alive(server)
    assert stop_server(server, patience_s=1)
    assert ends(server, 5)


def test_a_process_that_only_has_the_pid_is_left_alone(start: Start) -> None:
    server = start()
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        reused = server.model_copy(update={"pid": stranger.pid, "create_time": server.create_time - 500})
        assert not server_is_alive(reused)
        assert not stop_server(reused)
        other_boot = server.model_copy(update={"boot_id": "another"})
        assert not server_is_alive(other_boot)
        assert not stop_server(other_boot)
        assert stranger.poll() is None
        assert server_is_alive(server)
    finally:
        stranger.kill()
        stranger.wait()


def test_a_server_and_its_owner_are_known_again_after_the_clock_was_set(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    booted = psutil.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: booted + 3600)
    assert server_is_alive(server)
    assert _supervisor._is_wanted(server.record_file)
    assert stop_server(server)
    assert ends(server, 5)


OWNER = """
import sys, time
from pathlib import Path
from taskagent_platform.serving import server as module
from taskagent_platform.settings import load_settings
home, model, stub, detached = sys.argv[1:]
module._check_packages = lambda _: None
module.server_command = lambda _, folder, *, name, host, port: [
    sys.executable, stub, "serve", str(port), name, str(folder)]
server = module.start_server(load_settings(profile="smoke"), Path(model), name="lights",
    log_file=Path(home) / "s.log", record_file=Path(home) / "s.json")
if detached == "yes":
    module.detach(server)
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("detached", ["yes", "no"])
def test_a_server_ends_with_its_owner_unless_detached(
    tmp_path: Path, model: Path, settings: Settings, detached: str
) -> None:
    script = [sys.executable, "-c", textwrap.dedent(OWNER), str(tmp_path), str(model), str(STUB), detached]
    owner = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "started\n"
    server = read_server(tmp_path / "s.json")
    assert server is not None
    try:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        owner.stdout.close()
        if detached == "yes":
            time.sleep(3)
            assert server_is_healthy(server)
        else:
            assert ends(server)
    finally:
        stop_server(server, patience_s=1)
    assert group_of(server) == []


def test_an_interrupted_start_leaves_nothing(start: Start, tmp_path: Path) -> None:
    seen: list[Server] = []

    def interrupt(_: str) -> None:
        record = read_server(tmp_path / "s.json")
        assert record is not None
        seen.append(record)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start("hang", on_progress=interrupt)
    assert ends(seen[0], 5)
    assert not (tmp_path / "s.json").exists()


def test_a_server_that_ends_while_loading_is_explained(start: Start, tmp_path: Path) -> None:
    with pytest.raises(PlatformError) as error:
        start("bad_model")
    assert "ended while loading model: ValueError: the weights of layer 3 do not fit" in str(error.value)
    assert str(tmp_path / "s.log") in str(error.value)
    assert not (tmp_path / "s.json").exists()


def test_a_server_that_ends_without_a_word_is_told(start: Start) -> None:
    with pytest.raises(PlatformError, match="ended while loading model: it wrote nothing"):
        start("silent")


def test_a_server_that_is_killed_while_loading_is_said_to_lack_memory(start: Start) -> None:
    with pytest.raises(PlatformError, match=r"ended while loading model: Killed: .*most likely for want of memory"):
        start("killed")


def test_a_server_that_is_killed_later_is_said_to_lack_memory(start: Start) -> None:
    server = start()
    assert why_ended(server, patience_s=0.1) is None
    for child in psutil.Process(server.pid).children():
        child.kill()
    assert "most likely for want of memory" in str(why_ended(server, patience_s=30))


def test_a_server_that_never_answers_is_ended(start: Start, settings: Settings, tmp_path: Path) -> None:
    impatient = settings.serving.model_copy(update={"start_timeout_s": 0.5})
    seen: list[Server | None] = []
    with pytest.raises(PlatformError, match=r"did not answer within 0\.5 s.*START_TIMEOUT_S"):
        start(
            "hang",
            settings=settings.model_copy(update={"serving": impatient}),
            on_progress=lambda _: seen.append(read_server(tmp_path / "s.json")),
        )
    assert seen[0] is not None
    assert ends(seen[0], 5)


def test_another_server_at_the_port_is_not_taken_for_ours(start: Start) -> None:
    with pytest.raises(PlatformError, match="Another server took port"):
        start("imposter")


def test_a_port_in_use_is_named_with_its_process(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            PlatformError, match=rf"127\.0\.0\.1:{port} .*process {os.getpid()}.*TASKAGENT_SERVING__PORT"
        ):
            start(port=port)
    check_port("127.0.0.1", free_port())


@pytest.mark.parametrize("host", ["::1", "::"])
def test_a_port_of_the_newer_internet_protocol_is_looked_at_too(host: str) -> None:
    check_port(host, free_port(host))
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind((host, 0))
        taken.listen()
        with pytest.raises(PlatformError, match=f"Nothing can listen on {host}:{taken.getsockname()[1]} "):
            check_port(host, taken.getsockname()[1])


def test_too_little_memory_is_told_before_anything_starts(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory_gib", lambda: 1.0)
    with pytest.raises(PlatformError, match=r"needs about \d\.\d GiB of memory and 1\.0 GiB are free"):
        start()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "is not a finished artifact"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"other"), "model.safetensors was changed"),
    ],
)
def test_a_model_that_is_not_what_it_was_is_refused(
    start: Start, model: Path, damage: Callable[[Path], Any], said: str
) -> None:
    damage(model)
    with pytest.raises(PlatformError, match=said):
        start()


def test_a_model_without_a_template_is_refused(start: Start, tmp_path: Path, settings: Settings) -> None:
    folder = tmp_path / "bare"
    with new_artifact(folder, kind="merged_model", inputs={}, settings={}, code_version="1") as scratch:
        (scratch / "config.json").write_text("{}")
    with pytest.raises(PlatformError, match=r"holds no chat_template\.jinja"):
        start_server(settings, folder, name="x", log_file=tmp_path / "l", record_file=tmp_path / "r")


def test_a_record_in_use_is_not_overwritten(start: Start) -> None:
    server = start()
    with pytest.raises(PlatformError, match=f"belongs to a running server \\(process {server.pid}\\)"):
        start()
    assert server_is_healthy(server)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(PlatformError, match=r"s\.json is damaged"):
        read_server(tmp_path / "s.json")
    assert read_server(tmp_path / "none.json") is None


def test_detaching_is_recorded(start: Start, tmp_path: Path) -> None:
    server = detach(start())
    assert server.detached
    assert json.loads((tmp_path / "s.json").read_text())["detached"] is True


def test_the_command_asks_for_what_the_platform_relies_on(settings: Settings, model: Path) -> None:
    command = server_command(settings, model, name="lights", host="127.0.0.1", port=1)
    pairs = dict(pairwise(command))
    assert pairs["--tool-call-parser"] == "hermes"
    assert pairs["--chat-template"] == str(model / "chat_template.jinja")
    assert pairs["--host"] == "127.0.0.1"
    assert pairs["--served-model-name"] == "lights"
    assert {"--enable-auto-tool-choice", "--enable-prefix-caching", "--enforce-eager"} <= set(command)


def test_without_a_compiler_nothing_is_compiled(
    settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = settings.model_copy(update={"serving": settings.serving.model_copy(update={"enforce_eager": False})})
    monkeypatch.setattr(module, "_has_compiler", lambda: False)
    assert "--enforce-eager" in server_command(compiled, model, name="x", host="h", port=1)
    monkeypatch.setattr(module, "_has_compiler", lambda: True)
    assert "--enforce-eager" not in server_command(compiled, model, name="x", host="h", port=1)


def test_the_environment_is_offline_without_telemetry_and_keeps_bytecode(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    environment = server_environment(settings)
    assert environment.keys().isdisjoint({"PYTHONDONTWRITEBYTECODE", "VLLM_API_KEY"})
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == environment["HF_HUB_OFFLINE"] == "1"
    assert environment["VLLM_CACHE_ROOT"].startswith(str(settings.home))
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"  # whole GiB only, and never 0, which means half of the memory
    assert environment["VLLM_USE_AOT_COMPILE"] == "0"  # vllm-cpu cannot load what that compiles


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", "it wrote nothing."),
        ("loading\nstill loading\n", "still loading"),
        ("OSError: disk\nlater words\n", "OSError: disk"),
        (
            "api_server.py: error: argument --dtype: invalid choice\n",
            "api_server.py: error: argument --dtype: invalid choice",
        ),
        (
            "(W pid=1) ERROR 11-22 16:40:09 [x.py:1] torch.OutOfMemoryError: no room\nbye",
            "torch.OutOfMemoryError: no room",
        ),
        ("RuntimeError: Engine core initialization failed.", "RuntimeError: Engine core initialization failed."),
    ],
)
def test_the_line_that_says_why(tmp_path: Path, log: str, said: str) -> None:
    (tmp_path / "log").write_text(log)
    assert last_error(tmp_path / "log") == said
