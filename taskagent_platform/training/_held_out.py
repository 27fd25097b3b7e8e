"""The loss of an adapter on examples that it was not trained on, whatever it was trained with."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from taskagent_platform.training import _tree_attention
from taskagent_platform.training._fused import fuse
from taskagent_platform.training._pack_trainer import PackCollator, attention_for, pack_loss
from taskagent_platform.training._process import OnLog
from taskagent_platform.training._rendering import read_examples
from taskagent_platform.training.packing import pack_all

_PACK = 16


def held_out_loss(spec: dict[str, Any], emit: OnLog) -> dict[str, Any]:
    """Measures as :func:`taskagent_platform.training.held_out.held_out_loss` describes; returns ``loss``."""
    emit({"stage": "measure"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(spec["base_folder"])
    examples = read_examples(Path(spec["examples"]), tokenizer, spec["max_length"], spec["digest"])
    _tree_attention.register()
    base = AutoModelForCausalLM.from_pretrained(
        spec["base_folder"], dtype=getattr(torch, spec["dtype"]), attn_implementation=attention_for(device)
    )
    model = PeftModel.from_pretrained(base, spec["adapter_folder"]).to(device).eval()
    if device.type == "cpu":
        fuse(model)
    packs = pack_all(examples, _PACK)
    collate = PackCollator(packs)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for index in range(len(packs)):
            batch = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in collate([{"index": index}]).items()
            }
            # The sum over the labels, so that every token counts alike.
            total += pack_loss(model, batch, 1).item()
            tokens += len(batch["labels"])
    return {"loss": total / tokens}
