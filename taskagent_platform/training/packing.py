"""Prefix-shared packing: examples that begin alike share that beginning once.

A pack is a forest of token sequences in depth-first order. A token's position is its depth; it attends to its
ancestors and itself only, so every example sees exactly what it would see alone, and a shared token is computed once.
Labels are (position in the pack, next token) pairs, because a shared token can be followed by several next tokens.

With subtrees contiguous, token ``j`` is an ancestor of token ``i`` exactly if ``j <= i < stop(j)``, where ``stop(j)``
ends the subtree of ``j``'s node. Attention over a pack is therefore a sum of dense pieces without any mask: each
node's tokens over themselves (causal), and all tokens below a node over that node's tokens (a full rectangle).
"""

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

from taskagent_platform.training.template import IGNORED, Rendered

MIN_SHARED = 32
"""Tokens that examples must share beyond their group's beginning to be grouped further."""


class Node(NamedTuple):
    """A run of tokens without a branch.

    Attributes:
        start: index in the pack of its first token.
        stop: index after its last token.
        subtree_stop: index after the last token of all nodes below it; equals ``stop`` for a leaf.
    """

    start: int
    stop: int
    subtree_stop: int


class Pack(NamedTuple):
    """Several examples in one sequence.

    Attributes:
        input_ids: the tokens, shared beginnings once, in depth-first order.
        position_ids: each token's position in its own example.
        nodes: the runs of tokens, in order; they cover the pack without a gap.
        label_positions: where a label is predicted from, one for each labelled token of each example.
        labels: the token to predict there.
        examples: how many examples the pack holds.
        plain_tokens: how many tokens the examples have one by one.
    """

    input_ids: list[int]
    position_ids: list[int]
    nodes: list[Node]
    label_positions: list[int]
    labels: list[int]
    examples: int
    plain_tokens: int


def pack(examples: Sequence[Rendered]) -> Pack:
    """Packs examples into one sequence that holds every shared beginning once.

    The examples' order decides nothing but the order of branches: they are sorted by their tokens first.
    """
    # In sorted order, examples with a common beginning are neighbours, so the forest can be built left to right:
    # `path` holds the index in the pack of every token of the example before.
    ordered = sorted(examples, key=lambda example: example.input_ids)
    input_ids: list[int] = []
    position_ids: list[int] = []
    label_positions: list[int] = []
    labels: list[int] = []
    parents: list[int] = []
    path: list[int] = []
    previous: Sequence[int] = ()
    for example in ordered:
        shared = _common_length(previous, example.input_ids)
        del path[shared:]
        for depth in range(shared, len(example.input_ids)):
            parents.append(path[-1] if path else -1)
            path.append(len(input_ids))
            input_ids.append(example.input_ids[depth])
            position_ids.append(depth)
        for depth, label in enumerate(example.labels):
            if label != IGNORED and depth > 0:
                label_positions.append(path[depth - 1])
                labels.append(label)
        previous = example.input_ids
    return Pack(
        input_ids,
        position_ids,
        _nodes(parents),
        label_positions,
        labels,
        len(ordered),
        sum(len(example.input_ids) for example in ordered),
    )


def group(examples: Sequence[Rendered], size: int, seed: int = 0) -> list[list[int]]:
    """Groups examples so that those with long common beginnings meet, in lists of at most ``size``.

    Bottom-up over the tree of common beginnings: lists are filled among the examples that share most, and what does
    not fill a list is combined one level up, without being divided. A level counts only where it shares at least
    ``MIN_SHARED`` tokens more than the level above; within a level the order is random, so that a list does not
    gather the requests that happen to begin with the same words.

    Returns:
        Indices into ``examples``; every index occurs once.
    """
    order = sorted(range(len(examples)), key=lambda index: examples[index].input_ids)
    shared = [0] + [
        _common_length(examples[left].input_ids, examples[right].input_ids) for left, right in itertools.pairwise(order)
    ]
    rng = random.Random(seed)
    full: list[list[int]] = []

    def rest(start: int, stop: int) -> list[list[int]]:
        """Groups ``order[start:stop]``; returns the lists that are not full."""
        if stop - start == 1:
            return [[order[start]]]
        depth = min(shared[start + 1 : stop])
        cuts = [index for index in range(start + 1, stop) if shared[index] < depth + MIN_SHARED]
        units = [unit for a, b in zip([start, *cuts], [*cuts, stop], strict=True) for unit in rest(a, b)]
        rng.shuffle(units)
        lists = _first_fit(units, size)
        full.extend(one for one in lists if len(one) == size)
        return [one for one in lists if len(one) < size]

    return full + rest(0, len(order)) if order else []


def pack_all(examples: Sequence[Rendered], size: int, seed: int = 0) -> list[Pack]:
    """Returns all examples in packs of at most ``size``, grouped by their common beginnings."""
    return [pack([examples[index] for index in indices]) for indices in group(examples, size, seed)]


def join(packs: Sequence[Pack]) -> Pack:
    """Puts packs one after the other into a single one; tokens of one do not see the others."""
    if len(packs) == 1:
        return packs[0]
    input_ids: list[int] = []
    position_ids: list[int] = []
    nodes: list[Node] = []
    label_positions: list[int] = []
    labels: list[int] = []
    for item in packs:
        offset = len(input_ids)
        input_ids += item.input_ids
        position_ids += item.position_ids
        nodes += [Node(*(offset + value for value in node)) for node in item.nodes]
        label_positions += [offset + position for position in item.label_positions]
        labels += item.labels
    examples, plain = sum(item.examples for item in packs), sum(item.plain_tokens for item in packs)
    return Pack(input_ids, position_ids, nodes, label_positions, labels, examples, plain)


def _nodes(parents: Sequence[int]) -> list[Node]:
    """Cuts tokens in depth-first order into runs, given each token's parent (-1 for a root)."""
    children = [0] * len(parents)
    for parent in parents:
        if parent >= 0:
            children[parent] += 1
    # A run goes on while a token is the only child of the token just before it.
    starts = [
        index for index, parent in enumerate(parents) if parent < 0 or parent != index - 1 or children[parent] > 1
    ]
    stops = [*starts[1:], len(parents)]
    subtree_stop = list(range(1, len(parents) + 1))
    for index in range(len(parents) - 1, -1, -1):
        if parents[index] >= 0:
            subtree_stop[parents[index]] = max(subtree_stop[parents[index]], subtree_stop[index])
    return [Node(start, stop, subtree_stop[stop - 1]) for start, stop in zip(starts, stops, strict=True)]


def _first_fit(units: Sequence[list[int]], size: int) -> list[list[int]]:
    """Combines units into lists of at most ``size``, the largest first, each into the first list with room."""
    lists: list[list[int]] = []
    first_open = 0
    for unit in sorted(units, key=len, reverse=True):
        for one in lists[first_open:]:
            if len(one) + len(unit) <= size:
                one.extend(unit)
                break
        else:
            lists.append(list(unit))
        while first_open < len(lists) and len(lists[first_open]) >= size:
            first_open += 1
    return lists


def _common_length(left: Sequence[int], right: Sequence[int]) -> int:
    length = min(len(left), len(right))
    for index in range(length):
        if left[index] != right[index]:
            return index
    return length
