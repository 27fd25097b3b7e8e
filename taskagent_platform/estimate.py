"""How long the main job will take on this machine, before it starts."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taskagent_platform.domains.base import Domain
from taskagent_platform.settings import Settings

if TYPE_CHECKING:
    from dagster import DagsterInstance

# Measured with the cpu profile, in bfloat16 on two cores that multiply float32 matrices at 205 GFLOP/s. In float32 an
# earlier recipe took seven tenths of its time in bfloat16 an example on two cores that do 96 GFLOP/s and know no
# bfloat16; so would this one. Where bfloat16 is much faster than that, it is too long.
_REFERENCE_GFLOPS = 205.0
_TRAINING_S_PER_EXAMPLE = {"bfloat16": 0.48, "float32": 0.33}
_OTHER_STAGES_S = 720.0
_SMOKE_S = 60.0
_GPU_S = 2400.0
_MATRIX = 1024
_MEASURE_S = 0.5
_PAGE = 20
_LONG_ONES = ("lora_adapter", "eval_report")


@dataclass(frozen=True)
class Estimate:
    """How long, and how that is known."""

    seconds: float
    basis: str


def estimate(settings: Settings, domain: Domain, instance: "DagsterInstance") -> Estimate:
    """Estimates the time of a run that makes everything anew.

    An earlier run on this instance tells best; without one, the speed of a matrix product stands for the machine.
    """
    recorded = _recorded_s(settings, domain, instance)
    if recorded is not None:
        return Estimate(recorded, "as long as the stages took when they were last made here")
    if settings.profile == "gpu":
        return Estimate(_GPU_S, "a guess: the gpu profile has not run here yet")
    speed = matrix_gflops()
    scale = _REFERENCE_GFLOPS / speed
    if settings.profile == "smoke":
        return Estimate(_SMOKE_S * scale, f"from this machine's matrix product, {speed:.0f} GFLOP/s")
    examples = _examples(settings) * (1 - settings.data.evaluation_share) * settings.training.epochs
    per_example = _TRAINING_S_PER_EXAMPLE.get(settings.training.dtype, _TRAINING_S_PER_EXAMPLE["float32"])
    seconds = (_OTHER_STAGES_S + per_example * examples) * scale
    return Estimate(seconds, f"from this machine's matrix product, {speed:.0f} GFLOP/s, and {examples:.0f} examples")


def matrix_gflops(seconds: float = _MEASURE_S) -> float:
    """Measures the product of two float32 matrices for about ``seconds``; returns GFLOP/s of the best round."""
    import numpy

    left = numpy.full((_MATRIX, _MATRIX), 0.5, numpy.float32)
    best, until = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < until:
        begin = time.perf_counter()
        left @ left
        best = max(best, 2 * _MATRIX**3 / (time.perf_counter() - begin) / 1e9)
    return best


def _examples(settings: Settings) -> int:
    return settings.data.structured_outputs + settings.data.function_calling + settings.data.multi_tool


def _recorded_s(settings: Settings, domain: Domain, instance: "DagsterInstance") -> float | None:
    """Returns the time that the stages took when they were last made.

    None if one of the long ones never was, or if one was only ever reused or gone on with: that tells no time.
    """
    from taskagent_platform.defs.domain import stage_names

    total = 0.0
    for name in stage_names(domain):
        values: dict[str, Any] | None = None
        for values in _materializations(settings, domain, instance, name):
            # A training that was cut off and gone on with counts the seconds of its last part.
            if not values.get("reused") and not values.get("resumed_from"):
                total += float(values.get("seconds", 0)) * _growth(settings, name, values)
                break
        else:
            if values is not None or name in _LONG_ONES:
                return None
    return total


def _materializations(
    settings: Settings, domain: Domain, instance: "DagsterInstance", name: str
) -> Iterator[dict[str, Any]]:
    """Yields what a stage's materializations with this profile say of themselves, the newest first."""
    from taskagent_platform.defs.keys import asset_key

    cursor: str | None = None
    while True:
        page = instance.fetch_materializations(asset_key(domain, name), limit=_PAGE, cursor=cursor)
        for record in page.records:
            made = record.asset_materialization
            values = {name: value.value for name, value in made.metadata.items()} if made is not None else {}
            if values.get("profile") == settings.profile:
                yield values
        if not page.has_more:
            return
        cursor = page.cursor


def _growth(settings: Settings, name: str, values: dict[str, Any]) -> float:
    """Returns how many times as long a training takes now: the dataset may have grown since, or the epochs."""
    if name != "lora_adapter":
        return 1.0
    growth = 1.0
    if values.get("examples"):
        growth = _examples(settings) * (1 - settings.data.evaluation_share) / float(values["examples"])
    if values.get("epochs"):
        growth *= settings.training.epochs / float(values["epochs"])
    return growth
