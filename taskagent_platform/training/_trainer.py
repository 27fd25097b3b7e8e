"""The training run: TRL's SFTTrainer and PEFT, on examples, on prefix-shared packs or on TRL's own packs."""

import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig, set_seed
from trl import SFTConfig

from taskagent_platform.errors import PlatformError
from taskagent_platform.training import _tree_attention
from taskagent_platform.training._checkpoints import CheckpointTrainer, checkpoint_step, checkpoints
from taskagent_platform.training._eva import start_from_activations
from taskagent_platform.training._fused import fuse
from taskagent_platform.training._pack_trainer import PackCollator, PackTrainer, attention_for
from taskagent_platform.training._progress import Emit, Progress
from taskagent_platform.training._rendering import evaluation_packs, read_examples
from taskagent_platform.training.packing import pack_all
from taskagent_platform.training.template import Rendered


class Rows(NamedTuple):
    """What the trainer is given, and how much of it there is.

    Attributes:
        train: one row for each sequence of an epoch.
        evaluation: held-out rows, or None.
        collator: makes batches of them; None for TRL's own.
        examples: examples in ``train``.
        tokens_computed: tokens that an epoch computes.
        tokens_plain: tokens of the examples one by one.
    """

    train: Dataset
    evaluation: Dataset | None
    collator: PackCollator | None
    examples: int
    tokens_computed: int
    tokens_plain: int


def train(spec: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Trains as :func:`taskagent_platform.training.fine_tune.fine_tune` describes; returns the details."""
    chosen = spec["settings"]
    set_seed(chosen["seed"])
    emit({"stage": "render"})
    tokenizer = AutoTokenizer.from_pretrained(spec["base_folder"])
    examples, held_out = read_both(spec, tokenizer)
    emit({"stage": "load"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prefix = chosen["packing"] == "prefix"
    rows = (packed_rows if prefix else plain_rows)(spec, examples, held_out, device)
    attention = attention_for(device) if prefix else "sdpa"
    _tree_attention.register()
    # Before the model: they give each process its GPU, which weights in 4 bit stay on.
    arguments = training_arguments(chosen, Path(spec["checkpoints"]), rows, device, spec["processes"])
    model = load_model(Path(spec["base_folder"]), chosen, attention, arguments.device)
    trainer = (PackTrainer if prefix else CheckpointTrainer)(
        model=model,
        args=arguments,
        data_collator=rows.collator,
        train_dataset=rows.train,
        eval_dataset=rows.evaluation,
        processing_class=tokenizer,
        peft_config=lora_config(chosen, model.config),
    )
    if device.type == "cpu":
        fuse(trainer.model)
    if chosen["init_lora_weights"] == "eva" and not checkpoints(Path(spec["checkpoints"])):
        start_from_activations(trainer, chosen["seed"])
    details = run(trainer, rows, spec, emit)
    return details | {"backend": "trl", "packing": chosen["packing"], "attention": attention}


def run(trainer: CheckpointTrainer, rows: Rows, spec: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Trains from the last checkpoint on, saves the adapter and returns the figures of the run."""
    arguments = trainer.args
    per_step = (
        arguments.train_batch_size
        * arguments.gradient_accumulation_steps
        * arguments.world_size
        / len(trainer.train_dataset)
    )
    progress = Progress(emit, rows.tokens_computed * per_step, rows.examples * per_step)
    trainer.add_callback(progress)
    found = checkpoints(Path(arguments.output_dir))
    resumed = checkpoint_step(found[-1]) if found else 0
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    last = progress.history[-1] if progress.history else {}
    if rows.evaluation is not None and not (last.get("step") == trainer.state.global_step and "eval_loss" in last):
        trainer.evaluate()
    seconds = time.monotonic() - start
    if trainer.is_world_process_zero():
        adapter = Path(spec["adapter_folder"])
        trainer.model.save_pretrained(adapter)
        # PEFT's own card holds nothing but placeholders.
        (adapter / "README.md").unlink(missing_ok=True)
    losses = [record["loss"] for record in progress.history if "loss" in record]
    eval_losses = [record["eval_loss"] for record in progress.history if "eval_loss" in record]
    return {
        "final_loss": sum(losses[-5:]) / len(losses[-5:]),
        "eval_loss": eval_losses[-1] if eval_losses else None,
        "history": progress.history,
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "examples": rows.examples,
        "examples_per_s": (trainer.state.global_step - resumed) * per_step * rows.examples / seconds,
        "tokens_computed": rows.tokens_computed,
        "tokens_plain": rows.tokens_plain,
        "resumed_from": resumed,
        "device": torch.cuda.get_device_name() if arguments.device.type == "cuda" else "cpu",
        "peak_memory_gib": peak_memory_gib(),
    }


def read_both(spec: dict[str, Any], tokenizer: Any) -> tuple[list[Rendered], list[Rendered]]:
    """Reads and renders the training and the held-out examples."""
    length, data = spec["settings"]["max_length"], spec["data"]
    examples = read_examples(Path(spec["train_jsonl"]), tokenizer, length, data["train"])
    if not examples:
        raise PlatformError(f"{spec['train_jsonl']} holds no example.")
    return examples, read_examples(Path(spec["eval_jsonl"]), tokenizer, length, data["eval"])


def packed_rows(spec: dict[str, Any], examples: list[Rendered], held_out: list[Rendered], device: torch.device) -> Rows:
    """Packs the examples behind their common beginnings; rows are indices of packs."""
    chosen = spec["settings"]
    packs = pack_all(examples, chosen["pack_examples"], chosen["seed"])
    budget = spec["evaluation_tokens_on_cpu"] if device.type == "cpu" else None
    eval_packs = evaluation_packs(held_out, spec["evaluation_examples"], chosen["pack_examples"], budget)
    collator = PackCollator([*packs, *eval_packs])
    indices = list(range(len(collator.packs)))
    return Rows(
        train=Dataset.from_dict({"index": indices[: len(packs)]}),
        evaluation=Dataset.from_dict({"index": indices[len(packs) :]}) if eval_packs else None,
        collator=collator,
        examples=len(examples),
        tokens_computed=sum(len(item.input_ids) for item in packs),
        tokens_plain=sum(item.plain_tokens for item in packs),
    )


def plain_rows(spec: dict[str, Any], examples: list[Rendered], held_out: list[Rendered], device: torch.device) -> Rows:
    """Makes a row of every example; TRL's own collator, and packing if chosen, do the rest."""
    kept: list[Rendered] = []
    tokens = 0
    for example in held_out[: spec["evaluation_examples"]]:
        tokens += len(example.input_ids)
        if kept and device.type == "cpu" and tokens > spec["evaluation_tokens_on_cpu"]:
            break
        kept.append(example)
    total = sum(len(example.input_ids) for example in examples)
    return Rows(_dataset(examples), _dataset(kept) if kept else None, None, len(examples), total, total)


def load_model(folder: Path, chosen: dict[str, Any], attention: str, device: torch.device) -> Any:
    """Loads the base model for training; in 4 bit where the settings say so."""
    quantization = None
    if chosen["load_in_4bit"]:
        if device.type != "cuda":
            raise PlatformError("base_model.load_in_4bit needs an NVIDIA GPU; set it to false to train on a CPU.")
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, chosen["dtype"]),
        )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, chosen["dtype"]), attn_implementation=attention, quantization_config=quantization
    )


def training_arguments(
    chosen: dict[str, Any], folder: Path, rows: Rows, device: torch.device, processes: int = 1, **more: Any
) -> SFTConfig:
    """Returns TRL's configuration for the chosen training settings.

    Args:
        chosen: the settings.
        folder: where checkpoints go.
        rows: what is trained on.
        device: what it is computed with.
        processes: that share the batches of a step.
        more: replaces single values.

    Raises:
        PlatformError: this machine cannot compute what the settings ask for.
    """
    _refuse_what_the_device_lacks(chosen, device, processes)
    folder.mkdir(parents=True, exist_ok=True)
    own_packing = chosen["packing"] == "trl"
    on_gpu = device.type == "cuda"
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": chosen["batch_size"],
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": chosen["gradient_accumulation"] // processes,
        "num_train_epochs": chosen["epochs"],
        "learning_rate": chosen["learning_rate"],
        "lr_scheduler_type": chosen["scheduler"],
        # A value below one is a share of all steps.
        "warmup_steps": chosen["warmup_ratio"],
        "weight_decay": chosen["weight_decay"],
        "max_grad_norm": chosen["max_grad_norm"],
        "optim": chosen["optimizer"],
        "adam_beta2": chosen["adam_beta2"],
        # On a CPU the base model is held in this precision and the adapter in float32; nothing is cast on the way.
        "bf16": on_gpu and chosen["dtype"] == "bfloat16",
        "fp16": chosen["dtype"] == "float16",
        "use_cpu": not on_gpu,
        "gradient_checkpointing": on_gpu,
        # Divergence shows step by step, and the last step belongs to the curve.
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_steps": chosen["save_every"],
        "eval_strategy": "no" if rows.evaluation is None else "steps",
        "eval_steps": chosen["save_every"],
        "prediction_loss_only": True,
        "seed": chosen["seed"],
        "data_seed": chosen["seed"],
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": chosen["packing"] != "prefix",
        "dataloader_pin_memory": on_gpu,
        "packing": own_packing,
        "eval_packing": own_packing,
        "max_length": chosen["max_length"] if own_packing else None,
        # Packs bring their own loss; plain sequences compute the vocabulary at labelled positions in chunks.
        "loss_type": "nll" if chosen["packing"] == "prefix" else "chunked_nll",
        "dataset_kwargs": None if own_packing else {"skip_prepare_dataset": True},
    }
    try:
        arguments = SFTConfig(**(values | more))
    except ValueError as error:
        raise PlatformError(f"The training settings cannot be used: {error}") from error
    # Asking for the device sets it up. One process computes on one GPU; transformers would spread it over all.
    if arguments.device.type == "cuda" and arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _refuse_what_the_device_lacks(chosen: dict[str, Any], device: torch.device, processes: int) -> None:
    if device.type == "cpu":
        if chosen["dtype"] == "float16":
            raise PlatformError("training.dtype float16 needs a GPU; set it to auto, bfloat16 or float32.")
        return
    if chosen["dtype"] == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise PlatformError(f"{torch.cuda.get_device_name()} has no bfloat16; set training.dtype to float16.")
    if processes > torch.cuda.device_count() and not dist.is_initialized():
        raise PlatformError(
            f"training.processes is {processes}, and this machine has {torch.cuda.device_count()} GPUs: one for each "
            "is needed."
        )


def lora_config(chosen: dict[str, Any], model: PretrainedConfig) -> LoraConfig:
    """Returns PEFT's configuration for the chosen training settings on a model of the given configuration."""
    return LoraConfig(
        r=chosen["rank"],
        lora_alpha=chosen["alpha"],
        lora_dropout=chosen["dropout"],
        target_modules=list(chosen["target_modules"]),
        layers_to_transform=adapted_layers(chosen, model),
        bias="none",
        task_type="CAUSAL_LM",
    )


def adapted_layers(chosen: dict[str, Any], model: PretrainedConfig) -> list[int] | None:
    """Returns the layers that get an adapter; None for all of them."""
    frozen = chosen["frozen_layers"]
    return list(range(frozen, model.num_hidden_layers)) if frozen else None


def peak_memory_gib() -> float:
    """Returns the most memory that this process has held: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _dataset(examples: list[Rendered]) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [one.input_ids for one in examples], "labels": [one.labels for one in examples]}
    )
