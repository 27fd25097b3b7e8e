from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from taskagent_platform import settings as module
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import detect_profile, has_native_bfloat16, load_settings, with_training


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    monkeypatch.delenv("TASKAGENT_PROFILE", raising=False)
    return tmp_path


def test_real_use_reports_how_often_a_case_is_right_again_and_again(home: Path) -> None:
    assert load_settings(profile="gpu").evaluation.samples > 1


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu"])
def test_every_profile_loads_and_keeps_its_data_apart(profile: str, home: Path) -> None:
    settings = load_settings(profile=profile)
    assert settings.folder("task_api") == home.resolve() / profile / "task_api"


def test_the_environment_wins_over_the_callers_values_and_those_over_the_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "settings.yaml").write_text("profile: smoke\nserving: {port: 1111, max_tokens: 99}\ntraining: {rank: 4}\n")
    monkeypatch.setenv("TASKAGENT_SERVING__PORT", "3333")
    settings = load_settings(serving={"port": 2222, "max_tokens": 77})
    assert settings.profile == "smoke"
    assert (settings.serving.port, settings.serving.max_tokens, settings.training.rank) == (3333, 77, 4)


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("serving: {prot: 1}", r"serving\.prot = 1"),
        ("serving: {port: 99999}", r"serving\.port = 99999"),
        ("profile: fast", "There is no profile 'fast'"),
        ("- a list", "must hold a mapping"),
        ("serving: {", r"settings\.yaml, line 1, column \d+ is not valid YAML: \w"),
    ],
)
def test_a_wrong_value_is_named(home: Path, written: str, complaint: str) -> None:
    (home / "settings.yaml").write_text(written)
    with pytest.raises(PlatformError, match=complaint):
        load_settings()


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ("alerts: {urls: 'slack://secret'}", r"alerts\.urls: "),
        ("alerts: {urls: [{slack: secret}]}", r"alerts\.urls\.0: "),
        ("alerts: {ulrs: ['slack://secret']}", r"alerts\.ulrs: "),
        ("alerts: {per_hour: 'secret'}", r"alerts\.per_hour: "),
        ("alerts: 'slack://secret'", "alerts: "),
        ("alert: {urls: ['slack://secret']}", "alert: "),
    ],
)
def test_a_wrong_setting_of_the_alerts_is_named_without_its_value(home: Path, written: str, place: str) -> None:
    (home / "settings.yaml").write_text(written)
    with pytest.raises(PlatformError, match=rf"(?m)^{place}") as caught:
        load_settings(profile="smoke")
    assert "secret" not in str(caught.value)


def test_a_variable_without_a_value_sets_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TASKAGENT_PROFILE", "TASKAGENT_DOMAIN", "TASKAGENT_SERVING__PORT", "TASKAGENT_ALERTS__URLS_FILE"):
        monkeypatch.setenv(name, "")
    settings = load_settings(profile="smoke")
    assert (settings.profile, settings.domain, settings.serving.port) == ("smoke", "task_api", 8230)
    assert settings.alerts.urls_file is None
    monkeypatch.setenv("TASKAGENT_HOME", "")
    assert load_settings(profile="smoke").home == module.PROJECT_ROOT / ".taskagent"


def test_a_list_that_is_no_json_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKAGENT_MORE_DOMAINS", "customer_support")
    with pytest.raises(PlatformError, match=r'"more_domains".*written as JSON'):
        load_settings()


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 sse2\n", True),
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\nmodel name\t: avx512_bf16\n", False),
        (None, False),
    ],
)
def test_bfloat16_is_native_where_the_processor_lists_it(tmp_path: Path, cpuinfo: str | None, native: bool) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    assert has_native_bfloat16(file) is native


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_the_cpu_profile_trains_and_serves_in_the_fastest_precision(
    native: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_native_bfloat16", lambda: native)
    settings = load_settings(profile="cpu")
    assert settings.training.dtype == settings.serving.dtype == dtype
    assert load_settings(profile="cpu", training={"dtype": "float16"}).training.dtype == "float16"


def test_the_gpu_profile_is_chosen_where_the_driver_lists_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    assert detect_profile() == "cpu"
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA L4'\n")
    program.chmod(0o755)
    assert detect_profile() == "gpu"
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")
    assert load_settings().profile == "smoke"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"training": {"packing": "prefix", "dropout": 0.1}}, "training.packing prefix .* set training.dropout to 0"),
        ({"training": {"backend": "unsloth", "dtype": "float32"}}, "unsloth computes in 16 bit"),
        ({"training": {"gradient_accumulation": 3, "processes": 2}}, "training.processes is 2, which does not divide"),
        ({"base_model": {"load_in_4bit": True}, "training": {"dtype": "float32"}}, "needs a 16-bit training.dtype"),
    ],
)
def test_what_cannot_go_together_is_refused_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlatformError, match=sentence) as caught:
        load_settings(profile="smoke", **changes)
    assert "Value error" not in str(caught.value)
    assert "{" not in str(caught.value), "the sentence alone, not all values of the section"


def test_training_settings_can_be_replaced_for_one_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKAGENT_TRAINING__RANK", "4")
    settings = load_settings(profile="smoke", seed=3)
    changed = with_training(settings, {"rank": 8, "seed": 5})
    assert (changed.training.rank, changed.seed) == (8, 5)
    assert with_training(settings, {}).model_dump() == settings.model_dump()
    assert settings.training.rank == 4
    for changes, sentence in (
        ({"rank": 0}, r"training\.rank = 0: "),
        ({"rnak": 1}, r"training\.rnak = 1: "),
        ({"dropout": 0.5}, r"training\.packing prefix .* exact only without dropout"),
    ):
        with pytest.raises(PlatformError, match=f"^{sentence}"):
            with_training(settings, changes)


@pytest.mark.parametrize("installed", [True, False])
def test_the_cpu_server_speculates_only_where_the_package_for_it_could_be_built(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModuleSpec("arctic_inference", None) if installed else None
    monkeypatch.setattr(module, "find_spec", lambda name: spec)
    assert load_settings(profile="cpu").serving.speculation is installed
    assert load_settings(profile="cpu", serving={"speculation": True}).serving.speculation
