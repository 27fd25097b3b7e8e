"""A training of the tiny model that takes seconds."""

from pathlib import Path
from typing import Any

from taskagent_platform.settings import Settings, load_settings
from taskagent_platform_tests.training.conversations import example, write_jsonl

STEPS = 6
"""Steps of an epoch over the data below, a pack a step."""


def write_data(folder: Path) -> tuple[Path, Path]:
    """Writes training and held-out examples; those of one step share a date block."""
    train = write_jsonl(folder / "train.jsonl", [example(number, number // 8) for number in range(8 * STEPS)])
    return train, write_jsonl(folder / "eval.jsonl", [example(1000 + number) for number in range(4)])


def settings_with(**training: Any) -> Settings:
    """Returns the smoke profile with other training settings."""
    return load_settings(profile="smoke", training={"save_every": 2, **training})
