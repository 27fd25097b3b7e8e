"""What fails more than the rest, and what there is to add."""

import json
from pathlib import Path
from typing import Any

import pytest

from taskagent_platform.data.pattern import Pattern, patterns_of
from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.diagnosis import diagnose, diagnosis_text, load_diagnosis, save_diagnosis
from taskagent_platform.evaluation.report import CaseRecord, EvalReport, FaultRecord
from taskagent_platform_tests.evaluation.test_report import record, report_of


def case(number: int, passed: bool, *calls: tuple[str, dict[str, Any]], **changes: Any) -> CaseRecord:
    faults = () if passed else (FaultRecord(type="missing_call", sentence="x"),)
    expected = tuple({"tool": tool, "arguments": arguments} for tool, arguments in calls)
    return record("multi_tool_chains", number, passed).model_copy(
        update={"expected": expected, "faults": faults, **changes}
    )


def example(*turns: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for calls in turns:
        made = [{"function": {"name": tool, "arguments": json.dumps(arguments)}} for tool, arguments in calls]
        messages += [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": made}]
    return {"messages": messages, "tools": [], "meta": {}}


ADD: tuple[str, dict[str, Any]] = ("add", {"room": "a"})
LIST: tuple[str, dict[str, Any]] = ("list", {})


def starved() -> EvalReport:
    """A report in which three calls in a row always fail and anything else hardly ever does."""
    threes = [case(n, False, ADD, ADD, ADD) for n in range(10)]
    others = [case(100 + n, n > 0, *([ADD] * (1 + n % 2)), *([LIST] * (n % 3 == 0))) for n in range(60)]
    others = [one for one in others if len(one.expected) < 3]
    return report_of({}, cases=(*threes, *others))


def test_patterns_of_an_example_are_those_of_each_request() -> None:
    assert patterns_of(example([ADD, LIST], [ADD])) == {
        Pattern("calls", "2"), Pattern("calls", "1"), Pattern("tool", "add"), Pattern("tool", "list"),
        Pattern("argument", "add.room"),
    }  # fmt: skip
    assert patterns_of({"messages": [{"role": "user", "content": "x"}]}) == {Pattern("calls", "0")}


def test_what_fails_more_than_the_rest_is_found_and_counted_in_the_training_data() -> None:
    training = [example([ADD])] * 300 + [example([ADD, ADD, ADD])] * 2
    diagnosis = diagnose(starved(), training)
    first = diagnosis.findings[0]
    assert (first.pattern, first.failed, first.total, first.is_significant) == (Pattern("calls", "3"), 10, 10, True)
    assert first.faults == {"missing_call": 10}
    assert (first.examples, first.wanted) == (2, 28)
    assert diagnosis.wanted == {Pattern("calls", "3"): 28}
    assert "3 calls: 10/10 fail" in diagnosis_text(diagnosis)
    assert "2 training examples; add 28." in diagnosis_text(diagnosis)


def test_the_wish_grows_with_what_there_is_and_stays_small_beside_the_whole() -> None:
    many = diagnose(starved(), [example([ADD, ADD, ADD])] * 100 + [example([ADD])] * 900)
    assert many.wanted == {Pattern("calls", "3"): 50}
    rare = diagnose(starved(), [example([ADD, ADD, ADD])] * 10 + [example([ADD])] * 1990)
    assert rare.wanted == {Pattern("calls", "3"): 190}, "every case fails: filled up to a tenth"
    threes = [case(200 + n, True, ADD, ADD, ADD) for n in range(10)]
    report = starved()
    half = report.model_copy(update={"cases": (*report.cases, *threes)})
    assert diagnose(half, [example([ADD])] * 2000).wanted == {Pattern("calls", "3"): 100}, "half of them fail"
    few = diagnose(starved(), [example([ADD])] * 50)
    assert few.wanted == {Pattern("calls", "3"): 5}


def test_failures_spread_evenly_ask_for_nothing() -> None:
    cases = [case(n, n % 2 == 0, ADD if n % 3 else LIST) for n in range(40)]
    diagnosis = diagnose(report_of({}, cases=tuple(cases)), [])
    assert diagnosis.wanted == {}
    assert "No pattern fails significantly more" in diagnosis_text(diagnosis)


def test_a_slice_is_told_and_nothing_can_be_generated_for_it() -> None:
    cases = [case(n, False, ADD, slice="typos") for n in range(10)] + [case(n, True, ADD) for n in range(10, 60)]
    diagnosis = diagnose(report_of({}, cases=tuple(cases)), [])
    [finding] = [finding for finding in diagnosis.findings if finding.is_significant]
    assert (finding.pattern, finding.examples, finding.wanted) == (Pattern("slice", "typos"), None, 0)
    assert "write phrasings" in finding.sentence


def test_robustness_cases_are_looked_at_too() -> None:
    hard = tuple(case(n, False, ADD, ADD, ADD, slice="three") for n in range(100, 110))
    report = report_of({}, cases=tuple(case(n, True, ADD) for n in range(50)), robustness=hard)
    diagnosis = diagnose(report, [example([ADD])] * 300)
    assert (diagnosis.cases, diagnosis.failures) == (60, 10)
    assert Pattern("calls", "3") in diagnosis.wanted
    assert {finding.rest_total for finding in diagnosis.findings if finding.value in ("3", "three")} == {50}


def test_no_failure_no_finding() -> None:
    assert diagnose(report_of({}, cases=(case(1, True, ADD),)), []).findings == ()


def test_a_diagnosis_is_written_and_read_again(tmp_path: Path) -> None:
    diagnosis = diagnose(starved(), [])
    save_diagnosis(diagnosis, tmp_path)
    assert load_diagnosis(tmp_path) == diagnosis
    assert (tmp_path / "diagnosis.txt").read_text() == diagnosis_text(diagnosis)
    (tmp_path / "diagnosis.json").write_text("{")
    with pytest.raises(PlatformError, match="cannot be used"):
        load_diagnosis(tmp_path)
