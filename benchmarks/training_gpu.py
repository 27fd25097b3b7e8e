"""Training speed of the gpu profile on one GPU: with and without Unsloth, with and without prefix sharing.

    .venv/bin/python benchmarks/training_gpu.py --data train.jsonl

Every contestant trains with the gpu profile's settings, but for backend and packing, through the process that trains
for the platform, one after the other. The model has the shape of Llama-3.2-3B and random weights: what is measured is
speed. Steps are timed from the end of the last warm-up step to the end of the last step, an optimizer step and a logged
loss each.

The share of the peak counts ``4 * n`` operations for a computed token, n being the weights of the projections (no
embeddings): two a weight for the forward pass and two for the gradient of the layer's input. The base model is frozen,
so it has no gradient of its own. What gradient checkpointing computes again (``2 * n``), attention, the adapter and
the vocabulary are not counted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from taskagent_platform.artifacts import file_digest
from taskagent_platform.data.training_dataset import KIND as DATASET
from taskagent_platform.data.training_dataset import TRAIN_FILE
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform.training._process import payload_environment, run_payload
from taskagent_platform.training.fine_tune import fine_tune_settings

CONTESTANTS = {
    "trl": ("trl", "none"),
    "trl-prefix": ("trl", "prefix"),
    "unsloth": ("unsloth", "none"),
    "unsloth-prefix": ("unsloth", "prefix"),
}
"""Backend and packing; where Unsloth is asked for prefixes, TRL's own packing runs."""
LLAMA_3_2_3B = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}
"""The model's public configuration."""
PEAK_TFLOPS = 989.0
"""Dense bfloat16 of an H100 SXM or an H200, by their datasheets."""


def main() -> None:
    """Runs every contestant and prints the table; exits with status 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a JSONL file of training examples; those of the profile by default")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer's folder; SmolLM2's by default")
    parser.add_argument("--shape", type=json.loads, default={}, help="other values of the model's shape, as JSON")
    parser.add_argument("--profile", default="gpu", help="profile whose training settings are used")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--limit", type=float, default=100, help="seconds after which a contestant is given up")
    parser.add_argument("--peak-tflops", type=float, default=PEAK_TFLOPS, help="the chip's dense bfloat16 peak")
    parser.add_argument("--only", choices=CONTESTANTS, nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--scratch", type=Path, help="where the model goes; it takes 7 GB")
    parser.add_argument("--json", type=Path, help="also write the figures to this file, after every contestant")
    parser.add_argument("--worker", choices=[*CONTESTANTS, "base"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = load_settings(profile=arguments.profile)
    data = arguments.data or settings.folder(settings.domain) / DATASET / TRAIN_FILE
    if not data.exists():
        sys.exit(f"There are no training examples in {data}; run `make demo` first or name a file with --data.")
    if arguments.worker == "base":
        figures = make_base(settings, arguments.scratch / "base", arguments.tokenizer, arguments.shape, data)
        print("\n" + json.dumps(figures))
    elif arguments.worker:
        sizes = json.loads((arguments.scratch / "sizes.json").read_text())
        print("\n" + json.dumps(compete(arguments.worker, arguments, data, sizes)))
    else:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            sys.exit(compare(arguments, Path(scratch), Console()))


def compare(arguments: argparse.Namespace, scratch: Path, console: Console) -> int:
    """Runs every contestant in a process of its own; returns the exit status."""
    # Where an option is given twice, the last one counts.
    options = [*sys.argv[1:], "--scratch", str(scratch)]
    begin = time.monotonic()
    sizes = run_worker("base", options, 4 * arguments.limit)
    if "error" in sizes:
        sys.exit(f"The model cannot be made: {sizes['error']}")
    (scratch / "sizes.json").write_text(json.dumps(sizes))
    console.print(
        f"{sizes['examples']} examples of {sizes['tokens'] / sizes['examples']:.0f} tokens, "
        f"{sizes['parameters'] / 1e9:.2f} billion parameters, made in {time.monotonic() - begin:.0f} s"
    )
    results: dict[str, dict[str, Any]] = {}
    for name in arguments.only:
        begin = time.monotonic()
        found = run_worker(name, options, arguments.limit)
        if "tokens_per_s" in found:
            found["tflops"] = 4 * sizes["weights"] * found["tokens_per_s"] / 1e12
            found["share_of_peak"] = found["tflops"] / arguments.peak_tflops
        results[name] = found
        said = f"{found['examples_per_s']:.1f} examples/s" if "error" not in found else f"failed: {found['error']}"
        console.print(f"{name}: {said} ({time.monotonic() - begin:.0f} s)", markup=False)
        if arguments.json:
            arguments.json.write_text(json.dumps({"sizes": sizes, "results": results}, indent=2))
    console.print(table(results))
    return int(any("error" in found for found in results.values()))


def run_worker(name: str, options: list[str], limit: float) -> dict[str, Any]:
    """Runs this file as a worker; returns what it found, or its error."""
    command = [sys.executable, __file__, *options, "--worker", name]
    try:
        done = subprocess.run(
            command, env=payload_environment(), capture_output=True, text=True, check=False, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {limit:g} s"}
    if done.returncode != 0:
        sys.stderr.write(done.stderr[-4000:])
        return {"error": (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def make_base(
    settings: Settings, folder: Path, tokenizer_folder: Path | None, shape: dict[str, Any], data: Path
) -> dict[str, Any]:
    """Writes the model with random weights; returns its size and that of the data."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from taskagent_platform.training import template
    from taskagent_platform.training._base_model import _gguf_tokenizer
    from taskagent_platform.training._rendering import read_examples
    from taskagent_platform.training.packing import group

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder) if tokenizer_folder else _gguf_tokenizer()
    tokens = template.control_tokens(tokenizer)
    tokenizer.eos_token, tokenizer.pad_token = tokens.end_token, "<|endoftext|>"
    tokenizer.chat_template = template.chat_template(tokens)
    config = LlamaConfig(
        **LLAMA_3_2_3B | shape, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(settings.seed)
    dtype = getattr(torch, settings.training.dtype)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(previous)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rendered = read_examples(data, tokenizer, settings.training.max_length)
    projections = [one for one in model.model.modules() if isinstance(one, torch.nn.Linear)]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights": sum(one.weight.numel() for one in projections),
        "examples": len(rendered),
        "tokens": sum(len(one.input_ids) for one in rendered),
        "packs": len(group(rendered, settings.training.pack_examples, settings.seed)),
    }


def compete(name: str, arguments: argparse.Namespace, data: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Trains one contestant and returns its figures."""
    backend, packing = CONTESTANTS[name]
    changed = {"backend": backend, "packing": packing, "save_every": 1_000_000}
    settings = load_settings(profile=arguments.profile, training=changed)
    training = settings.training
    # Rows of an epoch: examples, packs or, with Unsloth's packing, sequences of the greatest length.
    rows = {"none": sizes["examples"], "prefix": sizes["packs"]}[packing]
    if (backend, packing) == ("unsloth", "prefix"):
        rows = -(-sizes["tokens"] // training.max_length)
    steps = arguments.warm_up + arguments.steps
    steps_of_epoch = -(-rows // (training.batch_size * training.gradient_accumulation))
    chosen = fine_tune_settings(settings) | {"epochs": steps / steps_of_epoch}
    scratch = Path(tempfile.mkdtemp(dir=arguments.scratch))
    nothing = scratch / "held_out.jsonl"
    nothing.touch()
    spec = {
        "base_folder": str(arguments.scratch / "base"),
        "train_jsonl": str(data),
        "eval_jsonl": str(nothing),
        "data": {"train": file_digest(data), "eval": file_digest(nothing)},
        "settings": chosen,
        "processes": 1,
        "ray_address": "",
        "adapter_folder": str(scratch / "adapter"),
        "checkpoints": str(scratch / "checkpoints"),
        "evaluation_examples": 0,
        "evaluation_tokens_on_cpu": 0,
    }
    seen: list[tuple[float, dict[str, Any]]] = []
    log = scratch / "training.log"
    try:
        details = run_payload("fine_tune", spec, log, lambda record: seen.append((time.monotonic(), record)))
    except PlatformError as error:
        sys.stderr.write(log.read_text(errors="replace")[-4000:])
        sys.exit(f"{error}")
    records = [(moment, record) for moment, record in seen if "loss" in record]
    (start, first), (end, last) = records[arguments.warm_up - 1], records[-1]
    epochs, seconds = last["epoch"] - first["epoch"], end - start
    return {
        "steps": last["step"] - first["step"],
        "seconds": seconds,
        "examples_per_s": epochs * details["examples"] / seconds,
        "tokens_per_s": epochs * details["tokens_computed"] / seconds,
        "tokens_per_example": details["tokens_computed"] / details["examples"],
        "peak_memory_gib": details["peak_memory_gib"],
        "first_step_s": records[0][0] - seen[0][0],
        "losses": [round(record["loss"], 4) for _, record in records],
        "packing": details["packing"],
        "attention": details.get("attention"),
        "device": details["device"],
    }


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Returns the figures side by side."""
    devices = {found["device"] for found in results.values() if "device" in found}
    shown = Table(title=f"Training a 3B Llama, {', '.join(sorted(devices)) or 'nothing ran'}")
    columns = ("", "packing", "examples/s", "tokens/s", "tokens/example", "TFLOP/s", "of the peak", "memory GiB")
    for column in columns:
        shown.add_column(column, justify="left" if column in ("", "packing") else "right")
    for name, found in results.items():
        if "error" in found:
            shown.add_row(name, "failed")
            continue
        shown.add_row(
            name,
            found["packing"],
            f"{found['examples_per_s']:.1f}",
            f"{found['tokens_per_s']:.0f}",
            f"{found['tokens_per_example']:.0f}",
            f"{found['tflops']:.0f}",
            f"{found['share_of_peak']:.1%}",
            f"{found['peak_memory_gib']:.1f}",
        )
    return shown


if __name__ == "__main__":
    main()
