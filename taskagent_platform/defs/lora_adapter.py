"""The LoRA adapter: training, watched live, and the check that it converged."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from taskagent_platform.artifacts import Manifest, code_version, find_artifact
from taskagent_platform.data.training_dataset import EVALUATION_FILE, TRAIN_FILE
from taskagent_platform.data.training_dataset import KIND as DATASET
from taskagent_platform.defs.figures import loss_curve
from taskagent_platform.defs.keys import AssetOptions, asset_key, domain_asset
from taskagent_platform.defs.platform import Platform, Stage
from taskagent_platform.defs.tracking import MODEL_TAG, TrackedRun, Tracking
from taskagent_platform.defs.training_config import TrainingConfig
from taskagent_platform.domains.base import Domain
from taskagent_platform.launchers.routes import GPU_POOL
from taskagent_platform.settings import Settings, with_training
from taskagent_platform.training.base_model import KIND as BASE
from taskagent_platform.training.fine_tune import KIND, fine_tune, fine_tune_settings

RISING = 1.1
"""Evaluation loss at the end, as a multiple of its lowest value, from which on it counts as rising."""
_LOGGED = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_s", "examples_per_s", "eta_s")
_SHOWN = (
    "final_loss", "eval_loss", "steps", "examples", "examples_per_s", "tokens_computed", "tokens_plain", "packing",
    "backend", "resumed_from", "peak_memory_gib",
)  # fmt: skip


def lora_adapter(domain: Domain) -> dg.AssetsDefinition:
    """Builds the asset."""
    options = AssetOptions(
        name=KIND,
        deps=(BASE, DATASET),
        kinds={"pytorch", "huggingface", "mlflow"},
        description="The fine-tuned part: a LoRA adapter, trained with TRL and PEFT on what the assistant says. Loss "
        "and time left appear here as observations while it trains; the curve is in MLflow too. The launchpad takes "
        "other settings for one run.",
        code=("training",),
        pool=GPU_POOL,
    )

    @domain_asset(domain, options)
    def adapter(
        context: dg.AssetExecutionContext, config: TrainingConfig, platform: Platform, tracking: Tracking
    ) -> "dg.MaterializeResult[None]":
        with platform.stage(context, domain) as stage:
            stage.settings = with_training(stage.settings, config.changes())
            inputs = {name: stage.upstream(name, verify=True).digest for name in (BASE, DATASET)}
            found = find_artifact(
                stage.folder(),
                kind=KIND,
                inputs=inputs,
                settings=fine_tune_settings(stage.settings),
                code_version=code_version("training"),
            )
            manifest = found or _train(stage, tracking, inputs)
            run = tracking.run_of_model(stage.settings, domain.name, manifest.digest, "fine-tuning")
            return stage.result(
                manifest,
                reused=found is not None,
                loss_curve=loss_curve(manifest.details["history"]),
                mlflow=dg.MetadataValue.url(run.url),
                training_seconds=round(manifest.details["seconds"], 1),
                # A later estimate needs them.
                epochs=stage.settings.training.epochs,
                **{name: manifest.details.get(name) for name in _SHOWN},
            )

    return adapter


def _train(stage: Stage, tracking: Tracking, inputs: dict[str, str]) -> Manifest:
    with tracking.new_run(stage.settings, stage.domain.name, "fine-tuning", stage.context.run.run_id) as run:
        stage.say(f"MLflow run: {run.url}")
        return train_tracked(stage, run, stage.settings, stage.folder(), inputs)


def train_tracked(
    stage: Stage, run: TrackedRun, settings: Settings, adapter_folder: Path, inputs: dict[str, str]
) -> Manifest:
    """Trains an adapter on the domain's dataset; its figures appear as they come in MLflow and at the stage's asset.

    Args:
        stage: the asset that is being made.
        run: MLflow's run.
        settings: of the training.
        adapter_folder: where the adapter goes.
        inputs: digests of base model and dataset.
    """
    data = stage.folder(DATASET)
    run.set_parameters({**fine_tune_settings(settings), **{f"input.{k}": v for k, v in inputs.items()}})
    shown: set[int] = set()

    def log(record: dict[str, Any]) -> None:
        run.log({name: record[name] for name in _LOGGED if name in record}, record["step"])

    def on_log(record: dict[str, Any]) -> None:
        if "step" not in record:
            stage.say(f"Training: {record.get('stage', record)}")
            return
        try:
            log(record)
        except Exception as error:
            # Whatever MLflow's client raises: hours of training do not end for it. The figures follow at the end.
            stage.say(f"MLflow does not take the figures of step {record['step']}: {error}")
        else:
            shown.add(record["step"])
        stage.observe(record, now="eval_loss" in record or record["step"] >= record["steps"])

    manifest = fine_tune(
        settings, stage.folder(BASE), data / TRAIN_FILE, data / EVALUATION_FILE, adapter_folder, inputs, on_log
    )
    # Steps before a run that was cut off and gone on with belong to the curve, too.
    for record in manifest.details["history"]:
        if record["step"] not in shown:
            log(record)
    run.set_tag(MODEL_TAG, manifest.digest)
    return manifest


def lora_adapter_checks(domain: Domain) -> dg.AssetChecksDefinition:
    """Builds the checks of the training's course.

    Divergence blocks. A final loss above the bound is a warning: what the model can do is judged by the gates of its
    evaluation.
    """
    key = asset_key(domain, KIND)
    specs = [
        dg.AssetCheckSpec(
            "converged",
            asset=key,
            description="The training loss ends below training.converged_loss, by default the specification's 0.1 "
            "(a warning if not).",
        ),
        dg.AssetCheckSpec(
            "no_divergence",
            asset=key,
            description="The training loss fell, and the evaluation loss did not rise again.",
            blocking=True,
        ),
    ]

    @dg.multi_asset_check(specs=specs, name=f"{domain.name}__lora_adapter_checks")
    def checks(platform: Platform) -> Iterator[dg.AssetCheckResult]:
        settings = platform.settings()
        details = platform.finished(settings, domain, KIND).details
        bound, final, fault = settings.training.converged_loss, details["final_loss"], divergence(details["history"])
        yield dg.AssetCheckResult(
            check_name="converged",
            asset_key=key,
            passed=final < bound,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"The training loss ends at {final:.4f}; the bound is {bound} (training.converged_loss).",
            metadata={"final_loss": final, "bound": bound},
        )
        yield dg.AssetCheckResult(
            check_name="no_divergence",
            asset_key=key,
            passed=fault is None,
            description=fault or "The training loss fell and the evaluation loss did not rise again.",
        )

    return checks


def divergence(history: list[dict[str, Any]]) -> str | None:
    """Returns how a training's losses went wrong, in a sentence, or None."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    if not losses:
        return "No training loss was logged."
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    # Not `last > first`, which a NaN would pass.
    if len(losses) > 1 and not last < first:
        return f"The training loss did not fall: {first:.4f} at the start, {last:.4f} at the end."
    if evaluated and not evaluated[-1] <= RISING * min(evaluated):
        return f"The evaluation loss rises: {evaluated[-1]:.4f} at the end, {min(evaluated):.4f} at its lowest."
    return None
