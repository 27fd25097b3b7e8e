"""Fine-tuning: from a base model and a dataset to a LoRA adapter."""

import json
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from taskagent_platform.artifacts import (
    Manifest,
    code_version,
    digest_of,
    file_digest,
    new_artifact,
    read_manifest,
)
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import Settings
from taskagent_platform.training._process import OnLog, run_payload

KIND = "lora_adapter"
PROBES_NAME = "probes.jsonl"
"""File of the adapter with examples on which the merged model is compared with base + adapter."""
EVALUATION_EXAMPLES = 64
"""Held-out examples at most that are evaluated at save points."""
EVALUATION_TOKENS_ON_CPU = 6144
"""Tokens at most that an evaluation computes on a CPU: 15 s of two cores at 135M parameters."""
_PROBES = 6
# How many processes share a step's batches changes nothing but how sums are rounded.
_WITHOUT_INFLUENCE = {"converged_loss", "processes", "ray_address"}


def fine_tune_settings(settings: Settings) -> dict[str, Any]:
    """Returns the settings that decide what the adapter is."""
    return {
        **settings.training.model_dump(mode="json", exclude=_WITHOUT_INFLUENCE),
        "seed": settings.seed,
        "load_in_4bit": settings.base_model.load_in_4bit,
    }


def fine_tune(
    settings: Settings,
    base_folder: Path,
    train_jsonl: Path,
    eval_jsonl: Path,
    adapter_folder: Path,
    inputs: Mapping[str, str],
    on_log: OnLog | None = None,
) -> Manifest:
    """Trains a LoRA adapter in a process of its own and publishes it.

    A run that was cut off goes on from its last checkpoint if base model, data, settings and code are the same.
    Another base model, dataset (by its digest among ``inputs``), setting or code starts anew; data that changed under
    the same digest are refused.

    Args:
        settings: ``training`` and ``seed`` are used.
        base_folder: the artifact of :func:`~taskagent_platform.training.base_model.prepare_base_model`.
        train_jsonl: one example a line: ``{"messages": [...], "tools": [...], "meta": {...}}``.
        eval_jsonl: held-out examples in the same form; may be empty.
        adapter_folder: where the adapter goes; checkpoints and the log stand beside it until it is published.
        inputs: digests of what the adapter is made from, for the manifest.
        on_log: called with every progress record: ``step``, ``steps``, ``epoch``, ``loss``, ``learning_rate``,
            ``grad_norm``, ``tokens_per_s``, ``examples_per_s``, ``eta_s``, and ``eval_loss`` at save points.

    Returns:
        The manifest. Its details hold ``final_loss``, ``eval_loss``, ``history`` (the records), ``seconds``,
        ``steps``, ``examples``, ``examples_per_s``, ``tokens_computed``, ``tokens_plain`` (without sharing),
        ``packing`` and ``backend`` as they ran, ``resumed_from`` (steps) and ``peak_memory_gib``.

    Raises:
        DivergenceError: the loss grows or is no number.
        PlatformError: a bad example (file and line), a full disk, a killed process, data that changed under a run that
            was cut off.
    """
    _refuse_without_package(settings)
    base = read_manifest(base_folder, kind="base_model")
    _refuse_to_freeze_all(settings.training.frozen_layers, base_folder)
    chosen, training = fine_tune_settings(settings), settings.training
    data = {"train": file_digest(train_jsonl), "eval": file_digest(eval_jsonl)}
    version = code_version("training")
    work = adapter_folder.parent / f".{adapter_folder.name}.training"
    # A folder for each specification: another one neither resumes from these checkpoints nor destroys them.
    specification = digest_of({"base": base.digest, "inputs": dict(inputs), "settings": chosen, "code": version})[:16]
    checkpoints = work / f"{specification}.{digest_of(data)[:16]}"
    _refuse_other_data(work, specification, checkpoints, train_jsonl)
    details: dict[str, Any] = {}
    with new_artifact(
        adapter_folder, kind=KIND, inputs=inputs, settings=chosen, code_version=version, details=details
    ) as scratch:
        result = run_payload(
            "fine_tune",
            {
                "base_folder": str(base_folder),
                "train_jsonl": str(train_jsonl),
                "eval_jsonl": str(eval_jsonl),
                "data": data,
                "settings": chosen,
                "processes": training.processes,
                "ray_address": training.ray_address,
                "adapter_folder": str(scratch),
                "checkpoints": str(checkpoints),
                "evaluation_examples": EVALUATION_EXAMPLES,
                "evaluation_tokens_on_cpu": EVALUATION_TOKENS_ON_CPU,
            },
            work / "training.log",
            on_log,
        )
        details.update(result, base=base.details)
        with (eval_jsonl if eval_jsonl.stat().st_size else train_jsonl).open() as file:
            (scratch / PROBES_NAME).write_text("".join(islice((line for line in file if line.strip()), _PROBES)))
        (scratch / "history.json").write_text(json.dumps(result["history"], indent=1))
    _remove_finished(work, checkpoints)
    return read_manifest(adapter_folder, kind=KIND)


def _remove_finished(work: Path, checkpoints: Path) -> None:
    """Removes the checkpoints of a training that ended well; of others, the last that was cut off can still go on."""
    shutil.rmtree(checkpoints, ignore_errors=True)
    others = sorted((folder for folder in work.iterdir() if folder.is_dir()), key=lambda folder: folder.stat().st_mtime)
    for folder in others[:-1]:
        shutil.rmtree(folder, ignore_errors=True)
    if not others:
        shutil.rmtree(work, ignore_errors=True)


def _refuse_without_package(settings: Settings) -> None:
    """Refuses, before anything loads, what needs a package that this environment lacks."""
    training = settings.training
    for wanted, package, remedy in (
        (training.backend == "unsloth", "unsloth", "set training.backend to trl"),
        (settings.base_model.load_in_4bit, "bitsandbytes", "set base_model.load_in_4bit to false"),
        ("8bit" in training.optimizer, "bitsandbytes", "set training.optimizer to adamw_torch"),
        (bool(training.ray_address), "ray", "install the extra ray, or leave training.ray_address empty"),
    ):
        if wanted and find_spec(package) is None:
            raise PlatformError(f"The package {package}, which the training settings ask for, is missing: {remedy}.")


def _refuse_to_freeze_all(frozen: int, base_folder: Path) -> None:
    if not frozen:
        return
    layers = json.loads((base_folder / "config.json").read_text()).get("num_hidden_layers")
    if layers is not None and frozen >= layers:
        raise PlatformError(
            f"training.frozen_layers is {frozen}, and the base model has {layers} layers: none is left to adapt; "
            f"set it below {layers}."
        )


def _refuse_other_data(work: Path, specification: str, checkpoints: Path, train_jsonl: Path) -> None:
    for last in sorted(work.glob(f"{specification}.*/checkpoint-*")):
        if last.parent != checkpoints:
            raise PlatformError(
                f"{train_jsonl} or the held-out examples beside it changed since the training that was cut off, and "
                f"its checkpoints in {last.parent} are of the old ones: put these back to go on, or delete that folder "
                "to begin anew."
            )
