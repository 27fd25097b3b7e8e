"""Exact attention over a prefix-shared pack, in dense pieces without a mask over the whole pack.

The pack (see :mod:`taskagent_platform.training.packing`) is cut into chunks of at most ``CHUNK`` tokens of one node.
A chunk's tokens see all tokens of its ancestors, which lie in a few contiguous ranges, and the chunk's own beginning.
So each chunk is a small dense attention: nothing is computed for tokens that do not see each other, apart from half of
a chunk's own square. Query heads that share a key head are rows of one matrix, which makes for larger products.
"""

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from taskagent_platform.training.packing import Node

TREE = "prefix_tree"
"""Name of the implementation, for a model's ``set_attn_implementation``."""
CHUNK = 128
"""Tokens of one piece: its scores stay in the cache, and its square wastes little."""
_KEPT_SHARE = 0.25
"""Attention weights are kept for the backward pass up to this share of the memory that was free when the process
first attended, over all layers; beyond it they are computed again."""


class _Chunk(NamedTuple):
    start: int
    stop: int
    # Contiguous ranges of the tokens before `start` that the chunk's tokens see.
    seen: list[tuple[int, int]]

    @property
    def columns(self) -> int:
        """Tokens that the chunk's last token sees, itself among them."""
        return self.stop - self.start + sum(stop - start for start, stop in self.seen)


class Tree:
    """What attention needs to know of a pack; data loaders pass it on untouched."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.chunks = _chunks(nodes)
        self.weights = sum((chunk.stop - chunk.start) * chunk.columns for chunk in self.chunks)
        """Pairs of tokens that a head computes."""


class _TreeAttention(torch.autograd.Function):
    """Queries ``[key heads, tokens * groups, width]``, scaled already; keys and values ``[key heads, tokens, width]``.

    The query heads that share a key head (a group) lie beside one another for each token, so that a chunk's queries
    are rows of one matrix without being copied.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: Tree, keep: bool) -> Tensor:
        heads, rows, _ = query.shape
        groups = rows // key.shape[1]
        output = torch.empty_like(query)
        # One block for a layer: thousands of blocks of all sizes, freed and asked for again, cost the allocator more
        # than they hold.
        kept = query.new_empty(tree.weights * heads * groups) if keep else None
        for chunk, piece in zip(tree.chunks, _pieces(kept, tree, heads, groups), strict=True):
            own = slice(chunk.start * groups, chunk.stop * groups)
            weights = torch.softmax(_scores(query[:, own], _gathered(key, chunk), chunk, groups), -1, out=piece)
            output[:, own] = torch.bmm(weights, _gathered(value, chunk))
        ctx.save_for_backward(query, key, value, kept)
        ctx.tree, ctx.groups = tree, groups
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, kept = ctx.saved_tensors
        groups = ctx.groups
        grad = grads[0]
        grad_query = torch.empty_like(query)
        # Many chunks add to the rows of a shared beginning.
        grad_key, grad_value = (torch.zeros_like(one, dtype=torch.float32) for one in (key, value))
        for chunk, piece in zip(ctx.tree.chunks, _pieces(kept, ctx.tree, query.shape[0], groups), strict=True):
            own = slice(chunk.start * groups, chunk.stop * groups)
            queries, keys, grad_out = query[:, own], _gathered(key, chunk), grad[:, own]
            weights = piece if piece is not None else torch.softmax(_scores(queries, keys, chunk, groups), -1)
            _scatter(grad_value, chunk, torch.bmm(weights.transpose(1, 2), grad_out))
            grad_weights = torch.bmm(grad_out, _gathered(value, chunk).transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_query[:, own] = torch.bmm(grad_scores, keys)
            _scatter(grad_key, chunk, torch.bmm(grad_scores.transpose(1, 2), queries))
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    tree: Tree,
    **_: Any,
) -> tuple[Tensor, None]:
    """Computes attention over a pack of one row, in transformers' attention interface.

    Args:
        module: the attention layer.
        query: ``[1, heads, tokens, width]``.
        key: ``[1, key heads, tokens, width]``.
        value: like ``key``.
        attention_mask: not used; ``tree`` says who sees whom.
        dropout: must be 0.
        scaling: factor of the scores.
        tree: who sees whom.

    Returns:
        ``[1, tokens, heads, width]`` and None.
    """
    scale = scaling if scaling is not None else float(query.shape[-1]) ** -0.5
    layers = module.config.num_hidden_layers
    # Below the lowest adapter nothing is computed backwards.
    keep = query.requires_grad and tree.weights * query.shape[1] * layers * query.element_size() <= _kept_bytes()
    _, heads, tokens, width = query.shape
    key_heads = key.shape[1]
    # [key heads, groups, tokens, width] -> [key heads, tokens, groups, width]
    folded = query.mul(scale).view(key_heads, -1, tokens, width).transpose(1, 2).reshape(key_heads, -1, width)
    output = _TreeAttention.apply(folded, key[0].contiguous(), value[0].contiguous(), tree, keep)
    return output.view(key_heads, tokens, -1, width).transpose(0, 1).reshape(1, tokens, heads, width), None


def tree_mask(nodes: list[Node], device: torch.device) -> Tensor:
    """Returns the same rule as a boolean mask ``[1, 1, tokens, tokens]``: True where a row's token sees a column's."""
    stops = _subtree_stops(nodes, device)
    index = torch.arange(len(stops), device=device)
    return ((index[None, :] <= index[:, None]) & (index[:, None] < stops[None, :]))[None, None]


def tree_block_mask(nodes: list[Node], device: torch.device) -> Any:
    """Returns the same rule as FlexAttention's ``BlockMask``, for a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask

    stops = _subtree_stops(nodes, device)

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row < stops[column])

    return create_block_mask(sees, None, None, len(stops), len(stops), device=device)


def register() -> None:
    """Makes ``prefix_tree`` known to transformers; models then take it as their attention implementation."""
    AttentionInterface.register(TREE, tree_attention)
    AttentionMaskInterface.register(TREE, lambda *_, **__: None)


@cache
def _kept_bytes() -> float:
    return _KEPT_SHARE * psutil.virtual_memory().available


def _subtree_stops(nodes: list[Node], device: torch.device) -> Tensor:
    return torch.cat([torch.full((node.stop - node.start,), node.subtree_stop, device=device) for node in nodes])


def _chunks(nodes: list[Node]) -> list[_Chunk]:
    chunks = []
    ancestors: list[Node] = []
    for node in nodes:
        while ancestors and ancestors[-1].subtree_stop <= node.start:
            ancestors.pop()
        seen: list[tuple[int, int]] = []
        for ancestor in ancestors:
            if seen and seen[-1][1] == ancestor.start:
                seen[-1] = (seen[-1][0], ancestor.stop)
            else:
                seen.append((ancestor.start, ancestor.stop))
        length = node.stop - node.start
        pieces = -(-length // CHUNK)
        bounds = [node.start + length * piece // pieces for piece in range(pieces + 1)]
        for start, stop in itertools.pairwise(bounds):
            ranges = list(seen)
            if start > node.start:
                if ranges and ranges[-1][1] == node.start:
                    ranges[-1] = (ranges[-1][0], start)
                else:
                    ranges.append((node.start, start))
            chunks.append(_Chunk(start, stop, ranges))
        ancestors.append(node)
    return chunks


def _pieces(kept: Tensor | None, tree: Tree, heads: int, groups: int) -> Sequence[Tensor | None]:
    """Returns the weights of each chunk as a view of a layer's block, shaped as its scores; Nones without a block."""
    if kept is None:
        return [None] * len(tree.chunks)
    shapes = [(heads, (chunk.stop - chunk.start) * groups, chunk.columns) for chunk in tree.chunks]
    pieces = kept.split([math.prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _scores(queries: Tensor, keys: Tensor, chunk: _Chunk, groups: int) -> Tensor:
    """Returns the scores ``[key heads, own tokens * groups, seen + own tokens]``; what comes later is hidden."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    length = chunk.stop - chunk.start
    hidden = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu_(1).unsqueeze(1)
    heads, _, columns = scores.shape
    scores.view(heads, length, groups, columns)[..., columns - length :].masked_fill_(hidden, -torch.inf)
    return scores


def _gathered(tensor: Tensor, chunk: _Chunk) -> Tensor:
    """Returns the rows that a chunk's tokens see, their own last; a view where they lie side by side."""
    seen = chunk.seen
    if not seen:
        return tensor[:, chunk.start : chunk.stop]
    if len(seen) == 1 and seen[0][1] == chunk.start:
        return tensor[:, seen[0][0] : chunk.stop]
    return torch.cat([*(tensor[:, start:stop] for start, stop in seen), tensor[:, chunk.start : chunk.stop]], 1)


def _scatter(target: Tensor, chunk: _Chunk, rows: Tensor) -> None:
    """Adds rows, one for each token that a chunk's tokens see, to those of ``target``; undoes ``_gathered``."""
    begin = 0
    for start, stop in (*chunk.seen, (chunk.start, chunk.stop)):
        target[:, start:stop].add_(rows[:, begin : begin + stop - start])
        begin += stop - start
