from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from taskagent_platform.training._pack_trainer import DENSE, FLEX
from taskagent_platform.training.packing import pack
from taskagent_platform.training.template import Rendered
from taskagent_platform_tests.training.test_packing import (
    BATCHES,
    BFLOAT16_COSINE,
    batches,
    gradients,
    packed_loss,
    unpacked_loss,
    with_adapter,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    yield with_adapter(LlamaForCausalLM(config)).cuda()
    torch.cuda.empty_cache()


@batches
@pytest.mark.parametrize("attention", [FLEX, DENSE])
def test_loss_and_gradients_equal_unpacked_training(model: Any, examples: list[Rendered], attention: str) -> None:
    expected_loss = unpacked_loss(model, examples)
    expected = gradients(model, expected_loss)
    got_loss = packed_loss(model, [pack(examples)], attention)
    got = gradients(model, got_loss)
    torch.testing.assert_close(got_loss, expected_loss, rtol=1e-4, atol=1e-5)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        difference = (got[name] - gradient).norm() / gradient.norm()
        assert difference < 1e-3, f"{name}: {difference:.1e}"


@batches
def test_half_the_bits_keep_the_gradients(model: Any, examples: list[Rendered]) -> None:
    expected = gradients(model, unpacked_loss(model, examples))
    with torch.autocast("cuda", torch.bfloat16):
        loss = packed_loss(model, [pack(examples)], FLEX)
    got = gradients(model, loss)
    for name, gradient in expected.items():
        assert torch.cosine_similarity(got[name].flatten(), gradient.flatten(), dim=0) > BFLOAT16_COSINE, name


def test_packs_of_many_lengths_do_not_compile_anew_each_time(model: Any) -> None:
    """A training has packs of as many lengths as steps; beyond a few compilations torch gives up and goes slow."""
    import torch._dynamo.utils as counters

    examples = BATCHES["longer than a chunk"]
    for number in range(4):
        gradients(model, packed_loss(model, [pack(examples[: number + 1])], FLEX))
    before = dict(counters.counters["stats"])
    for number in range(12):
        shorter = [Rendered(one.input_ids[17 * number :], one.labels[17 * number :]) for one in examples]
        gradients(model, packed_loss(model, [pack(shorter)], FLEX))
    after = dict(counters.counters["stats"])
    assert after.get("unique_graphs", 0) - before.get("unique_graphs", 0) <= 1
