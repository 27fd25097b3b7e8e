"""Progress records of a training run, and the stop of one that diverges."""

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from taskagent_platform.training._process import DivergenceError

Emit = Callable[[dict[str, Any]], None]

_WINDOW = 10
_FACTOR = 2.0


class Progress(TrainerCallback):
    """Emits a record for every logged step.

    Attributes:
        history: the records, those of the steps before a resumed one included.
    """

    def __init__(self, emit: Emit, tokens_per_step: float, examples_per_step: float) -> None:
        self.history: list[dict[str, Any]] = []
        self._emit = emit
        self._tokens_per_step = tokens_per_step
        self._examples_per_step = examples_per_step
        self._seconds: list[float] = []
        self._step_start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes over what a checkpoint recorded."""
        self.history = [record for entry in state.log_history if (record := _record(state, entry))]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock of a step."""
        self._step_start = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stops the clock of a step."""
        self._seconds.append(time.monotonic() - self._step_start)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Emits a record and refuses a loss that is not finite or diverges."""
        record = _record(state, {"step": state.global_step, "epoch": state.epoch, **(logs or {})})
        if record is None:
            return
        if "loss" in record:
            # The first step also touches all memory for the first time and would spoil the estimate.
            seconds = self._seconds[1:] or self._seconds or [math.inf]
            mean = sum(seconds) / len(seconds)
            record |= {
                "tokens_per_s": self._tokens_per_step / mean,
                "examples_per_s": self._examples_per_step / mean,
                "eta_s": (state.max_steps - state.global_step) * mean,
            }
        self.history.append(record)
        self._emit(record)
        if "loss" in record:
            self._check(state.global_step)

    def _check(self, step: int) -> None:
        losses = [record["loss"] for record in self.history if "loss" in record]
        if not math.isfinite(losses[-1]):
            raise DivergenceError(
                f"The loss is {losses[-1]} at step {step}; lower training.learning_rate and start again. "
                "The last good checkpoint is kept."
            )
        first, last = losses[:_WINDOW], losses[-_WINDOW:]
        if len(losses) >= 2 * _WINDOW and sum(last) > _FACTOR * sum(first):
            raise DivergenceError(
                f"The loss diverges: {sum(last) / _WINDOW:.2f} on average before step {step}, "
                f"{sum(first) / _WINDOW:.2f} at the start; lower training.learning_rate and start again. "
                "The last good checkpoint is kept."
            )


def _record(state: TrainerState, entry: dict[str, Any]) -> dict[str, Any] | None:
    names = ("loss", "learning_rate", "grad_norm", "eval_loss")
    kept: dict[str, Any] = {name: entry[name] for name in names if name in entry}
    if "loss" not in kept and "eval_loss" not in kept:
        return None
    return {"step": entry["step"], "steps": state.max_steps, "epoch": entry["epoch"], **kept}
