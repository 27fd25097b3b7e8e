"""The model card of a merged model."""

import json
from collections.abc import Mapping
from typing import Any

from taskagent_platform.artifacts import Manifest

_SETTINGS = (
    "rank", "alpha", "dropout", "frozen_layers", "init_lora_weights", "epochs", "batch_size", "gradient_accumulation",
    "pack_examples", "learning_rate", "scheduler", "warmup_ratio", "optimizer", "max_length", "dtype", "load_in_4bit",
    "seed",
)  # fmt: skip


def model_card(name: str, base: Manifest, adapter: Manifest, merged: Mapping[str, Any]) -> str:
    """Returns the README.md of a merged model.

    Args:
        name: what the model is called.
        base: the base model's manifest.
        adapter: the adapter's manifest.
        merged: details of the merge.
    """
    training = adapter.details
    eval_loss = training.get("eval_loss")
    licence = base.details.get("licence", "unknown")
    inputs = "\n".join(f"| {source} | `{digest}` |" for source, digest in sorted(adapter.inputs.items()))
    settings = "\n".join(f"| {key} | {adapter.settings[key]} |" for key in _SETTINGS if key in adapter.settings)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: other
license_name: {json.dumps(licence)}
tags: [tool-calling, lora]
---
# {name}

A tool-calling model for the domain `{name}`: {base.details.get("source")} fine-tuned with LoRA and merged. It calls
tools in the Hermes format (`<tool_call>{{"name": ..., "arguments": {{...}}}}</tool_call>`); the chat template beside
the weights is the one it was trained with.

Serve it with vLLM: `--tool-call-parser hermes --enable-auto-tool-choice --chat-template chat_template.jinja`.

## Base model
{base.details.get("source")} ({base.details.get("architecture")}, {base.details.get("parameters", 0):,} parameters).
Licence of the base model: {licence}. The merged weights are a derived work under it.

## Data
{training.get("examples", 0):,} examples, {training.get("tokens_plain", 0):,} tokens.

| made from | sha256 |
| --- | --- |
{inputs or "| not stated | |"}

## Training
{training.get("steps", 0)} steps in {training.get("seconds", 0):.0f} s with {training.get("backend")}, packing
`{training.get("packing")}`; target modules {", ".join(adapter.settings.get("target_modules", []))}.

| setting | value |
| --- | --- |
{settings}

## Metrics
| metric | value |
| --- | --- |
| training loss at the end | {training.get("final_loss", float("nan")):.4f} |
| evaluation loss | {"not measured" if eval_loss is None else format(eval_loss, ".4f")} |
| largest difference of a logit from base + adapter (share of the largest) | {merged["logit_difference"]:.1e} |

Accuracy is in the evaluation report of the same run, never in this card: it belongs to model and server together.
"""
