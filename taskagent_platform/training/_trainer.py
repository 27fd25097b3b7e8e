"""The trainer: TRL's SFTTrainer and PEFT, with prefix-shared packs and checkpoints that survive being killed."""

import json
import math
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from taskagent_platform.artifacts import file_digest
from taskagent_platform.errors import PlatformError
from taskagent_platform.training import _tree_attention
from taskagent_platform.training.packing import Node, Pack, join, pack_all
from taskagent_platform.training.template import Rendered, render

Emit = Callable[[dict[str, Any]], None]

_KEPT_CHECKPOINTS = 2
_DIVERGENCE_WINDOW = 10
_DIVERGENCE_FACTOR = 2.0


class Nodes:
    """A pack's nodes, in a wrapper that data loaders pass on untouched."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes


class PackCollator:
    """Turns rows ``{"index": i}`` into the tensors of one sequence of packs."""

    def __init__(self, packs: list[Pack]) -> None:
        self.packs = packs

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns ids and positions ``[1, tokens]``, label positions and labels ``[labels]``, and the nodes."""
        joined = join([self.packs[row["index"]] for row in rows])
        labels = torch.tensor(joined.labels)
        return {
            "input_ids": torch.tensor([joined.input_ids]),
            "position_ids": torch.tensor([joined.position_ids]),
            "label_positions": torch.tensor(joined.label_positions),
            # The trainer counts the labels of a step under the second name; they are shifted already.
            "labels": labels,
            "shift_labels": labels,
            "nodes": Nodes(joined.nodes),
        }


class PackTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer over prefix-shared packs."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the cross entropy averaged over the labelled tokens of the step."""
        loss = pack_loss(model, inputs, num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        save_checkpoint_aside(self, super()._save_checkpoint, model, trial)


def pack_loss(model: torch.nn.Module, inputs: dict[str, Any], label_count: Tensor | int | None = None) -> Tensor:
    """Returns the loss of a collated pack; the vocabulary is computed at labelled positions only.

    Args:
        model: a causal language model, or a PEFT model around one.
        inputs: what :class:`PackCollator` returns.
        label_count: divides the summed loss; the pack's own number of labels if None.
    """
    logits = model(
        input_ids=inputs["input_ids"],
        position_ids=inputs["position_ids"],
        nodes=inputs["nodes"].nodes,
        logits_to_keep=inputs["label_positions"],
        use_cache=False,
    ).logits[0]
    labels = inputs["labels"]
    loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return loss / (len(labels) if label_count is None else label_count)


def save_checkpoint_aside(
    trainer: SFTTrainer, save: Callable[[torch.nn.Module, Any], None], model: torch.nn.Module, trial: Any
) -> None:
    """Lets the trainer write its checkpoint into a scratch folder, then renames it and prunes old ones."""
    folder = Path(trainer.args.output_dir)
    scratch = folder / ".writing"
    shutil.rmtree(scratch, ignore_errors=True)
    if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
        raise PlatformError(f"The adapter is not finite at step {trainer.state.global_step}; lower the learning rate.")
    trainer.args.output_dir = str(scratch)
    try:
        save(model, trial)
        name = f"checkpoint-{trainer.state.global_step}"
        for file in (scratch / name).iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        shutil.rmtree(folder / name, ignore_errors=True)
        (scratch / name).rename(folder / name)
    except OSError as error:
        raise PlatformError(
            f"The checkpoint at step {trainer.state.global_step} could not be written to {folder}: {error.strerror or error}; "
            "free some space and start again: training goes on from the checkpoint before."
        ) from error
    finally:
        trainer.args.output_dir = str(folder)
        shutil.rmtree(scratch, ignore_errors=True)
    for old in checkpoints(folder)[:-_KEPT_CHECKPOINTS]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Returns the finished checkpoints in a folder, the oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


class Progress(TrainerCallback):
    """Emits a record for every logged step and stops a run that diverges."""

    def __init__(self, emit: Emit, tokens_per_step: float, examples_per_step: float) -> None:
        self._emit = emit
        self._tokens_per_step = tokens_per_step
        self._examples_per_step = examples_per_step
        self._busy = 0.0
        self._steps = 0
        self._step_start = time.monotonic()
        self.losses: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step_start = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._busy += time.monotonic() - self._step_start
        self._steps += 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        record: dict[str, Any] = {"step": state.global_step, "steps": state.max_steps, "epoch": state.epoch}
        if "eval_loss" in logs:
            record["eval_loss"] = logs["eval_loss"]
        elif "loss" in logs:
            seconds = self._busy / max(self._steps, 1)
            record |= {name: logs[name] for name in ("loss", "learning_rate", "grad_norm") if name in logs}
            record |= {
                "tokens_per_s": self._tokens_per_step / seconds,
                "examples_per_s": self._examples_per_step / seconds,
                "eta_s": (state.max_steps - state.global_step) * seconds,
            }
            self._check(state.global_step, logs["loss"])
        else:
            return
        self._emit(record)

    def _check(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise PlatformError(f"The loss is {loss} at step {step}; lower training.learning_rate and start again.")
        self.losses.append(loss)
        first, last = self.losses[:_DIVERGENCE_WINDOW], self.losses[-_DIVERGENCE_WINDOW:]
        if len(self.losses) >= 2 * _DIVERGENCE_WINDOW and sum(last) > _DIVERGENCE_FACTOR * sum(first):
            raise PlatformError(
                f"The loss diverges: {sum(last) / len(last):.2f} on average before step {step}, "
                f"{sum(first) / len(first):.2f} at the start; lower training.learning_rate and start again."
            )


def train(spec: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Trains as :func:`taskagent_platform.training.fine_tune.fine_tune` describes; returns the details."""
    chosen = spec["settings"]
    set_seed(chosen["seed"])
    emit({"stage": "render"})
    tokenizer = AutoTokenizer.from_pretrained(spec["base_folder"])
    train_set = read_examples(Path(spec["train_jsonl"]), tokenizer, chosen["max_length"], spec["data"]["train"])
    eval_set = read_examples(Path(spec["eval_jsonl"]), tokenizer, chosen["max_length"], spec["data"]["eval"])
    if not train_set:
        raise PlatformError(f"{spec['train_jsonl']} holds no example.")
    if chosen["backend"] == "unsloth":
        from taskagent_platform.training import _unsloth

        return _unsloth.train(spec, train_set, eval_set, tokenizer, emit)
    emit({"stage": "load"})
    on_gpu = torch.cuda.is_available()
    budget = None if on_gpu else spec["evaluation_tokens_on_cpu"]
    eval_packs = evaluation_packs(eval_set, spec["evaluation_examples"], chosen["pack_examples"], budget)
    packs = list(pack_all(train_set, chosen["pack_examples"]))
    _tree_attention.register()
    model = AutoModelForCausalLM.from_pretrained(
        spec["base_folder"], dtype=getattr(torch, chosen["dtype"]), attn_implementation=_tree_attention.TREE
    )
    folder = Path(spec["checkpoints"])
    folder.mkdir(parents=True, exist_ok=True)
    arguments = training_arguments(chosen, folder, has_evaluation=bool(eval_packs))
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    history: list[dict[str, Any]] = []

    def record(entry: dict[str, Any]) -> None:
        history.append(entry)
        emit(entry)

    tokens = sum(len(item.input_ids) for item in packs)
    progress = Progress(record, tokens / len(packs) * per_step, len(train_set) / len(packs) * per_step)
    collator = PackCollator([*packs, *eval_packs])
    trainer = PackTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=Dataset.from_dict({"index": list(range(len(packs)))}),
        eval_dataset=Dataset.from_dict({"index": list(range(len(packs), len(collator.packs)))}) if eval_packs else None,
        processing_class=tokenizer,
        peft_config=lora_config(chosen),
        callbacks=[progress],
    )
    found = checkpoints(folder)
    resumed = int(found[-1].name.rpartition("-")[2]) if found else 0
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    seconds = time.monotonic() - start
    adapter = Path(spec["adapter_folder"])
    trainer.model.save_pretrained(adapter)
    (adapter / "README.md").unlink(missing_ok=True)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    eval_losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    done = max(trainer.state.global_step - resumed, 1)
    return {
        "final_loss": sum(losses[-5:]) / max(len(losses[-5:]), 1),
        "eval_loss": eval_losses[-1] if eval_losses else None,
        "history": history,
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "examples": len(train_set),
        "examples_per_s": done * per_step * len(train_set) / len(packs) / seconds,
        "tokens_computed": tokens,
        "tokens_plain": sum(item.plain_tokens for item in packs),
        "packing": "prefix",
        "backend": "trl",
        "resumed_from": resumed,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def training_arguments(chosen: dict[str, Any], folder: Path, *, has_evaluation: bool, **more: Any) -> SFTConfig:
    """Returns TRL's configuration for the chosen training settings."""
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=chosen["batch_size"],
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=chosen["gradient_accumulation"],
        num_train_epochs=chosen["epochs"],
        learning_rate=chosen["learning_rate"],
        lr_scheduler_type=chosen["scheduler"],
        warmup_steps=chosen["warmup_ratio"],
        weight_decay=chosen["weight_decay"],
        max_grad_norm=chosen["max_grad_norm"],
        optim=chosen["optimizer"],
        bf16=chosen["dtype"] == "bfloat16",
        fp16=chosen["dtype"] == "float16",
        gradient_checkpointing=False,
        logging_steps=chosen["log_every"],
        logging_nan_inf_filter=False,
        save_steps=chosen["save_every"],
        eval_strategy="steps" if has_evaluation else "no",
        eval_steps=chosen["save_every"],
        prediction_loss_only=True,
        seed=chosen["seed"],
        data_seed=chosen["seed"],
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        max_length=None,
        loss_type="nll",
        dataset_kwargs={"skip_prepare_dataset": True},
        **more,
    )


def lora_config(chosen: dict[str, Any]) -> LoraConfig:
    """Returns PEFT's configuration for the chosen training settings."""
    return LoraConfig(
        r=chosen["rank"],
        lora_alpha=chosen["alpha"],
        lora_dropout=chosen["dropout"],
        target_modules=list(chosen["target_modules"]),
        bias="none",
        task_type="CAUSAL_LM",
    )


def read_examples(path: Path, tokenizer: Any, max_length: int, digest: str | None = None) -> list[Rendered]:
    """Reads and renders a JSONL file of examples.

    Raises:
        PlatformError: the file changed since ``digest`` was taken, or a line is no example or is too long.
    """
    if digest is not None and file_digest(path) != digest:
        raise PlatformError(f"{path} changed while training was starting; start again.")
    examples = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                example = json.loads(line)
                rendered = render(example["messages"], example.get("tools"), tokenizer)
            except json.JSONDecodeError as error:
                raise PlatformError(f"{path}, line {number}: not JSON: {error}.") from error
            except (KeyError, TypeError) as error:
                raise PlatformError(f"{path}, line {number}: not an example; {error!r} is missing or wrong.") from error
            except PlatformError as error:
                raise PlatformError(f"{path}, line {number}: {error}") from error
            if len(rendered.input_ids) > max_length:
                raise PlatformError(
                    f"{path}, line {number}: {len(rendered.input_ids)} tokens, but training.max_length is {max_length}."
                )
            examples.append(rendered)
    return examples


def evaluation_packs(examples: list[Rendered], count: int, size: int, token_budget: int | None) -> list[Pack]:
    """Packs a bounded sample of held-out examples: the packs that share most come first.

    Args:
        examples: the held-out examples.
        count: examples at most.
        size: examples of one pack at most.
        token_budget: tokens at most that the packs compute; None for no bound.
    """
    packs = sorted(pack_all(examples, size), key=lambda item: len(item.input_ids) / item.examples)
    kept: list[Pack] = []
    for item in packs:
        examples_kept = sum(one.examples for one in kept)
        tokens = sum(len(one.input_ids) for one in kept)
        over = token_budget is not None and kept and tokens + len(item.input_ids) > token_budget
        if not over and (not kept or examples_kept + item.examples <= count):
            kept.append(item)
    return kept
