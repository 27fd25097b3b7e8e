"""The adapter's start from activations: what its first matrices hold, against the exact directions."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from taskagent_platform.errors import PlatformError
from taskagent_platform.training._eva import start_from_activations
from taskagent_platform.training._trainer import lora_config
from taskagent_platform.training.fine_tune import fine_tune
from taskagent_platform_tests.training.small_training import settings_with

RANK = 6
ROWS = [{"input_ids": torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(seed))} for seed in (1, 2)]


@pytest.fixture
def model(base_folder: Path) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    chosen = {
        "rank": RANK, "alpha": RANK, "dropout": 0.0, "frozen_layers": 0, "target_modules": ["q_proj", "down_proj"],
    }  # fmt: skip
    return get_peft_model(base, lora_config(chosen, base.config)).train()


def start(model: Any) -> None:
    trainer: Any = SimpleNamespace(
        model=model,
        train_dataset=ROWS,
        data_collator=lambda rows: rows[0],
        compute_loss=lambda model, batch: model(**batch),
        _prepare_inputs=lambda batch: batch,
    )
    start_from_activations(trainer, seed=1)


def matrices(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.named_parameters() if "lora_A" in name}


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """The inputs of each adapted layer over all rows, by the name of its first matrix."""
    seen: dict[str, list[torch.Tensor]] = {}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, arguments, name=name: seen.setdefault(name, []).append(arguments[0].flatten(0, 1))
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for row in ROWS:
            model(**row)
    for hook in hooks:
        hook.remove()
    return {f"{name}.lora_A.default.weight": torch.cat(parts) for name, parts in seen.items()}


def test_the_first_matrices_are_the_directions_in_which_the_inputs_vary_most(model: Any) -> None:
    inputs, before = inputs_of(model), matrices(model)
    start(model)
    after = matrices(model)
    assert after.keys() == before.keys() == inputs.keys()
    for name, matrix in after.items():
        torch.testing.assert_close(matrix.norm(), before[name].norm())
        directions = torch.nn.functional.normalize(matrix, dim=1)
        torch.testing.assert_close(directions @ directions.T, torch.eye(RANK), rtol=0, atol=1e-4)
        largest = torch.linalg.svdvals(inputs[name])[:RANK].square().sum()
        torch.testing.assert_close((inputs[name] @ directions.T).square().sum(), largest, rtol=1e-3, atol=0)


def test_the_model_computes_what_it_did(model: Any) -> None:
    with torch.no_grad():
        before = model(**ROWS[0]).logits
        start(model)
        assert torch.equal(model(**ROWS[0]).logits, before)
    assert not any(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("packing", ["prefix", "none"])
def test_a_training_starts_from_them(packing: str, base_folder: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    losses = {}
    for start in ("default", "eva"):
        settings = settings_with(packing=packing, init_lora_weights=start, max_length=700)
        manifest = fine_tune(settings, base_folder, *data, tmp_path / start, {})
        losses[start] = [record["loss"] for record in manifest.details["history"] if "loss" in record]
    assert losses["eva"][0] == pytest.approx(losses["default"][0], rel=1e-5), "the second matrices begin at zero"
    assert losses["eva"][-1] != losses["default"][-1]


def test_unsloth_cannot_start_so() -> None:
    with pytest.raises(PlatformError, match="init_lora_weights eva reads the inputs"):
        settings_with(backend="unsloth", dtype="bfloat16", init_lora_weights="eva")
