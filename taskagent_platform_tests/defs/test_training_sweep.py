"""The asset that trains with different settings and ranks what came of it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from taskagent_platform.artifacts import Manifest, code_version, new_artifact, read_manifest
from taskagent_platform.defs import lora_adapter, training_sweep
from taskagent_platform.defs.platform import Platform, Stage
from taskagent_platform.defs.tracking import MODEL_TAG, Tracking, store_uri
from taskagent_platform.defs.training_sweep import SWEEP_TAG
from taskagent_platform.evaluation.report import load_report
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform.training._process import DivergenceError
from taskagent_platform.training.fine_tune import fine_tune_settings
from taskagent_platform_tests.evaluation.light_server import LightServer, Turn
from taskagent_platform_tests.light_domain import LightDomain
from taskagent_platform_tests.serving.fake_server import serve

NODE = "lights__training_sweep"


DIVERGING = (64, 128)
SUITE: dict[str, list[dict[str, Any]]] = {
    "tool_selection": [{"input": f"lamp {n}", "expected_tool": "list_lights", "category": "list"} for n in range(3)],
    "argument_extraction": [
        {
            "input": "red hall",
            "expected_tool": "set_light",
            "expected_args": {"room": "hall", "level": 5, "color": "red"},
        }
    ],
    "abstention": [{"input": "thank you", "category": "small talk"}],
}


class ExaminedLights(LightDomain):
    """Its other suites are no files: whoever reads one fails."""

    suites = robustness_suites = (Path("/nowhere/suite.json"),)


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
    (tmp_path / "development.json").write_text(json.dumps(SUITE))
    monkeypatch.setattr(ExaminedLights, "development_suites", (tmp_path / "development.json",))
    # The run's tag names the version of the domain's files, its suites among them.
    monkeypatch.setattr("taskagent_platform.defs.platform.fingerprint", lambda *_: "1")
    return made


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rank of every training; the held-out loss falls with the rank."""
    ranks: list[int] = []

    def fine_tune(settings: Settings, *paths_and_inputs: Any) -> Manifest:
        *_, folder, inputs, on_log = paths_and_inputs
        ranks.append(settings.training.rank)
        if settings.training.rank in DIVERGING:
            raise DivergenceError("The loss is nan at step 3; lower training.learning_rate and start again.")
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


class Servers:
    """Merges and serves adapters: a greater rank selects the tool in more cases."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.asked: list[str] = []
        self.fails = False

    def merge(self, settings: Settings, base: Path, adapter: Path, merged: Path, inputs: Mapping[str, str]) -> Manifest:
        assert inputs == {"base_model": read_manifest(base).digest, "lora_adapter": read_manifest(adapter).digest}
        with new_artifact(merged, kind="merged_model", inputs=inputs, settings={}, code_version="1") as scratch:
            (scratch / "model.safetensors").write_text((adapter / "rank").read_text())
        return read_manifest(merged)

    @contextmanager
    def serve(self, stage: Stage, folder: Path, model: Manifest) -> Iterator[Any]:
        assert read_manifest(folder, verify=True) == model
        rank = int((folder / "model.safetensors").read_text())
        self.started.append(rank)
        right: dict[str, list[Turn]] = {f"lamp {n}": [[("list_lights", {})], "Done."] for n in range(min(rank // 4, 3))}
        light = LightServer(right, failures=[(400, "no such model")] if self.fails else [])
        with serve(light.app) as url:
            yield SimpleNamespace(base_url=f"{url}/v1", name="lights", model_digest=model.digest)
        self.asked += [body["messages"][-1]["content"] for body in light.bodies if len(body["messages"]) == 2]


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Servers:
    made = Servers()
    monkeypatch.setattr(training_sweep, "merge", made.merge)
    monkeypatch.setattr(training_sweep, "model_server", made.serve)
    return made


def materialize(**config: Any) -> dg.ExecuteInProcessResult:
    with dg.instance_for_test() as instance:
        return dg.materialize(
            [training_sweep.training_sweep(DOMAIN)],
            instance=instance,
            resources={"platform": Platform(), "tracking": Tracking()},
            run_config={"ops": {NODE: {"config": config}}} if config else None,
            raise_on_error=False,
        )


def failure_of(result: dg.ExecuteInProcessResult) -> str:
    failure = result.failure_data_for_node(NODE)
    assert failure is not None
    assert failure.user_failure_data is not None, failure.error
    return str(failure.user_failure_data.description)


def ranked(settings: Settings) -> list[tuple[int, int, int]]:
    """Returns rank, right development cases and all of them, the best first."""
    manifest = read_manifest(settings.folder("lights") / "training_sweep", verify=True)
    return [(trial["changes"]["rank"], trial["right"], trial["cases"]) for trial in manifest.details["ranking"]]


def test_what_was_tried_is_ranked_on_the_development_suites_here_and_in_mlflow(
    settings: Settings, trained: list[int], servers: Servers
) -> None:
    from mlflow import MlflowClient

    # Rank 16 and 12 answer the same cases right: the loss, which falls with the rank, decides.
    result = materialize(trials=[{"rank": 4}, {"rank": 12}, {"rank": 16}, {"rank": 8}])
    assert result.success
    assert trained == servers.started == [4, 12, 16, 8]
    assert set(servers.asked) == {case["input"] for cases in SUITE.values() for case in cases}
    # The abstention is right for all, as none calls a tool there.
    assert ranked(settings) == [(16, 4, 5), (12, 4, 5), (8, 3, 5), (4, 2, 5)]
    [made] = result.get_asset_materialization_events()
    assert made.materialization.metadata["ranked_by"].value == "development suites"
    rows = str(made.materialization.metadata["ranking"].value).splitlines()[2:]
    assert [row.split(" | ")[1:4] for row in rows][-2:] == [
        ["rank=8", "3 of 5 (60.0%)", "0.125"],
        ["rank=4", "2 of 5 (40.0%)", "0.25"],
    ]
    text = (settings.folder("lights") / "training_sweep" / "ranking.txt").read_text()
    assert text.startswith("1. development 4 of 5 (80.0%), held-out loss 0.0625, ")

    client = MlflowClient(store_uri(settings))
    experiment = client.get_experiment_by_name("lights")
    assert experiment is not None
    runs = client.search_runs(
        [experiment.experiment_id],
        filter_string=f"tags.`{SWEEP_TAG}` = '{result.run_id}'",
        order_by=["metrics.development_accuracy DESC", "metrics.held_out_loss ASC"],
    )
    assert [run.data.params["rank"] for run in runs] == ["16", "12", "8", "4"]
    assert [run.data.metrics["development_accuracy"] for run in runs] == [0.8, 0.8, 0.6, 0.4]
    assert [run.data.metrics["held_out_loss"] for run in runs] == [1 / 16, 1 / 12, 1 / 8, 1 / 4]
    digests = read_manifest(settings.folder("lights") / "training_sweep").details["ranking"]
    assert [run.data.tags[MODEL_TAG] for run in runs] == [trial["adapter"] for trial in digests]
    assert runs[0].data.metrics["loss"] == 0.5


def test_more_right_cases_outweigh_a_lower_loss(
    settings: Settings, trained: list[int], servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_sweep, "held_out_loss", lambda *paths: float((paths[2] / "rank").read_text()))
    assert materialize(trials=[{"rank": 4}, {"rank": 8}]).success
    assert ranked(settings) == [(8, 3, 5), (4, 2, 5)]


def test_a_second_sweep_trains_and_measures_only_what_is_new_and_keeps_no_other(
    settings: Settings, trained: list[int], servers: Servers
) -> None:
    assert materialize(trials=[{"rank": 4}, {"rank": 16}]).success
    assert materialize(trials=[{"rank": 16}, {"rank": 32}]).success
    assert trained == servers.started == [4, 16, 32]
    assert ranked(settings) == [(32, 4, 5), (16, 4, 5)]
    trials = list((settings.folder("lights") / "training_sweep_adapters").iterdir())
    assert sorted(int((one / "lora_adapter" / "rank").read_text()) for one in trials) == [16, 32]
    assert not [one for one in trials if (one / "merged_model").exists()], "merged weights are only for measuring"
    # What was answered wrong stays to be looked at.
    [failed] = [case for case in load_report(trials[0] / "sweep_measurement").cases if not case.passed]
    assert failed.input == "red hall"
    assert not (settings.folder("lights") / "lora_adapter").exists(), "the adapter that is served is none of these"


def test_other_cases_are_asked_of_adapters_that_are_there(
    settings: Settings, trained: list[int], servers: Servers
) -> None:
    assert materialize(trials=[{"rank": 8}]).success
    [development] = DOMAIN.development_suites
    development.write_text(json.dumps({"abstention": SUITE["abstention"]}))
    assert materialize(trials=[{"rank": 8}]).success
    assert trained == [8]
    assert servers.started == [8, 8]
    assert ranked(settings) == [(8, 1, 1)]


def test_a_sweep_whose_server_failed_goes_on_with_the_adapter_that_was_trained(
    settings: Settings, trained: list[int], servers: Servers
) -> None:
    servers.fails = True
    assert "no such model" in failure_of(materialize(trials=[{"rank": 8}]))
    [trial] = (settings.folder("lights") / "training_sweep_adapters").iterdir()
    assert not (trial / "merged_model").exists()
    servers.fails = False
    assert materialize(trials=[{"rank": 8}]).success
    assert trained == [8]
    assert ranked(settings) == [(8, 3, 5)]


def test_a_domain_without_development_suites_ranks_by_the_held_out_loss_and_says_so(
    settings: Settings, trained: list[int], servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExaminedLights, "development_suites", ())
    result = materialize(trials=[{"rank": 4}, {"rank": 16}])
    assert result.success
    assert servers.started == []
    assert ranked(settings) == [(16, 0, 0), (4, 0, 0)]
    [made] = result.get_asset_materialization_events()
    assert made.materialization.metadata["ranked_by"].value == "held-out loss, for want of development suites"
    text = (settings.folder("lights") / "training_sweep" / "ranking.txt").read_text()
    assert text.startswith(
        "The domain has no development suites: ranked by the loss on held-out examples.\n1. held-out"
    )


def test_a_training_that_diverges_comes_last_and_ends_no_sweep(
    settings: Settings, trained: list[int], servers: Servers
) -> None:
    assert materialize(trials=[{"rank": 64}, {"rank": 2}]).success
    assert ranked(settings) == [(2, 1, 5), (64, 0, 0)]
    text = (settings.folder("lights") / "training_sweep" / "ranking.txt").read_text()
    assert "\n2. diverged: rank=64\n" in text
    assert failure_of(materialize(trials=[{"rank": 64}, {"rank": 128}])).startswith(
        "Every training of the sweep diverged"
    )


def test_an_impossible_training_is_refused_before_the_first(settings: Settings, trained: list[int]) -> None:
    assert failure_of(materialize(trials=[{"rank": 4}, {"rnak": 8}])).startswith("training.rnak = 8: ")
    assert not trained


def test_a_wrong_development_suite_is_refused_before_the_first(settings: Settings, trained: list[int]) -> None:
    [development] = DOMAIN.development_suites
    development.write_text(json.dumps({"tool_selection": [{"input": "x", "expected_tool": "dim"}]}))
    assert "field expected_tool: " in failure_of(materialize(trials=[{"rank": 4}]))
    assert not trained


def test_learning_rates_are_tried_where_nothing_is_named(
    settings: Settings, trained: list[int], servers: Servers
) -> None:
    result = materialize()
    assert result.success
    assert len(trained) == 3
