"""The two statistics that a report rests on: an interval for a rate, and a paired test of two models."""

import math
from typing import NamedTuple

_Z_95 = 1.959963984540054


class Interval(NamedTuple):
    """A confidence interval of a rate."""

    low: float
    high: float


def wilson_interval(correct: int, total: int, z: float = _Z_95) -> Interval:
    """Returns the Wilson score interval of a rate, 95 % by default.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).

    Raises:
        ValueError: the counts are impossible, or nothing was counted.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"no rate can be made of {correct} of {total}")
    rate = correct / total
    scale = 1 + z * z / total
    middle = (rate + z * z / (2 * total)) / scale
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total)) / scale
    # Rounding must not push the ends past the rate where nothing or all was right.
    return Interval(max(0.0, min(middle - half, rate)), min(1.0, max(middle + half, rate)))


def mcnemar_exact(only_first_right: int, only_second_right: int) -> float:
    """Returns the two-sided p-value of the exact McNemar test on the cases that only one of two models got right.

    Source: Q. McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika
    12 (1947), with the binomial distribution in place of its approximation.
    """
    if min(only_first_right, only_second_right) < 0:
        raise ValueError("counts cannot be negative")
    discordant = only_first_right + only_second_right
    if discordant == 0:
        return 1.0
    fewer = min(only_first_right, only_second_right)
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1)) / float(2**discordant)
    return min(1.0, 2 * tail)
