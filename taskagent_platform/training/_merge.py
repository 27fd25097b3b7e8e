"""The merge itself, run in a process of its own."""

import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from taskagent_platform.errors import PlatformError
from taskagent_platform.training import template

Emit = Callable[[dict[str, Any]], None]

_TOKENIZER_FILES = {
    template.TEMPLATE_NAME,
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
}


def merge_adapter(spec: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Merges as :func:`taskagent_platform.training.merge.merge` describes; returns the details.

    The adapter's product is added in float32, whatever precision the base has, and rounded once, at the end.
    """
    start = time.monotonic()
    base_folder, target = Path(spec["base_folder"]), Path(spec["merged_folder"])
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    dtype = getattr(torch, spec["dtype"])
    emit({"stage": "load"})
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, spec["adapter_folder"]).eval()
    texts = [template.render_text(example["messages"], example["tools"], tokenizer) for example in spec["probes"]]
    probes = [torch.tensor([tokenizer.encode(text, add_special_tokens=False)]) for text in texts]
    emit({"stage": "merge"})
    with torch.no_grad():
        expected = [adapted(probe).logits[0] for probe in probes]
    merged = adapted.merge_and_unload(safe_merge=True).to(dtype)
    merged.generation_config = GenerationConfig.from_pretrained(base_folder)
    merged.save_pretrained(target)
    # The very files that training read: saved again, a tokenizer's settings may come out otherwise.
    for file in base_folder.iterdir():
        if file.name in _TOKENIZER_FILES:
            shutil.copyfile(file, target / file.name)
    parameters = sum(parameter.numel() for parameter in merged.parameters())
    # Two models at a time are as many as a machine should have to hold.
    del base, adapted, merged
    emit({"stage": "check"})
    # What is checked is what was written, read as a server reads it.
    saved = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    difference, agreeing, tokens = 0.0, 0, 0
    with torch.no_grad():
        for probe, reference in zip(probes, expected, strict=True):
            logits = saved(probe).logits[0]
            difference = max(difference, ((logits - reference).abs().max() / reference.abs().max()).item())
            agreeing += int((logits.argmax(-1) == reference.argmax(-1)).sum())
            tokens += len(reference)
    if not difference <= spec["tolerance"]:
        raise PlatformError(
            f"The merged model's logits differ from base + adapter by {difference:.2e} of the largest, more than "
            f"{spec['tolerance']:.0e} at {spec['dtype']}; nothing was published. Merge again, and if it stays so "
            "train with the dtype that is merged."
        )
    return {
        "logit_difference": difference,
        "logit_tolerance": spec["tolerance"],
        "argmax_agreement": agreeing / max(tokens, 1),
        "probes": len(probes),
        "probe_tokens": tokens,
        "dtype": spec["dtype"],
        "parameters": parameters,
        "seconds": time.monotonic() - start,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
