"""TRL's SFTTrainer over prefix-shared packs."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from taskagent_platform.training._checkpoints import CheckpointTrainer
from taskagent_platform.training._fused import summed_cross_entropy
from taskagent_platform.training._tree_attention import TREE, Tree, tree_block_mask, tree_mask
from taskagent_platform.training.packing import Pack, join

FLEX = "flex_attention"
DENSE = "sdpa"


def attention_for(device: torch.device) -> str:
    """Returns the attention implementation that packs are computed with: dense pieces on a CPU, Flex on a GPU."""
    return TREE if device.type == "cpu" else FLEX


class PackCollator:
    """Turns rows ``{"index": i}`` into the tensors of one sequence of packs."""

    def __init__(self, packs: list[Pack]) -> None:
        self.packs = packs

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns ids and positions ``[1, tokens]``, label positions and labels ``[labels]``, and the tree."""
        joined = join([self.packs[row["index"]] for row in rows])
        labels = torch.tensor(joined.labels)
        return {
            "input_ids": torch.tensor([joined.input_ids]),
            "position_ids": torch.tensor([joined.position_ids]),
            "label_positions": torch.tensor(joined.label_positions),
            # The trainer counts the labels of a step under the second name; they are shifted already.
            "labels": labels,
            "shift_labels": labels,
            "tree": Tree(joined.nodes),
        }


class PackTrainer(CheckpointTrainer):
    """Computes the loss of packs: shared tokens once, the vocabulary at labelled positions only."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the cross entropy averaged over the labelled tokens of the step."""
        loss = pack_loss(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is that of all processes, and gradients are averaged over processes.
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss


def pack_loss(model: torch.nn.Module, inputs: dict[str, Any], label_count: Tensor | int | None = None) -> Tensor:
    """Returns the loss of a collated pack.

    Args:
        model: a causal language model, or a PEFT model around one; may be wrapped for several processes.
        inputs: what :class:`PackCollator` returns.
        label_count: divides the summed loss; the pack's own number of labels if None.
    """
    tree, device = inputs["tree"], inputs["input_ids"].device
    more: dict[str, Any] = {"tree": tree, "label_positions": inputs["label_positions"]}
    config = (model.module if isinstance(model, DistributedDataParallel) else model).config
    if (implementation := config._attn_implementation) == FLEX:
        more = {"attention_mask": tree_block_mask(tree.nodes, device)}
    elif implementation != TREE:
        more = {"attention_mask": tree_mask(tree.nodes, device)}
    logits = model(
        input_ids=inputs["input_ids"],
        position_ids=inputs["position_ids"],
        logits_to_keep=inputs["label_positions"],
        use_cache=False,
        **more,
    ).logits.squeeze(0)
    labels = inputs["labels"]
    loss = summed_cross_entropy(logits, labels)
    return loss / (len(labels) if label_count is None else label_count)
