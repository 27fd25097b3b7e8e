import importlib.metadata
import socket
import time
from pathlib import Path

import pytest

from taskagent_platform import doctor
from taskagent_platform.doctor import Check, examine, preflight
from taskagent_platform.errors import PlatformError
from taskagent_platform.serving.gateway_process import start_gateway, stop_gateway
from taskagent_platform.serving.server import free_port
from taskagent_platform.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path / "home"))
    ports = {"dagster": free_port(), "mlflow": free_port()}
    return load_settings(profile="smoke", serving={"port": free_port()}, ports=ports)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts an `nvidia-smi` on PATH that prints the given line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def write(line: str) -> None:
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{line}'\n")
        program.chmod(0o755)

    return write


def found(settings: Settings, name: str) -> Check:
    return next(check for check in examine(settings) if check.name == name)


def test_a_sound_machine_has_no_problem_and_the_answer_is_quick(settings: Settings) -> None:
    begin = time.monotonic()
    checks = preflight(settings)
    assert time.monotonic() - begin < 5
    assert all(check.status != "problem" for check in checks)
    assert not settings.home.exists(), "looking must not make anything"


def test_every_finding_that_is_not_well_says_what_to_do(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(doctor.DISK_GIB, "smoke", 1e9)
    monkeypatch.setitem(doctor.MEMORY_GIB, "smoke", 1e9)
    checks = examine(settings.model_copy(update={"profile": "smoke", "domain": "nowhere"}))
    unwell = [check for check in checks if check.status != "ok"]
    assert {"Disk", "Memory", "C++ compiler", "Domain"} <= {check.name for check in unwell}
    assert all(check.remedy and not check.found.endswith(".") for check in unwell)


def test_too_little_disk_and_memory_stop_a_run_before_it_starts(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(doctor.DISK_GIB, "smoke", 1e9)
    monkeypatch.setitem(doctor.MEMORY_GIB, "smoke", 1e9)
    with pytest.raises(PlatformError) as caught:
        preflight(settings)
    disk, memory = str(caught.value).splitlines()
    assert "GiB of disk are free" in disk
    assert "TASKAGENT_HOME" in disk
    assert "GiB of memory are free" in memory


def test_a_port_in_use_names_the_port_and_the_variable(settings: Settings) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", settings.serving.port))
        other.listen()
        with pytest.raises(PlatformError, match=rf":{settings.serving.port} \(.*TASKAGENT_SERVING__PORT"):
            preflight(settings)
    assert found(settings, "Endpoint port").status == "ok"


def test_the_platforms_own_gateway_on_the_port_is_no_problem(settings: Settings) -> None:
    start_gateway(settings)
    try:
        preflight(settings)
        assert "own gateway" in found(settings, "Endpoint port").found
    finally:
        stop_gateway(settings)


def test_a_damaged_record_of_the_gateway_is_reported_not_raised(settings: Settings) -> None:
    record = settings.home / "smoke" / "gateway.json"
    record.parent.mkdir(parents=True)
    record.write_text("{")
    check = found(settings, "Endpoint port")
    assert check.status == "problem"
    assert check.remedy == "delete it"


def test_a_page_port_in_use_is_a_warning_only(settings: Settings) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", settings.ports.mlflow))
        other.listen()
        check = found(settings, "MLflow port")
        preflight(settings)
    assert check.status == "warning"
    assert "TASKAGENT_PORTS__MLFLOW" in check.remedy


def test_a_variable_that_nothing_reads_is_named() -> None:
    read = {"TASKAGENT_TRAINING__EPOCHS": "2", "TASKAGENT_HOME": "/data", "TASKAGENT_API_KEY": "tk-1", "PATH": "/bin"}
    assert doctor.check_variables(read) == Check("Variables", "ok", "2 settings come from variables")
    check = doctor.check_variables({**read, "TASKAGENT_TRAINING_EPOCHS": "2", "TASKAGENT_GATE__JSON_VALIDITY": "0"})
    assert check.status == "warning"
    assert check.found.endswith(": TASKAGENT_GATE__JSON_VALIDITY, TASKAGENT_TRAINING_EPOCHS")
    assert "TASKAGENT_TRAINING__EPOCHS" in check.remedy


def test_a_home_that_is_a_file_is_refused(settings: Settings) -> None:
    settings.home.write_text("not a folder")
    with pytest.raises(PlatformError, match="is not a folder: set TASKAGENT_HOME"):
        preflight(settings)


def test_the_gpu_profile_needs_a_card(settings: Settings, nvidia_smi) -> None:
    nvidia_smi("")
    gpu = settings.model_copy(update={"profile": "gpu"})
    assert found(gpu, "GPU").status == "problem"
    assert "TASKAGENT_PROFILE=cpu" in found(gpu, "GPU").remedy
    assert found(settings, "GPU").status == "ok"


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("NVIDIA L4, 580.65, 23034", "ok", "NVIDIA L4, 22 GiB, driver 580.65"),
        ("NVIDIA L4, 535.104, 23034", "warning", "too old"),
        ("NVIDIA T1000, 580.65, 4096", "warning", "less than the 16 GiB"),
        ("NVIDIA GB10, 580.65, [N/A]", "ok", "GB10"),
    ],
)
def test_the_card_is_judged_by_driver_and_memory(
    settings: Settings, nvidia_smi, line: str, status: str, words: str
) -> None:
    nvidia_smi(line)
    check = found(settings.model_copy(update={"profile": "gpu"}), "GPU")
    assert check.status == status
    assert words in check.found


def test_a_share_of_the_card_that_leaves_no_room_for_a_candidate_is_said(settings: Settings, nvidia_smi) -> None:
    nvidia_smi("NVIDIA L4, 580.65, 23034")
    serving = settings.serving.model_copy(update={"gpu_memory_utilization": 0.9})
    check = found(settings.model_copy(update={"profile": "gpu", "serving": serving}), "GPU")
    assert check.status == "warning"
    assert "a model server takes 90%" in check.found
    assert "TASKAGENT_SERVING__GPU_MEMORY_UTILIZATION" in check.remedy
    assert found(settings.model_copy(update={"serving": serving}), "GPU").status == "ok", "another profile"


def test_packages_are_compared_with_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "cpu.txt"
    pydantic = importlib.metadata.version("pydantic")
    lock.write_text(f"# a comment\npydantic=={pydantic}\n")
    assert doctor.check_packages(lock).status == "ok"
    lock.write_text("pydantic==0.1\n")
    other = doctor.check_packages(lock)
    assert other.status == "warning"
    assert f"pydantic {pydantic} (locked: 0.1)" in other.found
    lock.write_text("no-such-package==1.0\n")
    missing = doctor.check_packages(lock)
    assert missing.status == "problem"
    assert missing.remedy == "run `make env`"
