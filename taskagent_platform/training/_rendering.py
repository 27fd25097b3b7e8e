"""Examples as tokens: reads a dataset's file and renders every line."""

import json
from pathlib import Path
from typing import Any

from taskagent_platform.artifacts import file_digest
from taskagent_platform.errors import PlatformError
from taskagent_platform.training.packing import Pack, pack_all
from taskagent_platform.training.template import Rendered, render


def read_examples(path: Path, tokenizer: Any, max_length: int, digest: str | None = None) -> list[Rendered]:
    """Reads and renders a JSONL file of examples.

    Args:
        path: one example a line.
        tokenizer: a Hugging Face tokenizer with our chat template.
        max_length: tokens of the longest example.
        digest: sha256 that the file must have.

    Raises:
        PlatformError: the file changed since ``digest`` was taken, or a line is no example or is too long.
    """
    if digest is not None and file_digest(path) != digest:
        raise PlatformError(f"{path} changed while training was starting; start again.")
    examples = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                example = json.loads(line)
                rendered = render(example["messages"], example.get("tools"), tokenizer)
            except json.JSONDecodeError as error:
                raise PlatformError(f"{path}, line {number}: not JSON: {error}.") from error
            except (KeyError, TypeError, AttributeError) as error:
                raise PlatformError(f"{path}, line {number}: not an example; {error!r} is missing or wrong.") from error
            except PlatformError as error:
                raise PlatformError(f"{path}, line {number}: {error}") from error
            if len(rendered.input_ids) > max_length:
                raise PlatformError(
                    f"{path}, line {number}: {len(rendered.input_ids)} tokens, but training.max_length is {max_length}."
                )
            examples.append(rendered)
    return examples


def evaluation_packs(examples: list[Rendered], count: int, size: int, token_budget: int | None) -> list[Pack]:
    """Packs a bounded sample of held-out examples; those that share most come first.

    Args:
        examples: the held-out examples.
        count: examples at most.
        size: examples of one pack at most.
        token_budget: tokens at most that the packs compute; None for no bound.
    """
    kept: list[Pack] = []
    for item in sorted(pack_all(examples, size), key=lambda item: len(item.input_ids) / item.examples):
        tokens = sum(len(one.input_ids) for one in kept) + len(item.input_ids)
        too_many = sum(one.examples for one in kept) + item.examples > count
        if not kept or not (too_many or (token_budget is not None and tokens > token_budget)):
            kept.append(item)
    return kept
