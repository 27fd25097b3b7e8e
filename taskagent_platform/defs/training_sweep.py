"""Trainings with different settings, ranked on the development suites; made on demand, by a job of its own."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from taskagent_platform.artifacts import code_version, digest_of, find_artifact, new_artifact, read_manifest
from taskagent_platform.data.training_dataset import EVALUATION_FILE
from taskagent_platform.data.training_dataset import KIND as DATASET
from taskagent_platform.defs.eval_report import measure, measured_with, model_server
from taskagent_platform.defs.figures import table
from taskagent_platform.defs.keys import AssetOptions, asset_key, domain_asset
from taskagent_platform.defs.lora_adapter import train_tracked
from taskagent_platform.defs.platform import Platform, Stage, remove_leftovers
from taskagent_platform.defs.retrain import job_name
from taskagent_platform.defs.tracking import Tracking
from taskagent_platform.domains.base import Domain
from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.report import REPORT_FILE, EvalReport
from taskagent_platform.evaluation.run import conditions
from taskagent_platform.evaluation.suite import Suite, Suites, load_suite
from taskagent_platform.launchers.routes import GPU_POOL
from taskagent_platform.settings import Settings
from taskagent_platform.sweep import RANKING_FILE, Trial, described, learning_rates, ranking, ranking_text, settings_of
from taskagent_platform.training._process import DivergenceError
from taskagent_platform.training.base_model import KIND as BASE
from taskagent_platform.training.fine_tune import KIND as ADAPTER
from taskagent_platform.training.fine_tune import fine_tune_settings
from taskagent_platform.training.held_out import held_out_loss
from taskagent_platform.training.merge import KIND as MERGED
from taskagent_platform.training.merge import merge

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

KIND = "training_sweep"
SWEEP_TAG = "taskagent.sweep"
_TRIALS = "training_sweep_adapters"
_MEASUREMENT = "sweep_measurement"


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
        kinds={"pytorch", "vllm", "mlflow"},
        description="Several trainings with different settings, each merged, served and asked the development suites, "
        "and ranked by what it gets right, here and in MLflow; by the loss on the held-out part of the dataset where "
        "the domain has no development suites. It reads no suite that gates or is reported, and changes neither the "
        "settings nor the adapter.",
        code=("training", "evaluation", "sweep.py"),
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
            # All of them, and the cases, before the first one starts.
            chosen = settings_of(stage.settings, changes)
            development = load_suite(domain.development_suites, domain) if domain.development_suites else None
            trials = []
            for number, (change, settings) in enumerate(zip(changes, chosen, strict=True), 1):
                stage.say(f"Training {number} of {len(changes)}: {described(change)}")
                trials.append(_trial(stage, tracking, change, settings, inputs, development))
            if all(trial.diverged for trial in trials):
                raise PlatformError("Every training of the sweep diverged; name lower learning rates.")
            text = ranking_text(trials)
            stage.say(text)
            with new_artifact(
                stage.folder(), kind=KIND, inputs={**inputs, **_asked(stage, development)},
                settings={"trials": changes},
                code_version=code_version("training", "evaluation", "sweep.py"),
                details={"ranking": [trial._asdict() for trial in ranking(trials)]},
            ) as scratch:  # fmt: skip
                (scratch / RANKING_FILE).write_text(text)
            _remove_others(stage, chosen)
            header = ["", "settings", "development", "held-out loss", "training loss", "seconds", "adapter", "MLflow"]
            rows = [
                (place, described(trial.changes), trial.development, trial.held_out_loss, trial.training_loss,
                 round(trial.seconds), trial.adapter[:12], trial.run)
                for place, trial in enumerate(ranking(trials), 1)
            ]  # fmt: skip
            return stage.result(
                read_manifest(stage.folder()),
                reused=False,
                trainings=len(trials),
                ranked_by="development suites" if development else "held-out loss, for want of development suites",
                ranking=table(header, rows),
            )

    return sweep


def sweep_job(domain: Domain) -> "UnresolvedAssetJobDefinition":
    """Builds the job that makes a sweep, and the data and the base model that it needs, reused where up to date."""
    return dg.define_asset_job(
        sweep_job_name(domain.name),
        selection=dg.AssetSelection.assets(asset_key(domain, KIND)).upstream(),
        description=f"Several trainings for {domain.name} with different settings, ranked on the development suites.",
        tags={"domain": domain.name},
    )


def sweep_stages(domain: Domain) -> tuple[str, ...]:
    """Returns the names of the assets that the job makes."""
    return (BASE, *domain.sources, DATASET, KIND)


def sweep_job_name(domain: str) -> str:
    """Returns the name of a domain's job, built as the main job's is."""
    return job_name(domain).replace("retrain", "sweep")


def _trial(
    stage: Stage,
    tracking: Tracking,
    changes: Mapping[str, Any],
    settings: Settings,
    inputs: dict[str, str],
    development: Suite | None,
) -> Trial:
    """Trains and measures; what an earlier sweep made from just this is taken as it is."""
    folder = stage.folder(_TRIALS) / _key(settings)
    for name in (ADAPTER, MERGED, _MEASUREMENT):
        remove_leftovers(folder / name)
    experiment, name = stage.domain.name, f"sweep: {described(changes)}"
    manifest = find_artifact(
        folder / ADAPTER,
        kind=ADAPTER,
        inputs=inputs,
        settings=fine_tune_settings(settings),
        code_version=code_version("training"),
    )
    if manifest is None:
        try:
            with tracking.new_run(settings, experiment, name, stage.context.run.run_id) as run:
                manifest = train_tracked(stage, run, settings, folder / ADAPTER, inputs)
        except DivergenceError as error:
            stage.say(f"{described(changes)}: {error}")
            return Trial(changes, run.url, diverged=True)
    measured = _measurement(stage, settings, folder, {**inputs, ADAPTER: manifest.digest}, development)
    run = tracking.run_of_model(settings, experiment, manifest.digest, name)
    trial = Trial(
        changes,
        run.url,
        training_loss=manifest.details["final_loss"],
        seconds=manifest.details["seconds"],
        adapter=manifest.digest,
        **measured,
    )
    run.log({"held_out_loss": trial.held_out_loss})
    if trial.cases:
        run.log({"development_accuracy": trial.right / trial.cases, "development_cases": trial.cases})
    run.set_tag(SWEEP_TAG, stage.context.run.run_id)
    stage.say(f"Development {trial.development}, held-out loss {trial.held_out_loss:.4f}: {described(changes)}")
    return trial


def _measurement(
    stage: Stage, settings: Settings, folder: Path, inputs: Mapping[str, str], development: Suite | None
) -> Mapping[str, Any]:
    """Returns an adapter's held-out loss, how many development cases there are and how many it gets right."""
    made_from: dict[str, Any] = {
        "kind": _MEASUREMENT,
        "inputs": {**inputs, **_asked(stage, development)},
        "settings": measured_with(settings) if development else {},
        "code_version": code_version("training", "evaluation", "serving/server.py"),
    }
    found = find_artifact(folder / _MEASUREMENT, **made_from)
    if found is not None:
        return found.details
    details: dict[str, Any] = {"right": 0, "cases": 0}
    with new_artifact(folder / _MEASUREMENT, **made_from, details=details) as scratch:
        examples = stage.folder(DATASET) / EVALUATION_FILE
        details["held_out_loss"] = held_out_loss(settings, stage.folder(BASE), folder / ADAPTER, examples)
        if development is not None:
            report = _development_report(stage, settings, folder, inputs, development)
            details |= {"right": sum(case.passed for case in report.cases), "cases": len(report.cases)}
            (scratch / REPORT_FILE).write_text(report.model_dump_json(indent=1), encoding="utf-8")
    return details


def _asked(stage: Stage, development: Suite | None) -> dict[str, str]:
    """Returns the identities of what a model is asked, and under which conditions."""
    if development is None:
        return {}
    asked_with = conditions(stage.settings, stage.domain, Suites(development, None))
    return {"development": development.digest, "conditions": asked_with}


def _development_report(
    stage: Stage, settings: Settings, folder: Path, inputs: Mapping[str, str], development: Suite
) -> EvalReport:
    """Measures the merged model as it would be served; its weights are kept no longer than that."""
    merged = folder / MERGED
    stage.observe({"what": "merging and serving"}, now=True)
    try:
        made_of = {name: inputs[name] for name in (BASE, ADAPTER)}
        manifest = merge(settings, stage.folder(BASE), folder / ADAPTER, merged, made_of)
        with model_server(stage, merged, manifest) as server:
            return measure(stage, server, development, measure_latency=False)
    finally:
        shutil.rmtree(merged, ignore_errors=True)


def _key(settings: Settings) -> str:
    return digest_of(fine_tune_settings(settings))[:16]


def _remove_others(stage: Stage, chosen: list[Settings]) -> None:
    """Removes the adapters of earlier sweeps."""
    kept = {_key(settings) for settings in chosen}
    for folder in stage.folder(_TRIALS).iterdir():
        if folder.name not in kept:
            shutil.rmtree(folder)
