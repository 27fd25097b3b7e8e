"""The LoRA adapter: training, watched live, and the check that it converged."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from taskagent_platform.artifacts import Manifest, code_version, find_artifact
from taskagent_platform.data.training_dataset import EVALUATION_FILE, TRAIN_FILE
from taskagent_platform.data.training_dataset import KIND as DATASET
from taskagent_platform.defs.figures import loss_curve
from taskagent_platform.defs.keys import AssetOptions, asset_key, domain_asset
from taskagent_platform.defs.platform import Platform, Stage
from taskagent_platform.defs.tracking import MODEL_TAG, Tracking
from taskagent_platform.domains.base import Domain
from taskagent_platform.launchers.routes import GPU_POOL
from taskagent_platform.training.base_model import KIND as BASE
from taskagent_platform.training.fine_tune import KIND, fine_tune, fine_tune_settings

CONVERGED_LOSS = 0.1
"""The specification's bound on the final training loss."""
RISING = 1.1
"""Evaluation loss at the end, as a multiple of its lowest value, from which on it counts as rising."""
_LOGGED = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_s", "examples_per_s")
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
        "and time left appear here as observations while it trains; the curve is in MLflow too.",
        code=("training",),
        pool=GPU_POOL,
    )

    @domain_asset(domain, options)
    def adapter(
        context: dg.AssetExecutionContext, platform: Platform, tracking: Tracking
    ) -> "dg.MaterializeResult[None]":
        with platform.stage(context, domain) as stage:
            inputs = {name: stage.upstream(name).digest for name in (BASE, DATASET)}
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
                **{name: manifest.details.get(name) for name in _SHOWN},
            )

    return adapter


def _train(stage: Stage, tracking: Tracking, inputs: dict[str, str]) -> Manifest:
    folder = stage.folder(DATASET)
    experiment = stage.domain.name
    with tracking.new_run(stage.settings, experiment, "fine-tuning", stage.context.run.run_id) as run:
        run.set_parameters({**fine_tune_settings(stage.settings), **{f"input.{k}": v for k, v in inputs.items()}})
        stage.say(f"MLflow run: {run.url}")

        def on_log(record: dict[str, Any]) -> None:
            if "step" not in record:
                stage.say(f"Training: {record.get('stage', record)}")
                return
            run.log({name: record[name] for name in _LOGGED if name in record}, record["step"])
            stage.observe(record, now="eval_loss" in record or record["step"] >= record["steps"])

        manifest = fine_tune(
            stage.settings,
            stage.folder(BASE),
            folder / TRAIN_FILE,
            folder / EVALUATION_FILE,
            stage.folder(),
            inputs,
            on_log,
        )
        run.set_tag(MODEL_TAG, manifest.digest)
    return manifest


def lora_adapter_checks(domain: Domain) -> dg.AssetChecksDefinition:
    """Builds the checks of the training's course.

    Divergence blocks. A final loss above the specification's bound is a warning: what the model can do is judged by
    the gates of its evaluation.
    """
    key = asset_key(domain, KIND)
    specs = [
        dg.AssetCheckSpec(
            "converged", asset=key, description=f"The training loss ends below {CONVERGED_LOSS} (a warning if not)."
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
        details = platform.finished(platform.settings(), domain, KIND).details
        final, fault = details["final_loss"], divergence(details["history"])
        yield dg.AssetCheckResult(
            check_name="converged",
            asset_key=key,
            passed=final < CONVERGED_LOSS,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"The training loss ends at {final:.4f}; the specification's bound is {CONVERGED_LOSS}.",
            metadata={"final_loss": final, "bound": CONVERGED_LOSS},
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
