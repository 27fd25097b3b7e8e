"""The training settings that the launchpad offers, with the bounds that they have in the platform's settings."""

from enum import Enum
from typing import Any

import dagster as dg
from pydantic import BaseModel, Field

from taskagent_platform.settings import Settings, TrainingSettings

_SIGNS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}


class Packing(Enum):
    """Ways to put examples into sequences."""

    none = "none"
    prefix = "prefix"
    trl = "trl"


def _setting(name: str, section: type[BaseModel] = TrainingSettings) -> Any:
    """Returns the field of a setting, which may be left out.

    The settings hold the bounds, and refuse in a sentence what is outside; the launchpad shows them in the text.
    """
    field = section.model_fields[name]
    bounds = [
        words.format(getattr(bound, sign))
        for bound in field.metadata
        for sign, words in _SIGNS.items()
        if hasattr(bound, sign)
    ]
    text = f" ({', '.join(bounds)})" if bounds else ""
    return Field(None, description=f"{field.description}{text}")


class TrainingConfig(dg.Config):
    """Training settings of one run. What is left out is as the platform's settings say."""

    rank: int | None = _setting("rank")
    alpha: int | None = _setting("alpha")
    frozen_layers: int | None = _setting("frozen_layers")
    epochs: float | None = _setting("epochs")
    learning_rate: float | None = _setting("learning_rate")
    batch_size: int | None = _setting("batch_size")
    packing: Packing | None = _setting("packing")
    max_length: int | None = _setting("max_length")
    seed: int | None = _setting("seed", Settings)

    def changes(self) -> dict[str, Any]:
        """Returns the settings that were given, by name."""
        given = {name: value for name, value in self if value is not None}
        return {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
