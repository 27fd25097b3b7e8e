"""What the launchpad offers for one training, and that it reaches the training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import dagster as dg
import pytest

from taskagent_platform.artifacts import MANIFEST_NAME, Manifest, new_artifact, read_manifest
from taskagent_platform.defs import lora_adapter as module
from taskagent_platform.defs.lora_adapter import lora_adapter
from taskagent_platform.defs.platform import FINGERPRINT_TAG, Platform, fingerprint
from taskagent_platform.defs.tracking import TrackedRun, Tracking, store_uri
from taskagent_platform.defs.training_config import Packing, TrainingConfig
from taskagent_platform.settings import Settings, TrainingSettings, load_settings
from taskagent_platform.training.fine_tune import fine_tune_settings
from taskagent_platform_tests.light_domain import LIGHTS

NODE = "lights__lora_adapter"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")
    monkeypatch.setenv("TASKAGENT_TRAINING__RANK", "4")
    made = load_settings()
    for kind, files in (("base_model", ["config.json"]), ("training_dataset", ["train.jsonl", "evaluation.jsonl"])):
        with new_artifact(made.folder("lights") / kind, kind=kind, inputs={}, settings={}, code_version="1") as scratch:
            for name in files:
                (scratch / name).write_text("{}\n")
    return made


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings of every training; instead of it, an adapter that was cut off at its second step is made."""
    seen: list[Settings] = []

    def train(settings: Settings, *paths_and_inputs: Any) -> Manifest:
        *_, folder, inputs, on_log = paths_and_inputs
        seen.append(settings)
        records = [{"step": step, "steps": 3, "loss": 1.0 / step, "eta_s": 3.0 - step} for step in (1, 2, 3)]
        for record in records[1:]:
            on_log(record)
        details = {"history": records, "seconds": 1.0, "final_loss": 0.3}
        with new_artifact(
            folder, kind="lora_adapter", inputs=inputs, settings=fine_tune_settings(settings), code_version="1",
            details=details,
        ) as scratch:  # fmt: skip
            (scratch / "adapter").write_text(str(settings.training.rank))
        return read_manifest(folder)

    monkeypatch.setattr(module, "fine_tune", train)
    monkeypatch.setattr(module, "code_version", lambda *_: "1")
    return seen


def materialize(instance: dg.DagsterInstance, **config: Any) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [lora_adapter(LIGHTS)],
        instance=instance,
        resources={"platform": Platform(), "tracking": Tracking()},
        run_config={"ops": {NODE: {"config": config}}} if config else None,
        raise_on_error=False,
    )


def refusal(result: dg.ExecuteInProcessResult) -> str:
    failure = result.failure_data_for_node(NODE)
    assert failure is not None
    assert failure.user_failure_data is not None
    return str(failure.user_failure_data.description)


def test_the_launchpad_says_what_each_setting_is_and_its_bounds() -> None:
    fields = TrainingConfig.to_fields_dict()
    assert set(fields) == {
        "rank", "alpha", "frozen_layers", "epochs", "learning_rate", "batch_size", "packing", "max_length", "seed",
    }  # fmt: skip
    assert all(field.description and field.description != "None" for field in fields.values())
    assert fields["rank"].description == "rank of the adapter's matrices (at least 1, at most 512)"
    assert [one.value for one in Packing] == list(get_args(TrainingSettings.model_fields["packing"].annotation))


def test_a_run_trains_with_what_the_launchpad_gave_it(settings: Settings, trained: list[Settings]) -> None:
    with dg.instance_for_test() as instance:
        plain = materialize(instance)
        given = materialize(instance, rank=8, learning_rate=0.02, packing="none", seed=7)
        assert given.success
        assert [one.training.rank for one in trained] == [4, 8], "it wins over the environment"
        changed = trained[1]
        assert (changed.training.learning_rate, changed.training.packing, changed.seed) == (0.02, "none", 7)
        assert changed.training.save_every == settings.training.save_every
        # A nightly run must not take it for one with the plain settings.
        tags = [instance.get_run_by_id(result.run_id).tags[FINGERPRINT_TAG] for result in (plain, given)]  # type: ignore[union-attr]
        assert tags[0] == fingerprint(settings, LIGHTS) != tags[1]
        assert materialize(instance, rank=8, learning_rate=0.02, packing="none", seed=7).success
        assert len(trained) == 2, "the same once more is reused"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 0}, "training.rank = 0: Input should be greater than or equal to 1"),
        ({"seed": -1}, "seed = -1: "),
        ({"max_length": 8}, "training.max_length = 8: "),
    ],
)
def test_what_is_out_of_bounds_is_refused(
    config: dict[str, Any], message: str, settings: Settings, trained: list[Settings]
) -> None:
    with dg.instance_for_test() as instance:
        assert refusal(materialize(instance, **config)).startswith(message)
    assert not trained


def test_what_cannot_go_together_is_refused(
    settings: Settings, trained: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKAGENT_TRAINING__DROPOUT", "0.1")
    monkeypatch.setenv("TASKAGENT_TRAINING__PACKING", "none")
    with dg.instance_for_test() as instance:
        assert refusal(materialize(instance, packing="prefix")).startswith("training.packing prefix computes")
        assert materialize(instance, packing="trl").success


def test_a_dataset_that_is_not_what_was_made_is_refused(settings: Settings, trained: list[Settings]) -> None:
    file = settings.folder("lights") / "training_dataset" / "train.jsonl"
    file.write_text("{}\n{}\n")
    with dg.instance_for_test() as instance:
        assert "train.jsonl was changed after it was made" in refusal(materialize(instance))
    assert not trained


def test_the_whole_curve_of_a_run_that_was_gone_on_with_is_in_mlflow(
    settings: Settings, trained: list[Settings]
) -> None:
    from mlflow import MlflowClient

    with dg.instance_for_test() as instance:
        assert materialize(instance).success
    client = MlflowClient(store_uri(settings))
    experiment = client.get_experiment_by_name("lights")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    losses = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert losses == {1: 1.0, 2: 0.5, 3: pytest.approx(1 / 3)}
    assert run.data.metrics["eta_s"] == 0.0
    manifest = json.loads((settings.folder("lights") / "lora_adapter" / MANIFEST_NAME).read_text())
    assert run.data.params["rank"] == str(manifest["settings"]["rank"]) == "4"


def test_a_training_goes_on_while_mlflow_takes_no_figures(
    settings: Settings, trained: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int | None] = []

    def log(self: TrackedRun, figures: Mapping[str, float], step: int | None = None) -> None:
        if step == 2 and not taken:
            taken.append(None)
            raise ConnectionError("MLflow is starting again")
        taken.append(step)

    monkeypatch.setattr(TrackedRun, "log", log)
    with dg.instance_for_test() as instance:
        assert materialize(instance).success
    assert [step for step in taken if step is not None] == [3, 1, 2], "what was missed follows at the end"
