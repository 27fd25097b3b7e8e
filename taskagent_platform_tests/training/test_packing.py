from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from taskagent_platform.training import _tree_attention
from taskagent_platform.training._fused import fuse, summed_cross_entropy
from taskagent_platform.training._pack_trainer import DENSE, PackCollator, pack_loss
from taskagent_platform.training._trainer import lora_config
from taskagent_platform.training._tree_attention import CHUNK, TREE, Tree, tree_block_mask, tree_mask
from taskagent_platform.training.packing import Pack, group, join, pack, pack_all
from taskagent_platform.training.template import IGNORED, Rendered, render
from taskagent_platform_tests.training import conversations
from taskagent_platform_tests.training.conversations import KINDS, TOOLS

LENGTH_LIMIT = 384
BFLOAT16_COSINE = 0.99
"""Least cosine of an adapter's gradient with the exact one: bfloat16 keeps 8 bits of every product and sum."""


def rendered(ids: list[int], learned: int) -> Rendered:
    return Rendered(ids, [IGNORED] * (len(ids) - learned) + ids[len(ids) - learned :])


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(5, 500, (count,), generator=generator).tolist()
    return tokens


def nested() -> list[Rendered]:
    trunk, side = random_tokens(37, 1), random_tokens(9, 2)
    return [
        rendered(trunk + random_tokens(10, 3), 5),
        rendered(trunk + random_tokens(23, 4), 12),
        rendered(trunk + side + random_tokens(11, 5), 6),
        rendered(trunk + side + random_tokens(40, 6), 30),
        rendered(trunk[:20] + random_tokens(7, 7), 3),
        # Labels on shared tokens, an example inside another, and one twice.
        rendered(trunk + side, 4),
        rendered(trunk + random_tokens(10, 3), 5),
    ]


BATCHES = {
    "nested prefixes": nested(),
    "one example": [rendered(random_tokens(50, 8), 20)],
    "no common prefix": [rendered([first, *random_tokens(30, first)], 9) for first in (1, 2, 3)],
    "at the length limit": [
        rendered(random_tokens(LENGTH_LIMIT - 20, 9) + random_tokens(20, seed), 20) for seed in (10, 11, 12)
    ],
    "longer than a chunk": [
        rendered(random_tokens(3 * CHUNK + 5, 13) + random_tokens(length, length), length // 2)
        for length in (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3)
    ],
    "everything is learned": [rendered([7, *random_tokens(12, seed)], 13) for seed in (14, 15)],
}
batches = pytest.mark.parametrize("examples", BATCHES.values(), ids=BATCHES.keys())


def sequences(item: Pack) -> list[tuple[tuple[int, ...], tuple[tuple[int, int], ...]]]:
    """Reads every root-to-leaf path of a pack back, with its labels, from the mask and positions alone."""
    sees = tree_mask(item.nodes, torch.device("cpu"))[0, 0]
    paths = []
    for index in range(len(item.input_ids)):
        seen = sees[index].nonzero().flatten().tolist()
        assert [item.position_ids[token] for token in seen] == list(range(len(seen)))
        paths.append((tuple(item.input_ids[token] for token in seen), tuple(seen)))
    return [
        (
            ids,
            tuple(
                (seen.index(p), label) for p, label in zip(item.label_positions, item.labels, strict=True) if p in seen
            ),
        )
        for ids, seen in paths
    ]


@batches
def test_every_example_can_be_read_back(examples: list[Rendered]) -> None:
    item = pack(examples)
    paths = dict(sequences(item))
    for example in examples:
        assert tuple(example.input_ids) in paths
    # Each example's labelled tokens are predicted from the token before, at its own depth.
    expected = sorted(
        (depth - 1, label) for e in examples for depth, label in enumerate(e.labels) if label != IGNORED and depth
    )
    got = sorted((item.position_ids[p], label) for p, label in zip(item.label_positions, item.labels, strict=True))
    assert got == expected
    assert item.examples == len(examples)
    assert item.plain_tokens == sum(len(example.input_ids) for example in examples)


def test_shared_tokens_are_there_once() -> None:
    examples = nested()
    distinct = {tuple(e.input_ids[: depth + 1]) for e in examples for depth in range(len(e.input_ids))}
    assert len(pack(examples).input_ids) == len(distinct)


@batches
def test_nodes_cover_the_pack_and_nest(examples: list[Rendered]) -> None:
    item = pack(examples)
    assert item.nodes[0].start == 0
    assert item.nodes[-1].stop == len(item.input_ids)
    for before, after in zip(item.nodes, item.nodes[1:], strict=False):
        assert before.stop == after.start
    for node in item.nodes:
        assert node.start < node.stop <= node.subtree_stop
        inside = [other for other in item.nodes if node.start <= other.start < node.subtree_stop]
        assert all(other.subtree_stop <= node.subtree_stop for other in inside)


@batches
def test_chunks_see_what_the_mask_says(examples: list[Rendered]) -> None:
    item = pack(examples)
    expected = tree_mask(item.nodes, torch.device("cpu"))[0, 0]
    got = torch.zeros_like(expected)
    for chunk in Tree(item.nodes).chunks:
        assert chunk.stop - chunk.start <= CHUNK
        for start, stop in chunk.seen:
            got[chunk.start : chunk.stop, start:stop] = True
        length = chunk.stop - chunk.start
        got[chunk.start : chunk.stop, chunk.start : chunk.stop] = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(got, expected)


def test_flex_attention_gets_the_same_mask() -> None:
    item = pack(nested())
    mask = tree_block_mask(item.nodes, torch.device("cpu"))
    expected = tree_mask(item.nodes, torch.device("cpu"))[0, 0]
    index = torch.arange(len(item.input_ids))
    zero = torch.tensor(0)
    got = torch.stack([mask.mask_mod(zero, zero, row, index) for row in index])
    assert torch.equal(got, expected)


def with_adapter(base: Any) -> Any:
    """Returns the base with an adapter whose every matrix gets a gradient."""
    from peft import get_peft_model

    chosen = {
        "rank": 8,
        "alpha": 8,
        "dropout": 0.0,
        "frozen_layers": 0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }
    adapted = get_peft_model(base, lora_config(chosen, base.config))
    # At its start an adapter's second matrix is zero, and with it the gradient of the first one.
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.05)
    return adapted.train()


@pytest.fixture(scope="module")
def model(base_folder: Any) -> Any:
    _tree_attention.register()
    torch.manual_seed(0)
    return with_adapter(AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="eager"))


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weights.grad.clone() for name, weights in model.named_parameters() if weights.requires_grad}


def unpacked_loss(model: Any, examples: list[Rendered]) -> torch.Tensor:
    """The loss as a plain trainer computes it: one example a sequence, averaged over all labelled tokens."""
    model.set_attn_implementation("eager")
    total, count = torch.tensor(0.0, device=model.device), 0
    for example in examples:
        logits = model(torch.tensor([example.input_ids], device=model.device)).logits[0, :-1].float()
        labels = torch.tensor(example.labels[1:], device=model.device)
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        count += int((labels != IGNORED).sum())
    return total / count


def packed_loss(model: Any, packs: list[Pack], attention: str = TREE) -> torch.Tensor:
    model.set_attn_implementation(attention)
    batch = PackCollator(packs)([{"index": index} for index in range(len(packs))])
    on_device = {key: it.to(model.device) if isinstance(it, torch.Tensor) else it for key, it in batch.items()}
    return pack_loss(model, on_device)


def assert_same(model: Any, examples: list[Rendered], loss: Any) -> None:
    expected_loss = unpacked_loss(model, examples)
    expected = gradients(model, expected_loss)
    got_loss = loss()
    got = gradients(model, got_loss)
    torch.testing.assert_close(got_loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert got.keys() == expected.keys()
    assert len(got) == 2 * 2 * 7
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=name)


@batches
@pytest.mark.parametrize("attention", [TREE, DENSE])
def test_loss_and_gradients_equal_unpacked_training(model: Any, examples: list[Rendered], attention: str) -> None:
    assert_same(model, examples, lambda: packed_loss(model, [pack(examples)], attention))


def test_several_turns_equal_unpacked_training(model: Any, tokenizer: Any) -> None:
    examples = [render(messages, TOOLS, tokenizer) for messages in KINDS.values()]
    item = pack(examples)
    assert len(item.input_ids) < 0.6 * item.plain_tokens
    assert_same(model, examples, lambda: packed_loss(model, [item]))


def test_several_packs_in_a_batch_do_not_see_each_other(model: Any) -> None:
    left, right = nested()[:3], BATCHES["no common prefix"]
    assert_same(model, left + right, lambda: packed_loss(model, [pack(left), pack(right)]))


def test_weights_are_computed_again_where_memory_is_short(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tree_attention, "_kept_bytes", lambda: 0)
    assert_same(model, nested(), lambda: packed_loss(model, [pack(nested())]))


@batches
def test_fused_layers_are_the_same_function(base_folder: Any, model: Any, examples: list[Rendered]) -> None:
    import copy

    expected_loss = unpacked_loss(model, examples)
    expected = gradients(model, expected_loss)
    fused = copy.deepcopy(model)
    assert fuse(fused) > 0
    got_loss = packed_loss(fused, [pack(examples)])
    got = gradients(fused, got_loss)
    torch.testing.assert_close(got_loss, expected_loss, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_the_last_block_computes_labelled_positions_only(model: Any) -> None:
    import copy

    fused = copy.deepcopy(model)
    fuse(fused)
    rows: list[int] = []
    layers = fused.get_base_model().model.layers
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[1]))
    item = pack(nested())
    packed_loss(fused, [item])
    assert rows == [*[len(item.input_ids)] * (len(layers) - 1), len(set(item.label_positions))]
    assert rows[-1] < rows[0]


@pytest.mark.parametrize("positions", [1, 32, 70])
def test_cross_entropy_a_few_positions_at_a_time_is_torchs_own(positions: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(positions, 50, requires_grad=True)
    labels = torch.randint(50, (positions,))
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected / 7, logits)
    got = summed_cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(got / 7, logits)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    torch.testing.assert_close(summed_cross_entropy(logits.detach(), labels), expected.detach())


def test_cross_entropy_of_bfloat16_sums_in_float32() -> None:
    torch.manual_seed(0)
    logits = (4 * torch.randn(40, 5000)).bfloat16().requires_grad_()
    labels = torch.randint(5000, (40,))
    expected = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    got = summed_cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(got, logits)
    torch.testing.assert_close(got, expected)
    assert (got.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2, atol=1e-6)


@batches
def test_a_base_in_bfloat16_keeps_the_adapters_gradients(model: Any, examples: list[Rendered]) -> None:
    import copy

    exact, rounded = copy.deepcopy(model), copy.deepcopy(model)
    for name, weights in rounded.named_parameters():
        if "lora_" not in name:
            weights.data = weights.data.to(torch.bfloat16)
    assert fuse(exact) == fuse(rounded) > 0
    expected = gradients(exact, packed_loss(exact, [pack(examples)]))
    got = gradients(rounded, packed_loss(rounded, [pack(examples)]))
    for name, gradient in expected.items():
        assert got[name].dtype == torch.float32
        assert torch.cosine_similarity(got[name].flatten(), gradient.flatten(), dim=0) > BFLOAT16_COSINE, name


def test_a_pack_of_packs_keeps_everything() -> None:
    packs = [pack(nested()), pack(BATCHES["one example"]), pack(BATCHES["no common prefix"])]
    joined = join(packs)
    assert joined.examples == sum(item.examples for item in packs)
    assert sorted(dict(sequences(joined)).items()) == sorted(
        {path: labels for item in packs for path, labels in sequences(item)}.items()
    )


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@given(st.lists(tokens, min_size=1, max_size=8))
def test_any_forest_can_be_read_back(ids: list[list[int]]) -> None:
    examples = [rendered(one, min(3, len(one))) for one in ids]
    paths = dict(sequences(pack(examples)))
    assert all(tuple(one) in paths for one in ids)
    assert len(pack(examples).input_ids) == len({tuple(one[: d + 1]) for one in ids for d in range(len(one))})


@given(st.lists(tokens, max_size=40), st.integers(1, 9), st.integers(0, 3))
def test_groups_hold_every_example_once(ids: list[list[int]], size: int, seed: int) -> None:
    groups = group([rendered(one, 1) for one in ids], size, seed)
    assert sorted(index for one in groups for index in one) == list(range(len(ids)))
    assert all(1 <= len(one) <= size for one in groups)


def test_examples_of_one_date_block_meet() -> None:
    examples: list[Rendered] = []
    block: dict[int, int] = {}
    for now in range(5):
        trunk = random_tokens(60, 100) + random_tokens(60, 200 + now)
        for number in range(19 if now % 2 else 16):
            block[len(examples)] = now
            examples.append(rendered(trunk + random_tokens(20, 1000 * now + number), 5))
    groups = group(examples, 16)
    assert sorted(map(len, groups), reverse=True) == [16] * 5 + [6]
    assert [len({block[index] for index in one}) for one in groups] == [1] * 5 + [2]


def test_groups_do_not_gather_requests_that_begin_alike() -> None:
    trunk = random_tokens(80, 1)
    examples = [
        rendered([*trunk, first, *random_tokens(20, 100 * first + n)], 5) for first in (1, 2) for n in range(16)
    ]
    for one in group(examples, 16, seed=3):
        assert len({examples[index].input_ids[80] for index in one}) == 2


def test_grouping_depends_on_the_seed_alone() -> None:
    examples = nested() * 3
    assert group(examples, 4, 1) == group(examples, 4, 1)
    assert len(pack_all(examples, 4)) == 6


def test_labels_of_conversations_are_predicted_from_the_prompt(tokenizer: Any) -> None:
    example = conversations.example(6)
    one = render(example["messages"], example["tools"], tokenizer)
    item = pack([one])
    learned = [depth for depth, label in enumerate(one.labels) if label != IGNORED]
    assert item.label_positions == [depth - 1 for depth in learned]
