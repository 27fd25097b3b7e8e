"""The statistics that a report rests on: intervals, paired and unpaired tests, and the reliability of samples."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

_Z_95 = 1.959963984540054


class Interval(NamedTuple):
    """A confidence interval of a rate, or of a difference of two rates."""

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
    ways = sum(math.comb(discordant, k) for k in range(fewer + 1))
    # Divided as whole numbers: two to the number of cases may be more than a float holds.
    return min(1.0, float(Fraction(2 * ways, 2**discordant)))


def paired_difference_interval(only_first: int, only_second: int, total: int, z: float = _Z_95) -> Interval:
    """Returns an interval, 95 % by default, of the first model's rate less the second's on the same cases.

    Source: A. Agresti and Y. Min, "Simple improved confidence intervals for comparing matched proportions",
    Statistics in Medicine 24 (2005): Wald's interval after half a case was added to each of the four counts.

    Args:
        only_first: cases that only the first model got right.
        only_second: cases that only the second model got right.
        total: all cases.
        z: the normal quantile.

    Raises:
        ValueError: the counts are impossible, or nothing was counted.
    """
    if total < 1 or min(only_first, only_second) < 0 or only_first + only_second > total:
        raise ValueError(f"{only_first} and {only_second} cannot be parts of {total} cases")
    count = total + 2
    difference = (only_first - only_second) / count
    variance = (only_first + only_second + 1 - (only_first - only_second) ** 2 / count) / count**2
    half = z * math.sqrt(variance)
    return Interval(max(-1.0, difference - half), min(1.0, difference + half))


def fisher_exact_greater(marked_in: int, size_in: int, marked_out: int, size_out: int) -> float:
    """Returns the p-value of Fisher's exact test that the share marked inside a group is not greater than outside.

    Source: R. A. Fisher, "The Design of Experiments" (1935).

    Raises:
        ValueError: the counts are impossible.
    """
    if not (0 <= marked_in <= size_in and 0 <= marked_out <= size_out):
        raise ValueError(f"{marked_in} of {size_in} and {marked_out} of {size_out} are no shares")
    marked, everyone = marked_in + marked_out, size_in + size_out
    ways = sum(
        math.comb(size_in, k) * math.comb(size_out, marked - k) for k in range(marked_in, min(size_in, marked) + 1)
    )
    return ways / math.comb(everyone, marked)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values adjusted for being many, in the order given.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6
    (1979).
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def pass_hat_k(correct: int, samples: int, k: int) -> float:
    """Returns pass^k of one case: how likely ``k`` of its samples, drawn without putting back, are all right.

    Source: S. Yao et al., "tau-bench: A benchmark for tool-agent-user interaction in real-world domains" (2024).

    Raises:
        ValueError: the counts are impossible.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"no {k} can be drawn from {samples} samples of which {correct} are right")
    return math.comb(correct, k) / math.comb(samples, k)
