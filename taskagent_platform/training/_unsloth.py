"""The training run on a GPU through Unsloth: the same settings, Unsloth's kernels.

Unsloth's attention kernels take no mask, so prefix-shared packs cannot be computed with them; where they are asked
for, TRL's own packing runs instead, and the details of the run say so.
"""

from pathlib import Path
from typing import Any

from unsloth import FastLanguageModel  # isort: skip  # patches transformers and TRL, so it is imported before them

import torch
from transformers import AutoTokenizer, set_seed

from taskagent_platform.errors import PlatformError
from taskagent_platform.training._checkpoints import CheckpointTrainer
from taskagent_platform.training._progress import Emit
from taskagent_platform.training._trainer import adapted_layers, plain_rows, read_both, run, training_arguments


def train(spec: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Trains as :func:`taskagent_platform.training.fine_tune.fine_tune` describes; returns the details."""
    if not torch.cuda.is_available():
        raise PlatformError("training.backend unsloth needs an NVIDIA GPU; set it to trl to train on a CPU.")
    chosen = dict(spec["settings"])
    asked = chosen["packing"]
    if asked == "prefix":
        chosen["packing"] = "trl"
    set_seed(chosen["seed"])
    emit({"stage": "render"})
    tokenizer = AutoTokenizer.from_pretrained(spec["base_folder"])
    examples, held_out = read_both(spec, tokenizer)
    emit({"stage": "load"})
    device = torch.device("cuda")
    rows = plain_rows(spec, examples, held_out, device)
    # Before the model, so that what cannot be is refused first. It checkpoints its activations itself, and its own
    # patched loss replaces TRL's chunked one.
    folder, processes = Path(spec["checkpoints"]), spec["processes"]
    arguments = training_arguments(
        chosen, folder, rows, device, processes, gradient_checkpointing=False, loss_type="nll"
    )
    model, _ = FastLanguageModel.from_pretrained(
        model_name=spec["base_folder"],
        max_seq_length=chosen["max_length"],
        dtype=getattr(torch, chosen["dtype"]),
        load_in_4bit=chosen["load_in_4bit"],
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=chosen["rank"],
        lora_alpha=chosen["alpha"],
        lora_dropout=chosen["dropout"],
        target_modules=list(chosen["target_modules"]),
        layers_to_transform=adapted_layers(chosen, model.config),
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=chosen["seed"],
    )
    trainer = CheckpointTrainer(
        model=model,
        args=arguments,
        train_dataset=rows.train,
        eval_dataset=rows.evaluation,
        processing_class=tokenizer,
    )
    details = run(trainer, rows, spec, emit)
    return details | {"backend": "unsloth", "packing": chosen["packing"], "packing_asked": asked}
