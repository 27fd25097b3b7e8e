"""Merging: base model and LoRA adapter become one model that a server loads as it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taskagent_platform.artifacts import Manifest, code_version, new_artifact, read_manifest
from taskagent_platform.settings import Settings
from taskagent_platform.training._process import OnLog, run_payload
from taskagent_platform.training.fine_tune import PROBES_NAME
from taskagent_platform.training.model_card import model_card

KIND = "merged_model"
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest difference of a logit from base + adapter in float32, as a share of the largest logit, by saved dtype."""


def merge_settings(settings: Settings) -> dict[str, Any]:
    """Returns the settings that decide what the merged model is."""
    return {"dtype": settings.serving.dtype}


def merge(
    settings: Settings,
    base_folder: Path,
    adapter_folder: Path,
    merged_folder: Path,
    inputs: Mapping[str, str],
    on_log: OnLog | None = None,
) -> Manifest:
    """Merges an adapter into the 16- or 32-bit weights of its base model, in a process of its own.

    The folder holds safetensors, tokenizer, chat template, generation settings and a model card. Its logits are
    compared with those of base + adapter on the examples that travel with the adapter.

    Args:
        settings: ``serving.dtype`` is the precision that is saved.
        base_folder: the base model's artifact; never its 4-bit form.
        adapter_folder: the adapter's artifact.
        merged_folder: where the merged model goes.
        inputs: digests of what it is made from, for the manifest.
        on_log: called with ``{"stage": ...}`` records.

    Returns:
        The manifest. Its details hold ``logit_difference`` and ``logit_tolerance`` (largest difference of a logit as
        a share of the largest), ``argmax_agreement`` (share of tokens with the same best next token), ``dtype``,
        ``parameters``, ``seconds``.

    Raises:
        PlatformError: the merged model does not answer as base + adapter do, or the process failed.
    """
    base = read_manifest(base_folder, kind="base_model")
    adapter = read_manifest(adapter_folder, kind="lora_adapter")
    examples = [json.loads(line) for line in (adapter_folder / PROBES_NAME).read_text().splitlines()]
    dtype = settings.serving.dtype
    details: dict[str, Any] = {}
    with new_artifact(
        merged_folder, kind=KIND, inputs=inputs, settings=merge_settings(settings),
        code_version=code_version("training"), details=details,
    ) as scratch:  # fmt: skip
        result = run_payload(
            "merge",
            {
                "base_folder": str(base_folder),
                "adapter_folder": str(adapter_folder),
                "merged_folder": str(scratch),
                "dtype": dtype,
                "tolerance": TOLERANCE[dtype],
                "probes": [{"messages": e["messages"], "tools": e.get("tools")} for e in examples],
            },
            merged_folder.parent / f".{merged_folder.name}.log",
            on_log,
        )
        details.update(result)
        (scratch / "README.md").write_text(model_card(merged_folder.parent.name, base, adapter, details))
    return read_manifest(merged_folder, kind=KIND)
