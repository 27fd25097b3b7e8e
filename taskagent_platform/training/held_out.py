"""The loss of an adapter on held-out examples, by which trainings with different settings can be compared."""

from pathlib import Path

from taskagent_platform.artifacts import file_digest
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import Settings
from taskagent_platform.training._process import OnLog, run_payload


def held_out_loss(
    settings: Settings, base_folder: Path, adapter_folder: Path, examples: Path, on_log: OnLog | None = None
) -> float:
    """Measures an adapter in a process of its own: on all examples, in the same packs whatever it was trained with.

    Args:
        settings: ``training.dtype`` and ``training.max_length`` are used; the base model is not taken in 4 bit.
        base_folder: the base model's artifact.
        adapter_folder: the adapter's artifact; the log stands beside it.
        examples: a JSONL file of examples.
        on_log: called with ``{"stage": ...}`` records.

    Returns:
        The cross entropy, averaged over all tokens that the assistant says in the examples.

    Raises:
        PlatformError: there is no example, or one cannot be read.
    """
    if not examples.stat().st_size:
        raise PlatformError(f"{examples} holds no example.")
    result = run_payload(
        "held_out_loss",
        {
            "base_folder": str(base_folder),
            "adapter_folder": str(adapter_folder),
            "examples": str(examples),
            "digest": file_digest(examples),
            "dtype": settings.training.dtype,
            "max_length": settings.training.max_length,
        },
        adapter_folder.with_name(f".{adapter_folder.name}.held_out.log"),
        on_log,
    )
    return float(result["loss"])
