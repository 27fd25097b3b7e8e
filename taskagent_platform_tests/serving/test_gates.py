import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taskagent_platform.domains.task_api import TaskApiDomain
from taskagent_platform.evaluation.latency import Latency
from taskagent_platform.evaluation.report import gate_results, load_report
from taskagent_platform.serving.gates import Verdict, judge
from taskagent_platform.settings import GateSettings, Settings, load_settings
from taskagent_platform_tests.serving.judged_model import PER_LIST, make_model, make_report, small_domain, write_suite

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path / "home"))
    return load_settings(profile="smoke", evaluation={"case_limit": None})


@pytest.fixture
def domain(tmp_path: Path) -> TaskApiDomain:
    return small_domain(tmp_path)


def _judge(settings: Settings, domain: TaskApiDomain, **report: Any) -> Verdict:
    _, model = make_model(settings)
    return judge(settings, domain, model, make_report(settings, domain, model, **report))


def _set(**fields: Any) -> Change:
    return lambda report: report.update(fields)


def test_a_model_that_passes_every_gate_is_let_through_with_n_and_interval(
    settings: Settings, domain: TaskApiDomain
) -> None:
    verdict = _judge(settings, domain)
    assert verdict.refusals == ()
    assert {gate.name: gate.n for gate in verdict.gates} == {
        "tool_selection": PER_LIST, "argument_extraction": PER_LIST, "json_validity": 3 * PER_LIST,
        "multi_tool": PER_LIST, "latency_p95_ms": 40, "no_worse_than_champion": 0,
    }  # fmt: skip
    assert all(gate.passed and not gate.reason for gate in verdict.gates)
    rates = [gate for gate in verdict.gates if gate.name not in ("latency_p95_ms", "no_worse_than_champion")]
    assert all(gate.interval is not None and gate.interval[0] < 1 == gate.interval[1] for gate in rates)


@pytest.mark.parametrize(
    ("failing", "gate", "says"),
    [
        ({"tool_selection": 1}, "tool_selection", "Tool selection is 95.0% and must be greater than 95.0%"),
        ({"argument_extraction": 2}, "argument_extraction", "is 90.0% and must be greater than 90.0%"),
        (
            {"argument_extraction": 5},
            "argument_extraction",
            "is 75.0% and must be greater than 90.0%: 15.0 points short",
        ),
        ({"multi_tool_chains": 3}, "multi_tool", "is 85.0% and must be greater than 85.0%"),
        ({"malformed": 1}, "json_validity", "is 98.3% and must be greater than 99.0%: 0.7 points short"),
    ],
)
def test_each_gate_must_be_exceeded_strictly_and_says_by_how_much_not(
    settings: Settings, domain: TaskApiDomain, failing: dict[str, int], gate: str, says: str
) -> None:
    verdict = _judge(settings, domain, failing=failing)
    assert [result.name for result in verdict.gates if not result.passed] == [gate]
    assert len(verdict.refusals) == 1
    assert says in verdict.refusals[0]


def test_a_latency_at_the_budget_is_too_slow(settings: Settings, domain: TaskApiDomain) -> None:
    budget = settings.gates.latency_p95_ms
    slow = Latency(requests=40, p50_ms=1, p95_ms=budget, p99_ms=budget)
    verdict = _judge(settings, domain, change=_set(latency=slow))
    assert verdict.refusals == ("p95 latency is 20000 ms and must be less than 20000 ms.",)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set(model_digest="0" * 64), "not of"),
        (_set(model_digest=None), "an unknown model"),
        (_set(domain="other"), "domain other"),
        (_set(suite_digest="0" * 64), "suites"),
        (_set(complete=False), "did not go to its end"),
        (_set(latency=None), "Latency was not measured"),
        (_set(latency=Latency(requests=1, p50_ms=1, p95_ms=1, p99_ms=1)), "on 1 requests instead of 3"),
        (_set(latency=Latency(requests=0, p50_ms=1, p95_ms=1, p99_ms=1)), "was not measured"),
        (_set(cases=()), "was not measured: there was nothing to count"),
        (lambda report: report.update(cases=report["cases"][1:]), "holds other cases (79) than the suites (80)"),
        (lambda report: report.update(cases=report["cases"] * 2), "holds other cases (160) than the suites (80)"),
        (lambda report: report["settings"].update(speculation=True), "speculation = True, which is False now"),
        (lambda report: report["settings"].pop("dtype"), "dtype = None"),
        (lambda report: report["settings"].update(profile="cpu"), "profile = cpu, which is smoke now"),
    ],
)
def test_a_report_that_is_not_of_this_model_as_it_would_be_served_is_refused(
    settings: Settings, domain: TaskApiDomain, change: Change, says: str
) -> None:
    verdict = _judge(settings, domain, change=change)
    assert any(says in refusal for refusal in verdict.refusals), verdict.refusals


def test_claims_of_the_report_itself_count_for_nothing(settings: Settings, domain: TaskApiDomain) -> None:
    def boast(report: dict[str, Any]) -> None:
        perfect = report["metrics"]["argument_extraction"].model_copy(
            update={"correct": 20, "rate": 1.0, "passed": True}
        )
        report["metrics"] = {
            **report["metrics"],
            "tool_selection": perfect.model_copy(update={"name": "tool_selection"}),
        }

    verdict = _judge(settings, domain, failing={"tool_selection": 10}, change=boast)
    assert "Tool selection is 50.0%" in verdict.refusals[0]


def test_no_report_a_damaged_one_and_another_artifact_are_refused(settings: Settings, domain: TaskApiDomain) -> None:
    folder, model = make_model(settings)
    report = settings.folder(domain.name) / "eval_report"
    assert "not a finished artifact" in judge(settings, domain, model, report).refusals[0]
    assert "holds a merged_model" in judge(settings, domain, model, folder).refusals[0]
    make_report(settings, domain, model)
    file = report / "report.json"
    text = file.read_text()
    file.write_text(text.replace('"passed": false', '"passed": true') + " ")
    assert "report.json was changed" in judge(settings, domain, model, report).refusals[0]
    file.write_text(text)
    assert judge(settings, domain, model, report).refusals == ()
    (report / "manifest.json").unlink()
    assert "not a finished artifact" in judge(settings, domain, model, report).refusals[0]


def test_what_changed_since_the_evaluation_makes_its_report_stale(settings: Settings, domain: TaskApiDomain) -> None:
    _, model = make_model(settings)
    report = make_report(settings, domain, model, failing={"tool_selection": 0})
    assert judge(settings, domain, model, report).refusals == ()
    suite = domain.suites[0]
    suite.write_text(suite.read_text().replace("select 0", "choose 0"))
    assert "suites" in judge(settings, domain, model, report).refusals[0]
    write_suite(suite)
    limited = settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update={"case_limit": 5})})
    assert "case_limit" in judge(limited, domain, model, report).refusals[0]
    report = make_report(settings, domain, model, code_version="older")
    assert judge(settings, domain, model, report).refusals == (
        "The report is stale: the code that evaluates changed since.",
    )


def test_robustness_cases_must_have_been_asked_and_no_gate_counts_them(
    settings: Settings, domain: TaskApiDomain, tmp_path: Path
) -> None:
    path = tmp_path / "hard.json"
    cases = [{"input": f"hrad {n}", "expected_tool": "list_tasks", "slice": "typos"} for n in range(6)]
    path.write_text(json.dumps({"tool_selection": cases}))
    _, model = make_model(settings)
    report = make_report(settings, domain, model)
    assert judge(settings, domain, model, report).refusals == ()
    type(domain).robustness_suites = (path,)
    assert "suites" in judge(settings, domain, model, report).refusals[0], "it was not asked them"
    assert _judge(settings, domain, failing={"robustness": 6}).refusals == ()
    left_out = _judge(settings, domain, change=lambda report: report.update(robustness=report["robustness"][1:]))
    assert left_out.refusals == ("The report holds other cases (5) than the robustness suites (6).",)
    report = make_report(settings, domain, model)
    path.write_text(path.read_text().replace("hrad 0", "hadr 0"))
    assert "suites" in judge(settings, domain, model, report).refusals[0], "they changed since"


def test_the_gates_of_today_judge_the_report_of_yesterday(settings: Settings, domain: TaskApiDomain) -> None:
    _, model = make_model(settings)
    report = make_report(settings, domain, model, failing={"multi_tool_chains": 1})
    assert judge(settings, domain, model, report).refusals == ()
    raised = settings.model_copy(update={"gates": settings.gates.model_copy(update={"multi_tool": 0.96})})
    assert "95.0% and must be greater than 96.0%" in judge(raised, domain, model, report).refusals[0]


def test_a_figure_that_is_no_number_does_not_pass(settings: Settings, domain: TaskApiDomain) -> None:
    _, model = make_model(settings)
    report = load_report(make_report(settings, domain, model))
    nothing = Latency(requests=40, p50_ms=1, p95_ms=float("nan"), p99_ms=1)
    broken = report.model_copy(update={"latency": nothing})
    failed = [gate for gate in gate_results(broken, GateSettings()) if not gate.passed]
    assert [gate.name for gate in failed] == ["latency_p95_ms"]
