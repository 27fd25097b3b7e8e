"""How long the main job will take on this machine, before it starts."""

import time
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
_LOOK_BACK = 20


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
    """Returns the time that the stages took when they were last made, or None if one of the long ones never was."""
    from taskagent_platform.defs.domain import stage_names
    from taskagent_platform.defs.keys import asset_key

    total = 0.0
    long_ones = {"lora_adapter", "eval_report"}
    for name in stage_names(domain):
        records = instance.fetch_materializations(asset_key(domain, name), limit=_LOOK_BACK).records
        for record in records:
            made = record.asset_materialization
            values: dict[str, Any] = (
                {name: value.value for name, value in made.metadata.items()} if made is not None else {}
            )
            if values.get("profile") == settings.profile and not values.get("reused"):
                seconds = float(values.get("seconds", 0))
                if name == "lora_adapter" and values.get("examples"):
                    # The dataset may have grown since.
                    seconds *= _examples(settings) * (1 - settings.data.evaluation_share) / float(values["examples"])
                total += seconds
                long_ones.discard(name)
                break
    return None if long_ones else total
