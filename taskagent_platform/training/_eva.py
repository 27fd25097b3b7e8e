"""A start for LoRA from the data: explained variance adaptation.

LoRA's first matrices usually begin at random, so that at first an adapter sees its layer's inputs through a random
subspace and has to turn it. Here their rows are the directions in which the inputs vary most (Paischer et al., "One
Initialization to Rule them All", arXiv:2410.07170; every layer keeps its rank). PEFT's own EVA takes a loader of plain
sequences and goes on until its estimate settles; this one takes what the trainer takes, packs too, and a fixed number
of tokens.
"""

import random

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import Trainer

_TOKENS = 5_000
"""Tokens that the directions are taken from (a fused model's last feed-forward block sees only those with a label); a
layer's input is 576 wide in the smallest of the models."""
_OVERSAMPLING = 8


def start_from_activations(trainer: Trainer, seed: int) -> None:
    """Gives the first matrix of every LoRA layer the directions in which the layer's inputs vary most.

    The matrices keep the size (Frobenius norm) that they have, so that learning rates carry over. The second matrices
    stay zero: the model computes what it did.

    Args:
        trainer: its model has adapters; its training rows are sampled and computed by its own loss.
        seed: decides which rows are sampled.
    """
    model, rows = trainer.model, trainer.train_dataset
    squares: dict[LoraLayer, Tensor] = {}

    def collect(layer: LoraLayer, arguments: tuple[Tensor, ...]) -> None:
        inputs = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).float()
        squares[layer] = squares.get(layer, 0) + inputs.T @ inputs

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    hooks = [layer.register_forward_pre_hook(collect) for layer in layers]
    tokens = 0
    with torch.no_grad():
        for index in random.Random(seed).sample(range(len(rows)), len(rows)):
            batch = trainer._prepare_inputs(trainer.data_collator([rows[index]]))
            trainer.compute_loss(model, batch)
            tokens += batch["input_ids"].numel()
            if tokens >= _TOKENS:
                break
    for hook in hooks:
        hook.remove()
    for layer in layers:
        for matrix in layer.lora_A.values():
            weight = matrix.weight
            rank, width = weight.shape
            _, _, directions = torch.svd_lowrank(squares[layer], min(rank + _OVERSAMPLING, width), niter=4)
            top = directions[:, :rank].T
            weight.data[: len(top)] = top * (weight.norm() / top.norm())
