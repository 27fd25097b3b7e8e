"""Trainings with different settings, ranked on held-out examples; made on demand, by a job of its own."""

import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from taskagent_platform.artifacts import code_version, digest_of, find_artifact, new_artifact, read_manifest
from taskagent_platform.data.training_dataset import EVALUATION_FILE
from taskagent_platform.data.training_dataset import KIND as DATASET
from taskagent_platform.defs.figures import table
from taskagent_platform.defs.keys import AssetOptions, asset_key, domain_asset
from taskagent_platform.defs.lora_adapter import train_tracked
from taskagent_platform.defs.platform import Platform, Stage
from taskagent_platform.defs.retrain import job_name
from taskagent_platform.defs.tracking import Tracking
from taskagent_platform.domains.base import Domain
from taskagent_platform.launchers.routes import GPU_POOL
from taskagent_platform.settings import Settings
from taskagent_platform.sweep import RANKING_FILE, Trial, described, learning_rates, ranking, ranking_text, settings_of
from taskagent_platform.training.base_model import KIND as BASE
from taskagent_platform.training.fine_tune import KIND as ADAPTER
from taskagent_platform.training.fine_tune import fine_tune_settings
from taskagent_platform.training.held_out import held_out_loss

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

KIND = "training_sweep"
SWEEP_TAG = "taskagent.sweep"
_ADAPTERS = "training_sweep_adapters"


class SweepConfig(dg.Config):
    """What is tried."""

    trials: list[dict[str, Any]] = Field(
        default=[],
        description="settings of each training, such as [{rank: 8}, {rank: 32, learning_rate: 0.001}]; names and "
        "bounds are those of `training` in settings.py, and `seed`; a third, one and three times the learning rate if "
        "empty",
    )


def training_sweep(domain: Domain) -> dg.AssetsDefinition:
    """Builds the asset."""
    options = AssetOptions(
        name=KIND,
        deps=(BASE, DATASET),
        kinds={"pytorch", "mlflow"},
        description="Several trainings with different settings, ranked by their loss on the held-out part of the "
        "dataset, here and in MLflow. It reads no suite, and changes neither the settings nor the adapter.",
        code=("training", "sweep.py"),
        pool=GPU_POOL,
        on_demand=True,
    )

    @domain_asset(domain, options)
    def sweep(
        context: dg.AssetExecutionContext, config: SweepConfig, platform: Platform, tracking: Tracking
    ) -> "dg.MaterializeResult[None]":
        with platform.stage(context, domain) as stage:
            inputs = {name: stage.upstream(name, verify=True).digest for name in (BASE, DATASET)}
            changes = config.trials or learning_rates(stage.settings)
            # All of them before the first one starts.
            chosen = settings_of(stage.settings, changes)
            trials = []
            for number, (change, settings) in enumerate(zip(changes, chosen, strict=True), 1):
                stage.say(f"Training {number} of {len(changes)}: {described(change)}")
                trials.append(_trial(stage, tracking, change, settings, inputs))
            text = ranking_text(trials)
            stage.say(text)
            with new_artifact(
                stage.folder(), kind=KIND, inputs=inputs, settings={"trials": changes},
                code_version=code_version("training", "sweep.py"),
                details={"ranking": [trial._asdict() for trial in ranking(trials)]},
            ) as scratch:  # fmt: skip
                (scratch / RANKING_FILE).write_text(text)
            _remove_others(stage, chosen)
            header = ["", "settings", "held-out loss", "training loss", "seconds", "adapter", "MLflow"]
            rows = [
                (place, described(trial.changes), trial.held_out_loss, trial.training_loss, round(trial.seconds),
                 trial.adapter[:12], trial.run)
                for place, trial in enumerate(ranking(trials), 1)
            ]  # fmt: skip
            return stage.result(
                read_manifest(stage.folder()), reused=False, trainings=len(trials), ranking=table(header, rows)
            )

    return sweep


def sweep_job(domain: Domain) -> "UnresolvedAssetJobDefinition":
    """Builds the job that makes a sweep."""
    return dg.define_asset_job(
        sweep_job_name(domain.name),
        selection=dg.AssetSelection.assets(asset_key(domain, KIND)),
        description=f"Several trainings for {domain.name} with different settings, ranked on held-out examples.",
        tags={"domain": domain.name},
    )


def sweep_job_name(domain: str) -> str:
    """Returns the name of a domain's job, built as the main job's is."""
    return job_name(domain).replace("retrain", "sweep")


def _trial(
    stage: Stage, tracking: Tracking, changes: Mapping[str, Any], settings: Settings, inputs: dict[str, str]
) -> Trial:
    """Trains and measures; an adapter of an earlier sweep that was made from just this is only measured."""
    folder = stage.folder(_ADAPTERS) / _key(settings) / ADAPTER
    experiment, name = stage.domain.name, f"sweep: {described(changes)}"
    manifest = find_artifact(
        folder,
        kind=ADAPTER,
        inputs=inputs,
        settings=fine_tune_settings(settings),
        code_version=code_version("training"),
    )
    if manifest is None:
        with tracking.new_run(settings, experiment, name, stage.context.run.run_id) as run:
            manifest = train_tracked(stage, run, settings, folder, inputs)
    run = tracking.run_of_model(settings, experiment, manifest.digest, name)
    examples = stage.folder(DATASET) / EVALUATION_FILE
    loss = held_out_loss(settings, stage.folder(BASE), folder, examples)
    run.log({"held_out_loss": loss})
    run.set_tag(SWEEP_TAG, stage.context.run.run_id)
    stage.say(f"Held-out loss {loss:.4f}: {described(changes)}")
    return Trial(changes, loss, manifest.details["final_loss"], manifest.details["seconds"], manifest.digest, run.url)


def _key(settings: Settings) -> str:
    return digest_of(fine_tune_settings(settings))[:16]


def _remove_others(stage: Stage, chosen: list[Settings]) -> None:
    """Removes the adapters of earlier sweeps."""
    kept = {_key(settings) for settings in chosen}
    for folder in stage.folder(_ADAPTERS).iterdir():
        if folder.name not in kept:
            shutil.rmtree(folder)
