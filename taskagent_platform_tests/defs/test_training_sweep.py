"""The asset that trains with different settings and ranks what came of it."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from taskagent_platform.artifacts import Manifest, code_version, new_artifact, read_manifest
from taskagent_platform.defs import lora_adapter, training_sweep
from taskagent_platform.defs.platform import Platform
from taskagent_platform.defs.tracking import MODEL_TAG, Tracking, store_uri
from taskagent_platform.defs.training_sweep import SWEEP_TAG
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform.training.fine_tune import fine_tune_settings
from taskagent_platform_tests.light_domain import LightDomain

NODE = "lights__training_sweep"


class ExaminedLights(LightDomain):
    """Its suites are no files: whoever reads one fails."""

    suites = development_suites = robustness_suites = (Path("/nowhere/suite.json"),)


DOMAIN = ExaminedLights()


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")
    made = load_settings()
    for kind, files in (("base_model", ["config.json"]), ("training_dataset", ["train.jsonl", "evaluation.jsonl"])):
        with new_artifact(made.folder("lights") / kind, kind=kind, inputs={}, settings={}, code_version="1") as scratch:
            for name in files:
                (scratch / name).write_text(f"{name}\n")
    # The domain's version covers its suites.
    monkeypatch.setattr("taskagent_platform.defs.platform.fingerprint", lambda *_: "1")
    return made


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rank of every training; the held-out loss falls with the rank."""
    ranks: list[int] = []

    def fine_tune(settings: Settings, *paths_and_inputs: Any) -> Manifest:
        *_, folder, inputs, on_log = paths_and_inputs
        ranks.append(settings.training.rank)
        record = {"step": 1, "steps": 1, "loss": 0.5}
        on_log(record)
        with new_artifact(
            folder, kind="lora_adapter", inputs=inputs, settings=fine_tune_settings(settings),
            code_version=code_version("training"), details={"history": [record], "final_loss": 0.5, "seconds": 2.0},
        ) as scratch:  # fmt: skip
            (scratch / "rank").write_text(str(settings.training.rank))
        return read_manifest(folder)

    def held_out_loss(settings: Settings, base: Path, adapter: Path, examples: Path, on_log: Any = None) -> float:
        assert examples.read_text() == "evaluation.jsonl\n"
        return 1 / int((adapter / "rank").read_text())

    monkeypatch.setattr(lora_adapter, "fine_tune", fine_tune)
    monkeypatch.setattr(training_sweep, "held_out_loss", held_out_loss)
    return ranks


def materialize(**config: Any) -> dg.ExecuteInProcessResult:
    with dg.instance_for_test() as instance:
        return dg.materialize(
            [training_sweep.training_sweep(DOMAIN)],
            instance=instance,
            resources={"platform": Platform(), "tracking": Tracking()},
            run_config={"ops": {NODE: {"config": config}}} if config else None,
            raise_on_error=False,
        )


def test_what_was_tried_is_ranked_here_and_in_mlflow(settings: Settings, trained: list[int]) -> None:
    from mlflow import MlflowClient

    result = materialize(trials=[{"rank": 4}, {"rank": 16}, {"rank": 8}])
    assert result.success
    assert trained == [4, 16, 8]
    [made] = result.get_asset_materialization_events()
    rows = str(made.materialization.metadata["ranking"].value).splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["rank=16", "rank=8", "rank=4"]
    manifest = read_manifest(settings.folder("lights") / "training_sweep", verify=True)
    assert [trial["changes"]["rank"] for trial in manifest.details["ranking"]] == [16, 8, 4]

    client = MlflowClient(store_uri(settings))
    experiment = client.get_experiment_by_name("lights")
    assert experiment is not None
    runs = client.search_runs(
        [experiment.experiment_id],
        filter_string=f"tags.`{SWEEP_TAG}` = '{result.run_id}'",
        order_by=["metrics.held_out_loss ASC"],
    )
    assert [run.data.params["rank"] for run in runs] == ["16", "8", "4"]
    assert [run.data.tags[MODEL_TAG] for run in runs] == [trial["adapter"] for trial in manifest.details["ranking"]]
    assert runs[0].data.metrics["loss"] == 0.5


def test_a_second_sweep_trains_only_what_is_new_and_keeps_no_other(settings: Settings, trained: list[int]) -> None:
    assert materialize(trials=[{"rank": 4}, {"rank": 16}]).success
    assert materialize(trials=[{"rank": 16}, {"rank": 32}]).success
    assert trained == [4, 16, 32]
    adapters = settings.folder("lights") / "training_sweep_adapters"
    assert sorted(int((one / "lora_adapter" / "rank").read_text()) for one in adapters.iterdir()) == [16, 32]
    assert not (settings.folder("lights") / "lora_adapter").exists(), "the adapter that is served is none of these"


def test_an_impossible_training_is_refused_before_the_first(settings: Settings, trained: list[int]) -> None:
    result = materialize(trials=[{"rank": 4}, {"rnak": 8}])
    failure = result.failure_data_for_node(NODE)
    assert failure is not None
    assert failure.user_failure_data is not None
    assert str(failure.user_failure_data.description).startswith("training.rnak = 8: ")
    assert not trained


def test_learning_rates_are_tried_where_nothing_is_named(settings: Settings, trained: list[int]) -> None:
    result = materialize()
    assert result.success
    assert len(trained) == 3
