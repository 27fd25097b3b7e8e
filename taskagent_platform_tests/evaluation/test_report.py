"""Gates on a report: strict, and closed where something is missing."""

from datetime import UTC, datetime
from typing import Any

import pytest

from taskagent_platform.evaluation.comparison import champion_gate
from taskagent_platform.evaluation.latency import Latency, percentile, split_cases
from taskagent_platform.evaluation.report import (
    CaseRecord,
    EvalReport,
    Rate,
    categories_of,
    gate_results,
    metrics_of,
    render_report,
    slices_of,
    this_hardware,
)
from taskagent_platform.evaluation.suite import Case, Suite
from taskagent_platform.settings import GateSettings

GATES = GateSettings()


def record(list_name: str, number: int, passed: bool, attempted: int = 1, valid: int = 1) -> CaseRecord:
    return CaseRecord.model_validate(
        {
            "id": f"{list_name}{number}", "list_name": list_name, "category": "c", "input": "x",
            "now": "2024-01-15T09:00", "verdict": "right" if passed else "wrong_tool", "passed": passed,
            "faults": (), "expected": (), "got": (),
            "text": "", "attempted": attempted, "valid": valid, "extra_reads": 0, "turns": 1,
        }
    )  # fmt: skip


def report_of(counts: dict[str, tuple[int, int]], p95: float | None = 100.0, **changes: Any) -> EvalReport:
    cases = tuple(record(name, n, n < right) for name, (right, total) in counts.items() for n in range(total))
    latency = None if p95 is None else Latency(requests=9, p50_ms=1, p95_ms=p95, p99_ms=p95)
    values: dict[str, Any] = {
        "domain": "lights", "model_name": "m", "model_digest": "d" * 64, "endpoint": "e", "suite_digest": "s" * 64,
        "suite_files": {}, "case_limit": None, "metrics": metrics_of(cases, GATES), "categories": categories_of(cases),
        "verdicts": {}, "fault_types": {}, "minefields": 0, "extra_reads": 0, "latency": latency,
        "latency_budget_ms": 500, "latency_target_ms": 500, "cases": cases, "settings": {}, "hardware": this_hardware(),
        "started": datetime.now(UTC), "seconds": 1.0, "complete": True,
    }  # fmt: skip
    return EvalReport.model_validate({**values, **changes})


ALL = {"tool_selection": (100, 100), "argument_extraction": (100, 100), "multi_tool_chains": (100, 100)}


def failing(report: EvalReport, gates: GateSettings = GATES) -> dict[str, str]:
    return {result.name: result.reason for result in gate_results(report, gates) if not result.passed}


def test_all_right() -> None:
    assert failing(report_of(ALL)) == {}


@pytest.mark.parametrize(("right", "passes"), [(95, False), (96, True)])
def test_targets_are_strict(right: int, passes: bool) -> None:
    report = report_of({**ALL, "tool_selection": (right, 100)})
    assert ("tool_selection" not in failing(report)) is passes
    assert report.metrics["tool_selection"].passed is passes


@pytest.mark.parametrize(("p95", "passes"), [(499.9, True), (500.0, False), (None, False)])
def test_latency_is_strict(p95: float | None, passes: bool) -> None:
    assert ("latency_p95_ms" not in failing(report_of(ALL, p95))) is passes


def test_what_was_not_measured_does_not_pass() -> None:
    assert "was not measured" in failing(report_of({**ALL, "multi_tool_chains": (0, 0)}))["multi_tool"]


def test_an_unfinished_evaluation_passes_nothing() -> None:
    assert len(failing(report_of(ALL, complete=False))) == 5


def test_gates_are_judged_from_the_cases_not_from_what_the_report_says() -> None:
    good = report_of(ALL)
    bad = report_of({**ALL, "multi_tool_chains": (10, 100)})
    forged = bad.model_copy(update={"metrics": good.metrics})
    assert set(failing(forged)) == {"multi_tool"}


def test_the_lower_bound_can_be_judged_instead_of_the_rate() -> None:
    report = report_of({**ALL, "tool_selection": (97, 100)})
    assert failing(report) == {}
    strict = GateSettings(judge_by="lower_bound", json_validity=0.9)
    said = failing(report, strict)
    assert set(said) == {"tool_selection"}
    assert "The lower bound of tool selection (97.0%) is 91.5% and must be greater than 95.0%" in said["tool_selection"]
    assert metrics_of(report.cases, strict)["tool_selection"].passed is False
    assert "Judged is the lower bound" in render_report(report, strict)


def test_slices_have_their_own_rates() -> None:
    cases = [record("tool_selection", n, n != 1).model_copy(update={"slice": "typos" * (n < 2)}) for n in range(5)]
    slices = slices_of(cases)
    assert {name: (rate.correct, rate.total) for name, rate in slices.items()} == {"plain": (3, 3), "typos": (1, 2)}
    assert "typos" in render_report(report_of(ALL, slices=slices), GATES)


def test_robustness_cases_are_told_and_counted_by_no_gate() -> None:
    hard = tuple(
        record("tool_selection", n, False, valid=0).model_copy(update={"id": f"h{n}", "slice": "typos"})
        for n in range(50)
    )
    report = report_of(ALL, robustness=hard, slices=slices_of(hard))
    assert failing(report) == {}
    assert champion_gate(report, report_of(ALL), GATES).passed
    assert len(report.failures) == 50
    report = report.model_copy(update={"slices": slices_of(report.asked)})
    text = render_report(report, GATES)
    assert "300 cases and 50 of robustness" in text
    assert "slices (50 of these cases are of the robustness suites, which no gate counts):" in text
    assert "0/50" in next(line for line in text.splitlines() if line.startswith("  typos"))
    assert "[h0, typos] x" in text
    assert "OVERALL: PASS" in text


def test_a_changed_gate_counts_at_once() -> None:
    assert set(failing(report_of(ALL), GateSettings(latency_p95_ms=50))) == {"latency_p95_ms"}


def test_json_validity_counts_attempts_not_cases() -> None:
    cases = [record("abstention", 0, False, attempted=3, valid=1), record("tool_selection", 0, True)]
    metric = metrics_of(cases, GATES)["json_validity"]
    assert (metric.correct, metric.total) == (2, 4)


def test_the_table() -> None:
    text = render_report(report_of({**ALL, "abstention": (3, 4)}), GATES, base=report_of({**ALL, "abstention": (1, 4)}))
    line = next(line for line in text.splitlines() if line.startswith("Tool selection"))
    assert " ".join(line.split()) == "Tool selection 100/100 100.0% 96.3% - 100.0% > 95% PASS 100.0% of 100"
    assert "25.0% of 4" in next(line for line in text.splitlines() if line.startswith("Abstention"))
    assert "budget of this profile 500 ms, specification's target 500 ms" in text


def test_minefields_are_told() -> None:
    assert "in 2 cases the model destroyed" in render_report(report_of(ALL, minefields=2), GATES)


@pytest.mark.parametrize(
    ("saturated_at", "ended", "said"),
    [(1, "saturated", "; saturated at 1"), (None, "time", "; not saturated (ended by: time)")],
)
def test_it_is_told_whether_the_load_was_enough(saturated_at: int | None, ended: str, said: str) -> None:
    point = {"concurrency": 1, "requests": 9, "requests_per_s": 1.5, "p50_ms": 600, "p95_ms": 700}
    load = {"points": [point], "saturated_at": saturated_at, "ended": ended}
    lines = render_report(report_of(ALL, load=load), GATES).splitlines()
    assert f"  under load, of cases asked before (requests at once: throughput): 1: 1.50/s at p95 700 ms{said}" in lines


def test_rate_of_nothing() -> None:
    assert Rate.of(0, 0).rate is None


@pytest.mark.parametrize(
    ("values", "percent", "result"),
    [([5], 95, 5), ([1, 2, 3], 50, 2), ([4, 1, 3, 2], 50, 2.5), (list(range(101)), 95, 95)],
)
def test_percentile(values: list[float], percent: float, result: float) -> None:
    assert percentile(values, percent) == result


def test_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)


def test_cases_are_divided_without_loss_or_overlap() -> None:
    def case(number: int, name: Any) -> Case:
        return Case(f"{name}{number}", name, "x", "", (), False, datetime(2024, 1, 15), "default", ())

    names = ["tool_selection"] * 7 + ["argument_extraction"] * 5 + ["abstention"] * 3
    suite = Suite(tuple(case(n, name) for n, name in enumerate(names)), {})
    for requests in (1, 4, 12, 100):
        split = split_cases(suite, requests)
        ids = [case.id for part in split for case in part]
        assert sorted(ids) == sorted(case.id for case in suite.cases)
        assert len(split.timed) == min(requests, 12)
        assert all(case.list_name != "abstention" for case in split.timed + split.first_token)
