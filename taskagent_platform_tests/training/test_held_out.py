from pathlib import Path
from typing import Any

import pytest

from taskagent_platform.errors import PlatformError
from taskagent_platform.training.fine_tune import fine_tune
from taskagent_platform.training.held_out import held_out_loss
from taskagent_platform.training.template import IGNORED, render
from taskagent_platform_tests.training.conversations import example, write_jsonl
from taskagent_platform_tests.training.small_training import settings_with


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_is_the_loss_of_all_examples_one_by_one(base_folder: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = settings_with()
    fine_tune(settings, base_folder, *data, tmp_path / "lora_adapter", {})
    # More than a pack holds.
    examples = [example(500 + number, number // 5) for number in range(20)]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", examples)
    found = held_out_loss(settings, base_folder, tmp_path / "lora_adapter", held_out)

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    rendered = [render(one["messages"], one["tools"], tokenizer) for one in examples]

    def one_by_one(model: Any) -> float:
        total, count = 0.0, 0
        for one in rendered:
            labels = torch.tensor(one.labels[1:])
            with torch.no_grad():
                logits = model(torch.tensor([one.input_ids])).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
            count += int((labels != IGNORED).sum())
        return total / count

    base = AutoModelForCausalLM.from_pretrained(base_folder)
    plain = one_by_one(base)
    adapted = one_by_one(PeftModel.from_pretrained(base, tmp_path / "lora_adapter"))
    assert found == pytest.approx(adapted, rel=1e-4)
    assert found < plain - 0.5


def test_without_an_example_nothing_is_ranked(base_folder: Path, tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(PlatformError, match=r"empty\.jsonl holds no example"):
        held_out_loss(settings_with(), base_folder, tmp_path / "lora_adapter", empty)
