"""Exact attention over a prefix-shared pack, in dense pieces without a mask.

Each piece (see :mod:`taskagent_platform.training.packing`) is one call of PyTorch's flash kernel for CPUs, which also
returns the log-sum-exp of the scores. Pieces that belong to the same queries are joined by their log-sum-exps; in the
backward pass the kernel is given the *joined* output and log-sum-exp, from which it recomputes exactly this piece's
share of the softmax (the identity behind ring attention, https://arxiv.org/abs/2310.01889).
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from taskagent_platform.training.packing import Node

TREE = "prefix_tree"
"""Name of the implementation, for a model's ``set_attn_implementation``."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _TreeAttention(torch.autograd.Function):
    """Queries ``[1, heads, tokens, width]``, keys and values ``[1, key heads, tokens, width]``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, nodes: list[Node], scale: float) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        output = torch.empty_like(query)
        # [1, heads, tokens] in the kernel's own memory order.
        total = query.new_empty(query.shape[:3], dtype=torch.float32)
        for node in nodes:
            own = slice(node.start, node.stop)
            keys, values = _repeated(key[:, :, own], groups), _repeated(value[:, :, own], groups)
            part, logsumexp = _forward(query[:, :, own], keys, values, 0.0, True, scale=scale)
            output[:, :, own], total[:, :, own] = part, logsumexp
        for node in nodes:
            if node.subtree_stop > node.stop:
                below = slice(node.stop, node.subtree_stop)
                own = slice(node.start, node.stop)
                part, logsumexp = _forward(
                    _folded(query[:, :, below], groups), key[:, :, own], value[:, :, own], 0.0, False, scale=scale
                )
                part = _unfolded(part, groups)
                logsumexp = logsumexp.reshape(1, query.shape[1], -1)
                # output = share * part + (1 - share) * output, with share = exp(lse_part) / sum of both.
                share = torch.sigmoid(logsumexp - total[:, :, below]).unsqueeze(-1)
                output[:, :, below].lerp_(part, share.to(part.dtype))
                total[:, :, below] = torch.logaddexp(total[:, :, below], logsumexp)
        ctx.save_for_backward(query, key, value, output, total)
        ctx.nodes, ctx.scale = nodes, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, total = ctx.saved_tensors
        (grad,) = grads
        groups = query.shape[1] // key.shape[1]
        grad_query, grad_key, grad_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        for node in ctx.nodes:
            own = slice(node.start, node.stop)
            keys, values = _repeated(key[:, :, own], groups), _repeated(value[:, :, own], groups)
            part_query, part_key, part_value = _backward(
                grad[:, :, own], query[:, :, own], keys, values, output[:, :, own], total[:, :, own].contiguous(),
                0.0, True, scale=ctx.scale,
            )  # fmt: skip
            grad_query[:, :, own] = part_query
            grad_key[:, :, own], grad_value[:, :, own] = _summed(part_key, groups), _summed(part_value, groups)
        for node in ctx.nodes:
            if node.subtree_stop > node.stop:
                below, own = slice(node.stop, node.subtree_stop), slice(node.start, node.stop)
                part_query, part_key, part_value = _backward(
                    _folded(grad[:, :, below], groups), _folded(query[:, :, below], groups), key[:, :, own],
                    value[:, :, own], _folded(output[:, :, below], groups),
                    total[:, :, below].reshape(1, key.shape[1], -1), 0.0, False, scale=ctx.scale,
                )  # fmt: skip
                grad_query[:, :, below] += _unfolded(part_query, groups)
                grad_key[:, :, own] += part_key
                grad_value[:, :, own] += part_value
        return grad_query, grad_key, grad_value, None, None


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    nodes: list[Node],
    **_: Any,
) -> tuple[Tensor, None]:
    """Computes attention over a pack of one row, in transformers' attention interface.

    Args:
        module: the attention layer.
        query: ``[1, heads, tokens, width]``.
        key: ``[1, key heads, tokens, width]``.
        value: like ``key``.
        attention_mask: not used; ``nodes`` says who sees whom.
        dropout: must be 0.
        scaling: factor of the scores.
        nodes: the pack's nodes.

    Returns:
        ``[1, tokens, heads, width]`` and None.
    """
    scale = scaling if scaling is not None else float(query.shape[-1]) ** -0.5
    output = _TreeAttention.apply(query, key, value, nodes, scale)
    return output.transpose(1, 2), None


def tree_mask(nodes: list[Node], device: torch.device) -> Tensor:
    """Returns the same rule as a boolean mask ``[1, 1, tokens, tokens]``: True where a row's token sees a column's."""
    stops = torch.cat([torch.full((node.stop - node.start,), node.subtree_stop, device=device) for node in nodes])
    index = torch.arange(len(stops), device=device)
    return ((index[None, :] <= index[:, None]) & (index[:, None] < stops[None, :]))[None, None]


def register() -> None:
    """Makes ``prefix_tree`` known to transformers; models then take it as their attention implementation."""
    AttentionInterface.register(TREE, tree_attention)
    AttentionMaskInterface.register(TREE, lambda *_, **__: None)


def _repeated(tensor: Tensor, groups: int) -> Tensor:
    return tensor.repeat_interleave(groups, dim=1) if groups > 1 else tensor


def _summed(tensor: Tensor, groups: int) -> Tensor:
    batch, heads, tokens, width = tensor.shape
    return tensor.view(batch, heads // groups, groups, tokens, width).sum(2)


def _folded(tensor: Tensor, groups: int) -> Tensor:
    """Lays the query heads that share a key head behind one another: ``[1, key heads, groups * tokens, width]``."""
    batch, heads, tokens, width = tensor.shape
    return tensor.reshape(batch, heads // groups, groups * tokens, width)


def _unfolded(tensor: Tensor, groups: int) -> Tensor:
    batch, heads, tokens, width = tensor.shape
    return tensor.reshape(batch, heads * groups, tokens // groups, width)
