"""LoRA, norm, activation and loss of a Llama with fewer passes over memory; in float32 the same function exactly.

On a CPU a step is bound by matrix products and, for the rest, by memory. PEFT's LoRA layer writes its own product, a
scaled copy and the sum; here both products accumulate in place into the base layer's output. RMSNorm and the gated
activation keep what their backward pass needs and nothing else. The last feed-forward block is computed where a label
is predicted, and the cross entropy makes its gradient a few positions at a time. A base model in bfloat16 is computed
in bfloat16, with float32 where a norm or a softmax sums and for the adapter's weights and gradients.
"""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaModel, LlamaRMSNorm

_ROWS = 32
"""Positions whose logits are in float32 at a time: on a CPU they stay in the cache."""


class _LoraProduct(torch.autograd.Function):
    """``x W^T + scale (x A^T) B^T``; only A, B and x have gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a, b = a.to(x.dtype), b.to(x.dtype)
        inner = rows @ a.T
        output = rows @ weight.T
        output.addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(rows, weight, a, b, inner)
        ctx.scale, ctx.shape = scale, x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, inner = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_inner = (grad @ b).mul_(ctx.scale)
        grad_b = (grad.T @ inner).float().mul_(ctx.scale)
        grad_a = (grad_inner.T @ rows).float()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x.addmm_(grad_inner, a)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, grad_a, grad_b, None


class _RmsNorm(torch.autograd.Function):
    """``weight * x / sqrt(mean(x^2) + eps)``; the weight has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad = grads[0].float() * weight
        shift = torch.linalg.vecdot(grad, x.float()).unsqueeze(-1).mul_(inverse.pow(3)).div_(x.shape[-1])
        return grad.mul_(inverse).addcmul_(x.float(), shift, value=-1).to(x.dtype), None, None


class _GatedSilu(torch.autograd.Function):
    """``silu(gate) * up``, which keeps only its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad = grads[0]
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, torch.nn.functional.silu(gate).mul_(grad)


class _CrossEntropy(torch.autograd.Function):
    """``sum(logsumexp(logits) - logits[label])``, with its gradient made on the way and kept in the logits' type."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start in range(0, len(labels), _ROWS):
            rows = slice(start, start + _ROWS)
            chosen = labels[rows].unsqueeze(-1)
            logs = torch.log_softmax(logits[rows], -1, dtype=torch.float32)
            total -= logs.gather(-1, chosen).sum()
            if grad is not None:
                grad[rows] = logs.exp_().scatter_add_(-1, chosen, logs.new_full(chosen.shape, -1))
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        # In place, so that a second backward pass over the same graph is an error.
        return grad.mul_(grads[0]), None


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross entropy summed over positions, a float32 scalar.

    The softmax is in float32, a few positions at a time, so that no copy of all logits is made in float32.

    Args:
        logits: ``[positions, vocabulary]``.
        labels: ``[positions]``, token ids; none of them is ignored.
    """
    total: Tensor = _CrossEntropy.apply(logits, labels)
    return total


def fuse(model: torch.nn.Module) -> int:
    """Gives a PEFT model's LoRA layers, norms and feed-forward blocks the leaner forward; returns how many it changed.

    The last decoder layer, one of them, leaves its feed-forward block out where no label is predicted, if the model is
    given ``label_positions``: its output is right at these positions alone.

    Layers that are not plain LoRA without dropout, with the adapter in float32, keep their own.
    """
    changed = 0
    for module in model.modules():
        if isinstance(module, LoraLinear) and _plain(module):
            module.forward = MethodType(_lora_forward, module)
        elif isinstance(module, LlamaRMSNorm) and not module.weight.requires_grad:
            module.forward = MethodType(_norm_forward, module)
        elif isinstance(module, LlamaMLP) and module.config.hidden_act == "silu":
            module.forward = MethodType(_feed_forward, module)
        elif isinstance(module, LlamaModel) and type(last := module.layers[-1]) is LlamaDecoderLayer:
            last.forward = MethodType(_last_layer_forward, last)
        else:
            continue
        changed += 1
    return changed


def _plain(layer: LoraLinear) -> bool:
    if len(layer.active_adapters) != 1 or layer.lora_variant or layer.merged:
        return False
    name = layer.active_adapters[0]
    base = layer.base_layer
    return (
        isinstance(layer.lora_dropout[name], torch.nn.Identity)
        and type(base) is torch.nn.Linear
        and base.bias is None
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
        and not base.weight.requires_grad
        and layer.lora_A[name].weight.dtype == torch.float32
    )


def _lora_forward(self: LoraLinear, x: Tensor, *_: Any, **__: Any) -> Tensor:
    name = self.active_adapters[0]
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    output: Tensor = _LoraProduct.apply(x, self.base_layer.weight, a, b, self.scaling[name])
    return output


def _norm_forward(self: LlamaRMSNorm, x: Tensor) -> Tensor:
    output: Tensor = _RmsNorm.apply(x, self.weight, self.variance_epsilon)
    return output


def _feed_forward(self: LlamaMLP, x: Tensor) -> Tensor:
    output: Tensor = self.down_proj(_GatedSilu.apply(self.gate_proj(x), self.up_proj(x)))
    return output


def _last_layer_forward(
    self: LlamaDecoderLayer, hidden_states: Tensor, *, label_positions: Tensor | None = None, **more: Any
) -> Tensor:
    if label_positions is None:
        return type(self).forward(self, hidden_states, **more)
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **more)
    hidden = hidden_states + attended
    # A token that several examples share can have several labels.
    asked = label_positions.unique()
    rows = hidden[:, asked]
    return hidden.index_copy(1, asked, rows + self.mlp(self.post_attention_layernorm(rows)))
