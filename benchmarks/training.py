"""Training speed: plain TRL, TRL with its own packing, and prefix-shared packs, on the same examples.

    .venv/bin/python benchmarks/training.py

Every contestant trains the same LoRA on the same base model and the same examples: those of a few randomly chosen
packs of the training dataset that `make demo` made. Each runs in a process of its own, one after the other, and trains
a step on other examples before the clock starts. Plain is TRL's trainer as tutorials configure it: whole
conversations, two a batch, four batches a step, loss on every token. The second packs sequences up to the maximal
length and learns the assistant's turns only. On two cores it takes less than twelve minutes.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from taskagent_platform.data.training_dataset import KIND as DATASET
from taskagent_platform.data.training_dataset import TRAIN_FILE
from taskagent_platform.settings import PROJECT_ROOT, Settings, load_settings
from taskagent_platform.training._process import payload_environment
from taskagent_platform.training.base_model import prepare_base_model
from taskagent_platform.training.fine_tune import fine_tune_settings
from taskagent_platform.training.template import Rendered

CONTESTANTS = {
    "plain": "TRL, whole conversations (batch 2 x 4)",
    "trl": "TRL, its own packing, assistant turns only",
    "prefix": "prefix-shared packs",
}

PLAIN_BATCH, PLAIN_STEP = 2, 8
"""Examples of one batch and of one step of the plain trainer."""


class Trained(NamedTuple):
    """What came of a training.

    Attributes:
        model: with its adapter.
        seconds: from the beginning of the first step to the end of the last.
        steps: how many.
        tokens: that were computed, padding included.
    """

    model: Any
    seconds: float
    steps: int
    tokens: int


def main() -> None:
    """Runs every contestant and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a JSONL file of training examples; those of `make demo` by default")
    parser.add_argument("--profile", default="cpu", help="profile whose base model and training settings are used")
    parser.add_argument("--base", type=Path, help="folder of the base model; made on the spot by default")
    parser.add_argument("--packs", type=int, default=2, help="packs to time (the examples of all contestants)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--only", choices=CONTESTANTS, nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--examples", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = load_settings(profile=arguments.profile)
    if arguments.contestant:
        figures = compete(arguments.contestant, settings, arguments.base, arguments.examples)
        print("\n" + json.dumps(figures))
        return
    data = arguments.data or settings.folder(settings.domain) / DATASET / TRAIN_FILE
    if not data.exists():
        sys.exit(f"There are no training examples in {data}; run `make demo` first or name a file with --data.")
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        base = arguments.base or Path(scratch) / "base_model"
        if arguments.base is None:
            console.print("Preparing the base model …")
            prepare_base_model(settings, base)
        examples = Path(scratch) / "examples.json"
        count = choose(settings, base, data, arguments.packs, arguments.seed, examples)
        console.print(f"{count} examples of {data} to time for each, in {settings.training.dtype}")
        results = {}
        for name in arguments.only:
            results[name] = run_contestant(name, arguments.profile, base, examples)
            console.print(f"{CONTESTANTS[name]}: {results[name]['examples_per_s']:.3f} examples/s")
    console.print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


def choose(settings: Settings, base: Path, data: Path, packs: int, seed: int, target: Path) -> int:
    """Writes the examples of ``packs`` randomly chosen packs, after those of one more pack for warming up."""
    from transformers import AutoTokenizer

    from taskagent_platform.training._rendering import read_examples
    from taskagent_platform.training.packing import group

    tokenizer = AutoTokenizer.from_pretrained(base)
    rendered = read_examples(data, tokenizer, settings.training.max_length)
    groups = group(rendered, settings.training.pack_examples, settings.seed)
    chosen = random.Random(seed).sample(groups, min(packs + 1, len(groups)))
    lists = [[rendered[index]._asdict() for index in indices] for indices in chosen]
    target.write_text(json.dumps(lists))
    return sum(map(len, lists[1:]))


def run_contestant(name: str, profile: str, base: Path, examples: Path) -> dict[str, Any]:
    """Runs one contestant in a process of its own; the platform's allocator settings are part of ours alone."""
    if name == "prefix":
        environment = payload_environment()
    else:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = str(PROJECT_ROOT)
    command = [sys.executable, __file__, "--contestant", name, "--profile", profile]
    command += ["--base", str(base), "--examples", str(examples)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{CONTESTANTS[name]} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def compete(name: str, settings: Settings, base: Path, examples: Path) -> dict[str, Any]:
    """Trains one contestant and returns its figures."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from taskagent_platform.training import _trainer, _tree_attention
    from taskagent_platform.training._pack_trainer import attention_for

    chosen = fine_tune_settings(settings)
    warm_up, *packs = [[Rendered(**one) for one in pack] for pack in json.loads(examples.read_text())]
    set_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(base)
    _tree_attention.register()
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=getattr(torch, chosen["dtype"]),
        attn_implementation=attention_for(device) if name == "prefix" else "sdpa",
    )
    # A step on other examples first: it touches all memory for the first time.
    warmed = train(name, chosen, model, tokenizer, [warm_up if name == "prefix" else warm_up[:PLAIN_STEP]])
    timed = train(name, chosen, warmed.model, tokenizer, packs)
    count = sum(map(len, packs))
    return {
        "examples": count,
        "seconds": timed.seconds,
        "steps": timed.steps,
        "examples_per_s": count / timed.seconds,
        "tokens_per_example": timed.tokens / count,
        "tokens_per_s": timed.tokens / timed.seconds,
        "peak_memory_gib": _trainer.peak_memory_gib(),
    }


def train(name: str, chosen: dict[str, Any], model: Any, tokenizer: Any, packs: list[list[Rendered]]) -> Trained:
    """Trains a contestant's model, with a new adapter unless it has one, on all examples once."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from taskagent_platform.training import _trainer
    from taskagent_platform.training._fused import fuse
    from taskagent_platform.training._pack_trainer import PackCollator, PackTrainer
    from taskagent_platform.training.packing import pack

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scratch = tempfile.mkdtemp()
    common: dict[str, Any] = {
        "save_strategy": "no",
        "eval_strategy": "no",
        "num_train_epochs": 1,
        "shuffle_dataset": False,
        "train_sampling_strategy": "sequential",
    }
    flat = [one for examples in packs for one in examples]
    if name == "prefix":
        collator = PackCollator([pack(examples) for examples in packs])
        rows = Dataset.from_dict({"index": list(range(len(packs)))})
        counted = _trainer.Rows(rows, None, collator, len(flat), 0, 0)
        configuration = _trainer.training_arguments(
            {**chosen, "packing": "prefix"}, Path(scratch), counted, device, **common
        )
    else:
        labels = [one.labels if name == "trl" else one.input_ids for one in flat]
        rows = Dataset.from_dict({"input_ids": [one.input_ids for one in flat], "labels": labels})
        collator = None
        configuration = SFTConfig(
            output_dir=scratch,
            per_device_train_batch_size=1 if name == "trl" else PLAIN_BATCH,
            gradient_accumulation_steps=1 if name == "trl" else PLAIN_STEP // PLAIN_BATCH,
            packing=name == "trl",
            max_length=chosen["max_length"],
            learning_rate=chosen["learning_rate"],
            optim="adamw_torch" if device.type == "cpu" else chosen["optimizer"],
            # As ours: on a CPU the base model's own precision decides, and nothing is cast on the way.
            bf16=device.type == "cuda" and chosen["dtype"] == "bfloat16",
            gradient_checkpointing=device.type == "cuda",
            use_cpu=device.type == "cpu",
            report_to=[],
            disable_tqdm=True,
            **common,
        )
    adapted = isinstance(model, PeftModel)
    trainer = (PackTrainer if name == "prefix" else SFTTrainer)(
        model=model,
        args=configuration,
        data_collator=collator,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=None if adapted else _trainer.lora_config(chosen, model.config),
    )
    if name == "prefix" and device.type == "cpu" and not adapted:
        fuse(trainer.model)
    collate = trainer.data_collator
    seen: list[tuple[int, int]] = []

    def counting(batch: list[dict[str, Any]]) -> Any:
        made = collate(batch)
        if name == "prefix":
            number = sum(len(packs[row["index"]]) for row in batch)
        else:
            number = sum(len(row.get("seq_lengths") or [0]) for row in batch)
        seen.append((number, made["input_ids"].numel()))
        return made

    trainer.data_collator = counting
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.monotonic())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.monotonic())

    trainer.add_callback(Clock())
    trainer.train()
    if sum(number for number, _ in seen) != len(flat):
        sys.exit(f"{CONTESTANTS[name]} was given {len(flat)} examples and trained on {seen}.")
    return Trained(trainer.model, times[-1] - times[0], len(times) // 2, sum(tokens for _, tokens in seen))


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Returns the figures side by side; ratios are against the first contestant and TRL's own packing."""
    shown = Table(title="Training speed on the same examples")
    columns = ("", "examples/s", "tokens computed/example", "tokens/s", "peak memory GiB", "x plain", "x TRL packing")
    for column in columns:
        shown.add_column(column, justify="left" if not column else "right")
    for name, figures in results.items():
        ratios = [
            f"{figures['examples_per_s'] / results[other]['examples_per_s']:.1f}" if other in results else "-"
            for other in ("plain", "trl")
        ]
        shown.add_row(
            CONTESTANTS[name],
            f"{figures['examples_per_s']:.3f}",
            f"{figures['tokens_per_example']:.0f}",
            f"{figures['tokens_per_s']:.0f}",
            f"{figures['peak_memory_gib']:.1f}",
            *ratios,
        )
    return shown


if __name__ == "__main__":
    main()
