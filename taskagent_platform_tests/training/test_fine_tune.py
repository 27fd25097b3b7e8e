import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from taskagent_platform.artifacts import file_digest, read_manifest
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform.training._process import run_payload
from taskagent_platform.training.fine_tune import fine_tune
from taskagent_platform_tests.training.conversations import example, write_jsonl

STEPS = 6


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    train = write_jsonl(tmp_path / "train.jsonl", [example(number, number // 8) for number in range(8 * STEPS)])
    return train, write_jsonl(tmp_path / "eval.jsonl", [example(1000 + number) for number in range(4)])


def settings_with(**training: Any) -> Settings:
    os.environ.setdefault("TASKAGENT_PROFILE", "smoke")
    return load_settings(profile="smoke", training={"save_every": 2, **training})


@pytest.mark.slow
def test_training_learns_and_reports(base_folder: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    settings = settings_with(epochs=3)
    manifest = fine_tune(settings, base_folder, *data, tmp_path / "lora_adapter", {"d": "1"}, records.append)
    assert read_manifest(tmp_path / "lora_adapter", kind="lora_adapter", verify=True) == manifest
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 3 * STEPS + 1))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    for record in steps:
        assert record["steps"] == 3 * STEPS
        assert {"learning_rate", "grad_norm", "tokens_per_s", "examples_per_s", "eta_s", "epoch"} <= record.keys()
    evaluated = [record for record in records if "eval_loss" in record]
    assert [record["step"] for record in evaluated] == list(range(2, 3 * STEPS + 1, 2))
    details = manifest.details
    assert details["steps"] == 3 * STEPS
    assert details["examples"] == 8 * STEPS
    assert details["tokens_computed"] < 0.5 * details["tokens_plain"]
    assert details["eval_loss"] == evaluated[-1]["eval_loss"]
    assert details["final_loss"] == pytest.approx(sum(record["loss"] for record in steps[-5:]) / 5)
    assert (details["packing"], details["backend"], details["resumed_from"]) == ("prefix", "trl", 0)
    assert not list(tmp_path.glob(".lora_adapter*"))


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["none", "trl"])
def test_other_packings_train_too(packing: str, base_folder: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    settings = settings_with(packing=packing, batch_size=2, gradient_accumulation=2, epochs=1, max_length=700)
    details = fine_tune(settings, base_folder, *data, tmp_path / "lora_adapter", {}).details
    losses = [record["loss"] for record in details["history"] if "loss" in record]
    assert details["packing"] == packing
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [1, 3, STEPS])
def test_a_killed_run_ends_with_the_same_adapter(
    kill_at: int, base_folder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = settings_with()
    whole = fine_tune(settings, base_folder, *data, tmp_path / "whole", {})

    def kill(record: dict[str, Any]) -> None:
        if record.get("step") == kill_at and "loss" in record:
            (payload,) = psutil.Process().children()
            payload.send_signal(signal.SIGKILL)

    with pytest.raises(PlatformError, match="was killed"):
        fine_tune(settings, base_folder, *data, tmp_path / "cut", {}, kill)
    assert not (tmp_path / "cut").exists()
    resumed = fine_tune(settings, base_folder, *data, tmp_path / "cut", {})
    # At the last step, the kill may come before or after its checkpoint.
    assert resumed.details["resumed_from"] in {1: (0,), 3: (2,), STEPS: (STEPS - 2, STEPS)}[kill_at]
    assert resumed.files["adapter_model.safetensors"] == whole.files["adapter_model.safetensors"]
    losses = [[r["loss"] for r in one.details["history"] if "loss" in r] for one in (whole, resumed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_other_data_start_anew(base_folder: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    def stop(record: dict[str, Any]) -> None:
        if record.get("step") == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(settings_with(), base_folder, *data, tmp_path / "lora_adapter", {}, stop)
    assert list(tmp_path.glob(".lora_adapter.training/*/checkpoint-2"))
    assert not psutil.Process().children()
    write_jsonl(data[0], [example(number) for number in range(16)])
    assert fine_tune(settings_with(), base_folder, *data, tmp_path / "lora_adapter", {}).details["resumed_from"] == 0


@pytest.mark.slow
def test_a_payload_dies_with_its_parent(base_folder: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from taskagent_platform.settings import load_settings\n"
        "from taskagent_platform.training.fine_tune import fine_tune\n"
        f"fine_tune(load_settings(profile='smoke', training={{'epochs': 500}}), Path({str(base_folder)!r}), "
        f"Path({str(data[0])!r}), Path({str(data[1])!r}), Path({str(tmp_path / 'a')!r}), {{}}, "
        "lambda record: print(record, flush=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    for line in parent.stdout:
        if "loss" in line:
            break
    (payload,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    assert payload.wait(timeout=10) is not None or not payload.is_running()


@pytest.mark.slow
def test_a_diverging_loss_is_an_error(base_folder: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    settings = settings_with(learning_rate=1e30, warmup_ratio=0.0)
    with pytest.raises(PlatformError, match=r"(loss is nan|not finite|diverges).*learning_rate"):
        fine_tune(settings, base_folder, *data, tmp_path / "lora_adapter", {})
    assert not (tmp_path / "lora_adapter").exists()


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(base_folder: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    """A file where checkpoints are written stands for the full disk."""

    def block(record: dict[str, Any]) -> None:
        if record.get("step") == 3:
            (folder,) = tmp_path.glob(".lora_adapter.training/*/")
            (folder / ".writing").touch()

    with pytest.raises(PlatformError, match="could not be written"):
        fine_tune(settings_with(), base_folder, *data, tmp_path / "lora_adapter", {}, block)
    assert list(tmp_path.glob(".lora_adapter.training/*/checkpoint-2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"tools": []}', "line 2: not an example; KeyError\\('messages'\\)"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 2: An example has no assistant message"),
        (
            '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "y"}]}'
            % ("x y " * 3000),
            "line 2: [0-9]+ tokens, but training.max_length is 4096",
        ),
    ],
)
def test_a_bad_example_names_file_and_line(
    line: str, message: str, base_folder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    first = data[0].read_text().splitlines()[0]
    data[0].write_text(f"{first}\n{line}\n")
    with pytest.raises(PlatformError, match=f"train.jsonl, {message}"):
        fine_tune(settings_with(), base_folder, *data, tmp_path / "lora_adapter", {})


def test_impossible_settings_are_refused_before_anything_loads(base_folder: Path, tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    for training, message in (
        ({"dropout": 0.1}, "exact only without dropout"),
        ({"backend": "unsloth"}, "unsloth computes in 16 bit"),
    ):
        start = time.monotonic()
        with pytest.raises(PlatformError, match=message):
            fine_tune(settings_with(**training), base_folder, empty, empty, tmp_path / "a", {})
        assert time.monotonic() - start < 2


def test_the_orchestrator_imports_no_torch() -> None:
    code = (
        "import sys, taskagent_platform.training.fine_tune, taskagent_platform.training.merge, "
        "taskagent_platform.training.base_model, taskagent_platform.training.template; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'trl', 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_payload_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="knows no task 'sing'"):
        run_payload("sing", {}, tmp_path / "log")


def test_a_payload_leaves_nothing_behind_when_its_caller_stops(
    base_folder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    digest = file_digest(data[0])
    before = threading.active_count()

    def stop(record: dict[str, Any]) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fine_tune(settings_with(), base_folder, *data, tmp_path / "lora_adapter", {}, stop)
    assert not psutil.Process().children()
    assert threading.active_count() == before
    assert not (tmp_path / "lora_adapter").exists()
    assert not list(tmp_path.glob("*.partial"))
    assert file_digest(data[0]) == digest
