import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from taskagent_platform.errors import PlatformError
from taskagent_platform.serving import gateway_process
from taskagent_platform.serving.gateway_process import running_gateway, start_gateway, stop_gateway
from taskagent_platform.serving.server import free_port
from taskagent_platform.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    settings = load_settings(profile="smoke", serving={"port": free_port()})
    yield settings
    stop_gateway(settings)


def test_the_gateway_starts_once_answers_outlives_the_starter_and_stops(settings: Settings) -> None:
    gateway = start_gateway(settings)
    assert start_gateway(settings) == gateway == running_gateway(settings)
    assert httpx.get(f"http://127.0.0.1:{settings.serving.port}/health", trust_env=False).status_code == 503
    assert os.getsid(gateway.pid) != os.getsid(0)
    assert stop_gateway(settings)
    assert not psutil.pid_exists(gateway.pid)
    assert running_gateway(settings) is None
    assert not stop_gateway(settings)


def test_the_gateway_is_known_again_after_the_clock_was_set(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = start_gateway(settings)
    booted = psutil.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: booted + 3600)
    assert running_gateway(settings) == gateway


def test_a_gateway_of_an_earlier_version_is_replaced(settings: Settings) -> None:
    earlier = start_gateway(settings)
    record = settings.home / "smoke" / "gateway.json"
    record.write_text(earlier.model_copy(update={"code_version": ""}).model_dump_json())
    gateway = start_gateway(settings)
    assert gateway.pid != earlier.pid
    assert not psutil.pid_exists(earlier.pid)
    assert running_gateway(settings) == gateway


def test_the_log_is_moved_aside_when_it_is_full_and_loses_no_line_by_that(settings: Settings) -> None:
    log_file = settings.home / "smoke" / "gateway.log"
    log_file.parent.mkdir(parents=True)
    log_file.write_text("an old line\n" + "x" * ((10 << 20) - 100) + "\n")
    assert start_gateway(settings).log_file == log_file
    for number in range(3):
        httpx.get(f"http://127.0.0.1:{settings.serving.port}/{number}", trust_env=False)
    stop_gateway(settings)
    older = log_file.with_name("gateway.log.1").read_text()
    assert older.startswith("an old line\n")
    assert log_file.stat().st_size < 10_000
    assert all(f"GET '/{number}' 404" in older + log_file.read_text() for number in range(3))


def test_a_port_that_someone_else_uses_is_one_clear_sentence(settings: Settings) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", settings.serving.port))
        other.listen()
        with pytest.raises(PlatformError, match=f"Nothing can listen on 127.0.0.1:{settings.serving.port}"):
            start_gateway(settings)
    assert running_gateway(settings) is None


def moved(settings: Settings, **to: object) -> Settings:
    return settings.model_copy(update={"serving": settings.serving.model_copy(update=to)})


def test_a_gateway_that_cannot_move_goes_on_where_it_is(settings: Settings) -> None:
    gateway = start_gateway(settings)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(PlatformError, match="Nothing can listen"):
            start_gateway(moved(settings, port=other.getsockname()[1]))
    assert running_gateway(settings) == gateway
    # An address for examples, which no machine has; whether the port is free shows only without the gateway.
    with pytest.raises(PlatformError, match=r"Nothing can listen on 192\.0\.2\.1"):
        start_gateway(moved(settings, host="192.0.2.1"))
    again = running_gateway(settings)
    assert again is not None
    assert (again.host, again.port, again.pid != gateway.pid) == (gateway.host, gateway.port, True)
    assert httpx.get(f"http://127.0.0.1:{settings.serving.port}/health", trust_env=False).status_code == 503


def test_a_process_that_merely_has_the_recorded_pid_is_left_alone(settings: Settings) -> None:
    start_gateway(settings)
    stop_gateway(settings)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        record = settings.home / "smoke" / "gateway.json"
        record.write_text(
            f'{{"pid": {stranger.pid}, "create_time": 1.0, "host": "127.0.0.1", "port": 1, '
            '"requests_per_minute": 1, "log_file": "gateway.log"}'
        )
        assert running_gateway(settings) is None
        assert not stop_gateway(settings)
        assert stranger.poll() is None
        stranger.kill()


def test_a_gateway_that_its_starter_does_not_reap_counts_as_ended(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_process, "_STOP_PATIENCE_S", 20.0)
    code = (
        "from taskagent_platform.serving.gateway_process import start_gateway\n"
        "from taskagent_platform.settings import load_settings\n"
        f"start_gateway(load_settings(profile='smoke', serving={{'port': {settings.serving.port}}}))\n"
        "print('up', flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "up\n"
        gateway = running_gateway(settings)
        assert gateway is not None
        assert stop_gateway(settings)
        assert psutil.Process(gateway.pid).status() == psutil.STATUS_ZOMBIE
        assert running_gateway(settings) is None
        starter.kill()
