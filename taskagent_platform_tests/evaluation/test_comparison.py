"""Two models on the same cases, and the gate that rests on it."""

from typing import Any

import pytest

from taskagent_platform.evaluation.comparison import champion_gate, compare
from taskagent_platform.evaluation.report import EvalReport, render_report
from taskagent_platform.settings import GateSettings
from taskagent_platform_tests.evaluation.test_report import ALL, GATES, record, report_of


def of(passed: dict[str, list[bool]], **changes: Any) -> EvalReport:
    cases = tuple(record(name, n, right) for name, values in passed.items() for n, right in enumerate(values))
    return report_of({}, cases=cases, **changes)


def test_cases_are_paired_by_what_was_asked() -> None:
    ours = of({"tool_selection": [True, True, False, True], "abstention": [True]})
    theirs = of({"tool_selection": [True, False, True, False, True]})
    selection, together = compare(ours, theirs)
    assert (selection.name, together.name) == ("tool_selection", "all")
    assert (selection.n, selection.only_this, selection.only_other) == (4, 2, 1)
    assert (selection.rate, selection.other_rate, selection.difference) == (0.75, 0.5, 0.25)
    assert selection.low < 0.25 < selection.high
    assert selection.p_value == 1.0
    asked_otherwise = theirs.model_copy(
        update={"cases": tuple(case.model_copy(update={"input": "y"}) for case in theirs.cases)}
    )
    assert compare(ours, asked_otherwise) == ()


def test_robustness_cases_are_compared_apart_and_not_by_the_gate() -> None:
    hard = tuple(record("abstention", n, True) for n in range(100, 120))
    ours = of(
        {"tool_selection": [True] * 4}, robustness=tuple(case.model_copy(update={"passed": False}) for case in hard)
    )
    theirs = of({"tool_selection": [True] * 4}, robustness=hard)
    selection, together, robustness = compare(ours, theirs)
    assert [pair.name for pair in (selection, together, robustness)] == ["tool_selection", "all", "robustness"]
    assert [pair.n for pair in (selection, together, robustness)] == [4, 4, 20]
    assert robustness.only_other == 20
    assert robustness.title == "Robustness cases"
    assert champion_gate(ours, theirs, GATES).passed


@pytest.mark.parametrize(
    ("lost", "won", "margin", "passes"),
    [(0, 0, 0.0, True), (2, 0, 0.02, True), (3, 0, 0.02, False), (3, 1, 0.02, True), (1, 0, 0.0, False)],
)
def test_a_model_may_be_worse_by_the_margin_at_most(lost: int, won: int, margin: float, passes: bool) -> None:
    ours = of({"tool_selection": [True] * won + [False] * lost + [True] * (100 - won - lost)})
    theirs = of({"tool_selection": [False] * won + [True] * (100 - won)})
    gate = champion_gate(ours, theirs, GateSettings(champion_margin=margin))
    assert (gate.passed, gate.n, gate.target) == (passes, 100, -margin)
    assert gate.value == pytest.approx((won - lost) / 100)
    assert passes or f"{lost} only the champion" in gate.reason


def test_the_lower_bound_can_be_judged_instead() -> None:
    same = of({"tool_selection": [True] * 100})
    strict = GateSettings(champion_margin=0.01, judge_by="lower_bound")
    gate = champion_gate(same, same, strict)
    assert not gate.passed
    assert "lower bound of the difference" in gate.reason
    assert champion_gate(same, same, GateSettings(champion_margin=0.1, judge_by="lower_bound")).passed


def test_without_a_champion_the_gate_passes_and_says_so() -> None:
    gate = champion_gate(report_of(ALL), None, GATES)
    assert (gate.passed, gate.value, gate.n) == (True, None, 0)
    assert "no champion" in gate.note


def test_nothing_in_common_or_an_unfinished_report_does_not_pass() -> None:
    ours = of({"tool_selection": [True]})
    assert not champion_gate(ours, of({"abstention": [True]}), GATES).passed
    assert not champion_gate(ours, of({"tool_selection": [True]}, complete=False), GATES).passed
    assert not champion_gate(of({"tool_selection": [True]}, complete=False), ours, GATES).passed


def test_the_text_report_shows_both_comparisons_and_the_gate() -> None:
    better = report_of(ALL)
    worse = report_of({**ALL, "tool_selection": (90, 100)})
    text = render_report(worse, GATES, base=better, champion=better)
    assert "compared with the base model" in text
    assert "compared with the champion" in text
    assert "0 won, 10 lost, p = 0.002" in text
    assert "The difference to the champion is -3.3 points and must not be less than -2.0" in text
