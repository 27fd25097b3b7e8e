"""Checkpoints that are written aside and renamed, so that a killed run finds whole ones only."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from taskagent_platform.errors import PlatformError
from taskagent_platform.training._process import DivergenceError

_KEPT = 2
_SCRATCH = ".writing"

# With several processes on a CPU, transformers loads optimizer states onto "cpu:1", a place that torch does not know.
torch.serialization.register_package(
    15, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


def checkpoints(folder: Path) -> list[Path]:
    """Returns the finished checkpoints in a folder, the oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Returns the step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


class CheckpointTrainer(SFTTrainer):
    """TRL's SFTTrainer with checkpoints that appear whole or not at all; older ones are pruned."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step = self.state.global_step
        folder = Path(self.args.output_dir)
        scratch = folder / _SCRATCH
        name = f"checkpoint-{step}"
        if not all(torch.isfinite(weights).all() for weights in model.parameters() if weights.requires_grad):
            raise DivergenceError(
                f"The adapter holds values that are not finite at step {step}; lower training.learning_rate and start "
                "again. The checkpoint before is kept."
            )
        first = self.is_world_process_zero()
        if first:
            shutil.rmtree(scratch, ignore_errors=True)
        # Every process writes its own random state there.
        self.accelerator.wait_for_everyone()
        # The trainer writes below its output folder; for as long as it writes, that is the scratch folder.
        self.args.output_dir = str(scratch)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if first:
                for file in (scratch / name).iterdir():
                    with file.open("rb") as written:
                        os.fsync(written.fileno())
                shutil.rmtree(folder / name, ignore_errors=True)
                (scratch / name).rename(folder / name)
        except Exception as error:
            # torch, safetensors and tokenizers report a full disk by errors of their own; tokenizers' has no class.
            raise PlatformError(
                f"The checkpoint at step {step} could not be written to {folder} ({error}); the one before is kept. "
                "Free some space and start again: training goes on from there."
            ) from error
        finally:
            self.args.output_dir = str(folder)
            if first:
                shutil.rmtree(scratch, ignore_errors=True)
        if first:
            for old in checkpoints(folder)[:-_KEPT]:
                shutil.rmtree(old, ignore_errors=True)
