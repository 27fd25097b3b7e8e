import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

from taskagent_platform.artifacts import Manifest, file_digest, read_manifest
from taskagent_platform.errors import PlatformError
from taskagent_platform.training._process import DivergenceError, _last_line, run_payload
from taskagent_platform.training.fine_tune import _remove_finished, fine_tune
from taskagent_platform_tests.training.conversations import example, write_jsonl
from taskagent_platform_tests.training.small_training import STEPS, settings_with, write_data


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


def test_frozen_layers_get_no_adapter(base_folder: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = tmp_path / "lora_adapter"
    fine_tune(settings_with(frozen_layers=1), base_folder, *data, folder, {})
    with safe_open(folder / "adapter_model.safetensors", "pt") as adapter:
        adapted = {name.split(".layers.")[1].split(".")[0] for name in adapter.keys()}  # noqa: SIM118, not a mapping
    assert adapted == {"1"}


def test_no_layer_left_to_adapt_is_refused(base_folder: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="frozen_layers is 2, and the base model has 2 layers"):
        fine_tune(settings_with(frozen_layers=2), base_folder, *data, tmp_path / "lora_adapter", {})
    assert not (tmp_path / "lora_adapter").exists()


def test_a_precision_that_the_processor_lacks_is_refused_before_the_model_is_loaded(
    base_folder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(PlatformError, match=r"training\.dtype float16 needs a GPU"):
        fine_tune(settings_with(dtype="float16"), base_folder, *data, tmp_path / "lora_adapter", {})
    with pytest.raises(PlatformError, match=r"training settings cannot be used: .*no_such_optimizer"):
        fine_tune(settings_with(optimizer="no_such_optimizer"), base_folder, *data, tmp_path / "lora_adapter", {})


def test_the_last_training_that_was_cut_off_outlives_another_that_ends_well(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("oldest", "older", "own")]
    for age, folder in enumerate(folders):
        (folder / "checkpoint-4").mkdir(parents=True)
        os.utime(folder, (age, age))
    (tmp_path / "training.log").write_text("x")
    _remove_finished(tmp_path, folders[2])
    assert [folder.exists() for folder in folders] == [False, True, False]
    _remove_finished(tmp_path, folders[1])
    assert not tmp_path.exists()


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("loading\nValueError: no such thing\nbye\n", "ValueError: no such thing"),
        ("[rank1]: torch.OutOfMemoryError: too much\ntorch.distributed.elastic.ChildFailedError:\n====\n",
         "[rank1]: torch.OutOfMemoryError: too much"),
        ("a word\nKilled\n\n", "Killed"),
        ("", "it wrote nothing"),
    ],
)  # fmt: skip
def test_what_ended_a_payload_is_the_error_and_not_a_launchers_summary(tmp_path: Path, log: str, told: str) -> None:
    (tmp_path / "log").write_text(log)
    assert _last_line(tmp_path / "log") == told


def kill_payload() -> None:
    (payload,) = psutil.Process().children()
    payload.send_signal(signal.SIGKILL)


# Two epochs, so that a run goes on in the middle of the second; the second one also draws random numbers in its steps.
SURVIVED: dict[str, dict[str, Any]] = {
    "packs": {"epochs": 2},
    "dropout": {"epochs": 2, "packing": "none", "dropout": 0.2, "batch_size": 4, "gradient_accumulation": 2},
}


@pytest.fixture(scope="module")
def whole(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Manifest]:
    """Trains without interruption, once for each kind."""

    @cache
    def train(kind: str) -> Manifest:
        folder = tmp_path_factory.mktemp("whole")
        return fine_tune(settings_with(**SURVIVED[kind]), base_folder, *write_data(folder), folder / "lora_adapter", {})

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kill_at", "goes_on_from"),
    [
        ("packs", 1, (0,)),
        ("packs", 5, (4,)),
        # At the last step, the kill may come before or after its checkpoint.
        ("packs", 2 * STEPS, (2 * STEPS - 2, 2 * STEPS)),
        ("dropout", 9, (8,)),
    ],
)
def test_a_killed_run_ends_with_the_same_adapter(
    kind: str,
    kill_at: int,
    goes_on_from: tuple[int, ...],
    base_folder: Path,
    data: tuple[Path, Path],
    tmp_path: Path,
    whole: Callable[[str], Manifest],
) -> None:
    settings, folder = settings_with(**SURVIVED[kind]), tmp_path / "lora_adapter"

    def kill(record: dict[str, Any]) -> None:
        if record.get("step") == kill_at and "loss" in record:
            kill_payload()

    with pytest.raises(PlatformError, match="was killed"):
        fine_tune(settings, base_folder, *data, folder, {}, kill)
    assert not folder.exists()
    resumed = fine_tune(settings, base_folder, *data, folder, {})
    assert resumed.details["resumed_from"] in goes_on_from
    assert_same_training(resumed, whole(kind))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_at_random_moments_ends_with_the_same_adapter(
    seed: int, base_folder: Path, data: tuple[Path, Path], tmp_path: Path, whole: Callable[[str], Manifest]
) -> None:
    """Twice: at a random moment after a random step, and while a checkpoint is being written."""
    rng = random.Random(seed)
    settings, folder = settings_with(**SURVIVED["packs"]), tmp_path / "lora_adapter"
    step, delay = rng.randrange(1, 2 * STEPS), rng.random() * 0.1

    def kill_later(record: dict[str, Any]) -> None:
        if record.get("step") == step and "loss" in record:
            time.sleep(delay)
            kill_payload()

    over = threading.Event()

    def kill_while_writing() -> None:
        while not over.wait(0.001):
            if list(tmp_path.glob(".lora_adapter.training/*/.writing/*/*")):
                kill_payload()
                return

    with contextlib.suppress(PlatformError):  # it may come to its end before the signal
        fine_tune(settings, base_folder, *data, folder, {}, kill_later)
    killing = threading.Thread(target=kill_while_writing)
    killing.start()
    with contextlib.suppress(PlatformError):
        fine_tune(settings, base_folder, *data, folder, {})
    over.set()
    killing.join()
    assert_same_training(fine_tune(settings, base_folder, *data, folder, {}), whole("packs"))


def assert_same_training(resumed: Manifest, whole: Manifest) -> None:
    assert resumed.files["adapter_model.safetensors"] == whole.files["adapter_model.safetensors"]
    losses = [[r["loss"] for r in one.details["history"] if "loss" in r] for one in (whole, resumed)]
    assert len(losses[0]) == whole.details["steps"]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_data_that_changed_are_not_gone_on_with(base_folder: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "lora_adapter"

    def stop(record: dict[str, Any]) -> None:
        if record.get("step") == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(settings_with(), base_folder, *data, folder, {"training_dataset": "1"}, stop)
    kept = sorted(path.name for path in tmp_path.glob(".lora_adapter.training/*/checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]
    assert not psutil.Process().children()
    write_jsonl(data[0], [example(number) for number in range(16)])
    with pytest.raises(PlatformError, match=r"train\.jsonl .* changed since the training that was cut off"):
        fine_tune(settings_with(), base_folder, *data, folder, {"training_dataset": "1"})
    assert sorted(path.name for path in tmp_path.glob(".lora_adapter.training/*/checkpoint-*")) == kept
    # A dataset that was made again is another one.
    anew = fine_tune(settings_with(), base_folder, *data, folder, {"training_dataset": "2"})
    assert anew.details["resumed_from"] == 0


@pytest.mark.slow
def test_old_checkpoints_are_pruned(base_folder: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    seen = set()

    def look(record: dict[str, Any]) -> None:
        seen.add(tuple(sorted(path.name for path in tmp_path.glob(".lora_adapter.training/*/checkpoint-*"))))

    fine_tune(settings_with(save_every=1), base_folder, *data, tmp_path / "lora_adapter", {}, look)
    assert max(map(len, seen)) in (2, 3), "two are kept, and a third is there for the moment of the pruning"
    assert not [names for names in seen if "checkpoint-1" in names and "checkpoint-4" in names]
    assert not list(tmp_path.glob(".lora_adapter*")), "once the adapter is there, none is needed"


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
    with pytest.raises(DivergenceError, match=r"(loss is nan|not finite|diverges).*learning_rate"):
        fine_tune(settings, base_folder, *data, tmp_path / "lora_adapter", {})
    assert not (tmp_path / "lora_adapter").exists()


@pytest.mark.slow
@pytest.mark.parametrize("room", [1000, 300_000], ids=["in the adapter", "in the tokenizer"])
def test_a_full_disk_keeps_the_last_checkpoint(
    room: int, base_folder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    """A limit on the size of files, set while the training runs, stops a write in its middle as a full disk does."""

    def fill(record: dict[str, Any]) -> None:
        if record.get("step") == 3 and "loss" in record:
            (payload,) = psutil.Process().children()
            payload.rlimit(psutil.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    folder = tmp_path / "lora_adapter"
    with pytest.raises(PlatformError, match=r"step 4 could not be written .* Free some space"):
        fine_tune(settings_with(), base_folder, *data, folder, {}, fill)
    assert [path.name for path in tmp_path.glob(".lora_adapter.training/*/*")] == ["checkpoint-2"]
    assert fine_tune(settings_with(), base_folder, *data, folder, {}).details["resumed_from"] == 2


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


@pytest.mark.parametrize(
    ("training", "package"),
    [
        ({"backend": "unsloth", "dtype": "bfloat16"}, "unsloth"),
        ({"optimizer": "paged_adamw_8bit"}, "bitsandbytes"),
        ({"ray_address": "auto"}, "ray"),
    ],
)
def test_a_missing_package_is_named_before_anything_loads(
    training: dict[str, Any], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskagent_platform.training.fine_tune.find_spec", lambda name: None)
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(PlatformError, match=f"The package {package}, .* is missing: "):
        fine_tune(settings_with(**training), tmp_path / "no base model", empty, empty, tmp_path / "a", {})


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
