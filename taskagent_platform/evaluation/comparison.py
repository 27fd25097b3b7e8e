"""Two models on the same cases: how much better one is, how sure that is, and whether it may replace the other."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from taskagent_platform.evaluation.gate import CHAMPION_GATE, GateResult
from taskagent_platform.evaluation.metric import METRIC_OF_LIST, METRIC_TITLES
from taskagent_platform.evaluation.statistics import mcnemar_exact, paired_difference_interval
from taskagent_platform.settings import GateSettings

if TYPE_CHECKING:  # the report shows comparisons
    from taskagent_platform.evaluation.report import CaseRecord, EvalReport

_ROUNDING = 1e-9
_OTHER_TITLES = {"all": "All cases", "robustness": "Robustness cases"}


class PairedRate(BaseModel):
    """Two models' rates on the cases that both were asked.

    Attributes:
        name: a metric's name, ``all`` of these cases, or ``robustness``, the cases that no gate counts.
        n: the cases.
        only_this: cases that only the model itself got right.
        only_other: cases that only the other model got right.
        rate: the model's own rate.
        other_rate: the other's.
        difference: the model's own rate less the other's.
        low: lower end of the difference's 95 % interval.
        high: upper end.
        p_value: of the exact McNemar test that both are as good.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    n: int
    only_this: int
    only_other: int
    rate: float
    other_rate: float
    difference: float
    low: float
    high: float
    p_value: float

    @property
    def title(self) -> str:
        """What a reader calls it."""
        return next(title for name, title in (*METRIC_TITLES.items(), *_OTHER_TITLES.items()) if name == self.name)


def compare(report: "EvalReport", other: "EvalReport") -> tuple[PairedRate, ...]:
    """Compares two models case by case: each list's metric that has cases in common, all of them, and robustness cases.

    Cases are the same if id, list, input and moment are: a suite may have changed in between.
    """
    gated, beside = _common(report.cases, other.cases), _common(report.robustness, other.robustness)
    groups = [
        (str(metric), [(case, passed) for case, passed in gated if case.list_name == list_name])
        for list_name, metric in METRIC_OF_LIST.items()
    ]
    groups += [("all", gated), ("robustness", beside)]
    return tuple(_paired(name, [(case.passed, passed) for case, passed in group]) for name, group in groups if group)


def champion_gate(
    report: "EvalReport", champion: "EvalReport | None", gates: GateSettings, note: str = ""
) -> GateResult:
    """Judges whether a model may replace the champion: on all cases together it may be worse by the margin at most.

    Without a champion there is nothing to be worse than: the gate passes and says so.

    Args:
        report: the candidate's.
        champion: the champion's, on the same cases; None if there is none to be compared with.
        gates: the margin, and whether the lower bound of the difference is judged instead of the difference.
        note: why there is no champion.
    """
    target = -gates.champion_margin
    if champion is None:
        return GateResult(
            name=CHAMPION_GATE, value=None, target=target, n=0, interval=None, passed=True, reason="",
            note=note or "There is no champion to be compared with.",
        )  # fmt: skip
    paired = next((found for found in compare(report, champion) if found.name == "all"), None)
    if paired is None or not report.complete or not champion.complete:
        reason = "The candidate and the champion were not asked the same cases to their end."
        return GateResult(
            name=CHAMPION_GATE, value=None, target=target, n=0, interval=None, passed=False, reason=reason
        )
    by_bound = gates.judge_by == "lower_bound"
    judged = paired.low if by_bound else paired.difference
    what = "lower bound of the difference to the champion" if by_bound else "difference to the champion"
    found = (
        f"{paired.only_this} cases only the candidate got right, {paired.only_other} only the champion "
        f"(McNemar p = {paired.p_value:.2g})"
    )
    passed = judged >= target - _ROUNDING
    reason = "" if passed else (
        f"The {what} is {judged * 100:+.1f} points and must not be less than {target * 100:+.1f}: {found}."
    )  # fmt: skip
    return GateResult(
        name=CHAMPION_GATE, value=paired.difference, target=target, n=paired.n, interval=(paired.low, paired.high),
        passed=passed, reason=reason, note=f"{found[0].upper()}{found[1:]}." if passed else "",
    )  # fmt: skip


def comparison_lines(title: str, pairs: Iterable[PairedRate]) -> list[str]:
    """Returns a comparison as the lines of a text report."""
    lines = [f"compared with the {title} (same cases; exact McNemar test):"]
    lines += [
        f"  {paired.title:<24}{paired.rate:>7.1%} against {paired.other_rate:.1%} of {paired.n}: "
        f"{paired.difference * 100:+.1f} points ({paired.low * 100:+.1f} to {paired.high * 100:+.1f}), "
        f"{paired.only_this} won, {paired.only_other} lost, p = {paired.p_value:.2g}"
        for paired in pairs
    ]
    return lines


def _common(ours: Iterable["CaseRecord"], others: Iterable["CaseRecord"]) -> list[tuple["CaseRecord", bool]]:
    """Returns our cases that the others have, too, each with whether it passed there."""
    theirs = {_identity(case): case.passed for case in others}
    return [(case, theirs[_identity(case)]) for case in ours if _identity(case) in theirs]


def _identity(case: "CaseRecord") -> tuple[str, ...]:
    return (case.id, case.list_name, case.input, case.now)


def _paired(name: str, pairs: list[tuple[bool, bool]]) -> PairedRate:
    n = len(pairs)
    only_this = sum(ours and not theirs for ours, theirs in pairs)
    only_other = sum(theirs and not ours for ours, theirs in pairs)
    low, high = paired_difference_interval(only_this, only_other, n)
    return PairedRate(
        name=name,
        n=n,
        only_this=only_this,
        only_other=only_other,
        rate=sum(ours for ours, _ in pairs) / n,
        other_rate=sum(theirs for _, theirs in pairs) / n,
        difference=(only_this - only_other) / n,
        low=low,
        high=high,
        p_value=mcnemar_exact(only_this, only_other),
    )
