"""Checkpoints that are written aside and renamed, so that a killed run finds whole ones only."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from taskagent_platform.errors import PlatformError

_KEPT = 2
_SCRATCH = ".writing"


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
            raise PlatformError(
                f"The adapter holds values that are not finite at step {step}; lower training.learning_rate and start "
                "again. The checkpoint before is kept."
            )
        if self.is_world_process_zero():
            shutil.rmtree(scratch, ignore_errors=True)
        # The trainer writes below its output folder; for as long as it writes, that is the scratch folder.
        self.args.output_dir = str(scratch)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                for file in (scratch / name).iterdir():
                    with file.open("rb") as written:
                        os.fsync(written.fileno())
                shutil.rmtree(folder / name, ignore_errors=True)
                (scratch / name).rename(folder / name)
        except (OSError, RuntimeError) as error:
            # torch and safetensors report a full disk as an error of their own.
            raise PlatformError(
                f"The checkpoint at step {step} could not be written to {folder} ({error}); the one before is kept. "
                "Free some space and start again: training goes on from there."
            ) from error
        finally:
            self.args.output_dir = str(folder)
            shutil.rmtree(scratch, ignore_errors=True)
        for old in checkpoints(folder)[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
