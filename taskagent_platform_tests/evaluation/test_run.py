"""An evaluation from suite to report, against a server that answers as a test says."""

import json
from pathlib import Path
from typing import Any

import pytest

from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.client import request_body
from taskagent_platform.evaluation.comparison import champion_gate, compare
from taskagent_platform.evaluation.load_curve import LoadPoint, saturation
from taskagent_platform.evaluation.report import (
    EvalReport,
    EvalVerdict,
    gate_results,
    load_report,
    render_report,
    save_report,
)
from taskagent_platform.evaluation.run import conditions, evaluate
from taskagent_platform.evaluation.suite import Suite, Suites, load_suite
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform_tests.evaluation.light_server import LightServer
from taskagent_platform_tests.light_domain import LIGHTS
from taskagent_platform_tests.serving.fake_server import serve

LAMP_CHAIN = {
    "input": "add a lamp in the hall and time it for 8",
    "expected_chain": ["add_lamp", "add_timer"],
    "expected_args": [{"room": "hall"}, {"at": "8"}],
    "dependency": {"add_timer": {"lamp_id": "from:add_lamp"}},
}
SUITE = {
    "tool_selection": [{"input": f"show {n}", "expected_tool": "list_lights", "category": "query"} for n in range(6)]
    + [{"input": f"lamp {n}", "expected_tool": "add_lamp", "category": "change"} for n in range(4)],
    "argument_extraction": [
        {"input": f"lamp in room {n}", "expected_tool": "add_lamp", "expected_args": {"room": f"room {n}"}}
        for n in range(4)
    ],
    "multi_tool_chains": [LAMP_CHAIN],
    "abstention": [{"input": "hi", "category": "small_talk"}, {"input": "thanks", "category": "small_talk"}],
}
RIGHT: dict[str, Any] = {
    **{f"show {n}": [[("list_lights", {})]] for n in range(6)},
    **{f"lamp {n}": [[("add_lamp", {"room": "x"})]] for n in range(4)},
    **{f"lamp in room {n}": [[("add_lamp", {"room": f"room {n}"})]] for n in range(4)},
    str(LAMP_CHAIN["input"]): [
        [("add_lamp", {"room": "hall"})],
        [("add_timer", {"lamp_id": "lamp_2", "at": "8"})],
        "Your lamp in the hall is timed for 8.",
    ],
}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    limits = {"case_limit": None, "max_turns": 4, "latency_requests": 4, "latency_warmup": 2, "concurrency": 3}
    return load_settings(profile="smoke", evaluation=limits)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(SUITE))
    return load_suite([path], LIGHTS)


def measure(settings: Settings, suite: Suite, server: LightServer, **options: Any) -> EvalReport:
    with serve(server.app) as url:
        return evaluate(
            settings, LIGHTS, base_url=f"{url}/v1", model_name="lights", model_digest="d" * 64, suite=suite, **options
        )


def test_a_perfect_model_passes_every_gate(settings: Settings, suite: Suite) -> None:
    report = measure(settings, suite, LightServer(RIGHT))
    assert {name: (metric.correct, metric.total) for name, metric in report.metrics.items()} == {
        "tool_selection": (10, 10),
        "argument_extraction": (4, 4),
        "json_validity": (16, 16),
        "multi_tool": (1, 1),
        "abstention": (2, 2),
    }
    assert report.complete
    assert report.failures == ()
    assert report.categories["tool_selection"]["query"].total == 6
    assert all(result.passed for result in gate_results(report, settings.gates))
    assert "OVERALL: PASS - Ready for deployment" in render_report(report, settings.gates)
    assert [case.id for case in report.cases] == [case.id for case in suite.cases]


def test_every_case_is_asked_once_and_the_timed_ones_last_and_alone(settings: Settings, suite: Suite) -> None:
    server = LightServer(RIGHT, delay_s=0.02)
    told: list[tuple[str, int, int]] = []
    report = measure(settings, suite, server, on_progress=lambda *what: told.append(what))
    asked = [body["messages"][1]["content"] for body in server.bodies if not body.get("stream")]
    firsts = [text for text in asked if text != LAMP_CHAIN["input"]]
    assert sorted(firsts) == sorted(set(firsts))
    assert 1 < server.most_running <= 3
    assert report.latency is not None
    assert report.latency.requests == 4
    assert report.latency.p50_ms >= 20
    assert report.latency.first_token_p50_ms is not None
    assert sum(bool(body.get("stream")) for body in server.bodies) == 4
    assert told[-1] == ("timed requests", 4, 4)
    assert ("cases", 9, 9) in told


def test_latency_can_be_left_out(settings: Settings, suite: Suite) -> None:
    report = measure(settings, suite, LightServer(RIGHT), measure_latency=False)
    assert report.latency is None
    [latency] = [result for result in gate_results(report, settings.gates) if result.name == "latency_p95_ms"]
    assert not latency.passed
    assert "not measured" in render_report(report, settings.gates)


def test_failures_are_kept_with_their_conversation(settings: Settings, suite: Suite) -> None:
    wrong = {**RIGHT, "show 1": [[("fly", {})]], "lamp in room 2": ["Which room?"], "hi": [[("list_lights", {})]]}
    wrong[str(LAMP_CHAIN["input"])] = [
        [("add_lamp", {"room": "hall"})],
        [("add_timer", {"lamp_id": "lamp_1", "at": "8"})],
        "Ok",
    ]
    report = measure(settings, suite, LightServer(wrong))
    failed = {case.input: case for case in report.failures}
    assert set(failed) == {"show 1", "lamp in room 2", "hi", LAMP_CHAIN["input"]}
    assert report.fault_types == {"unknown_tool": 1, "no_call": 1, "extra_call": 1, "wrong_source": 1}
    assert report.metrics["json_validity"].correct == report.metrics["json_validity"].total - 1
    chain = failed[str(LAMP_CHAIN["input"])]
    assert [message["role"] for message in chain.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert chain.messages[2]["content"] == '{"lamp_id": "lamp_2"}'
    assert chain.expected[1] == {"tool": "add_timer", "arguments": {"at": "8", "lamp_id": "from:add_lamp"}}
    text = render_report(report, settings.gates)
    assert "OVERALL: FAIL - Needs improvement" in text
    assert "Tool selection is 90.0% and must be greater than 95.0%: 5.0 points short." in text
    assert "got:      fly()" in text
    assert "got:      'Which room?'" in text


def test_a_model_that_never_stops_is_stopped(settings: Settings, suite: Suite) -> None:
    server = LightServer({**RIGHT, str(LAMP_CHAIN["input"]): [[("list_lights", {})]]})
    report = measure(settings, suite, server)
    [case] = report.failures
    assert case.turns == 4
    assert {"turn_limit", "missing_call"} <= {fault.type for fault in case.faults}


def test_an_error_of_a_tool_goes_back_to_the_model(settings: Settings, suite: Suite) -> None:
    turns = [[("add_timer", {"lamp_id": "lamp_9", "at": "8"})], *RIGHT[str(LAMP_CHAIN["input"])]]
    server = LightServer({**RIGHT, str(LAMP_CHAIN["input"]): turns})
    report = measure(settings, suite, server)
    assert report.failures == ()
    assert report.extra_reads == 1
    assert "calls that nobody asked for and that changed nothing, which are no faults: 1." in render_report(
        report, settings.gates
    )
    results = [m["content"] for body in server.bodies for m in body["messages"] if m["role"] == "tool"]
    assert '{"error": "not_found", "message": "there is no lamp lamp_9"}' in results


def test_an_earlier_conversation_is_sent_and_has_happened(settings: Settings, tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add_lamp", "arguments": '{"room": "hall"}'}}
    earlier = [
        {"role": "user", "content": "add a lamp"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": '{"lamp_id": "lamp_2"}'},
        {"role": "assistant", "content": "Done."},
    ]
    case = {"input": "remove it", "expected_chain": ["remove_lamp"], "expected_args": [{"lamp_id": "lamp_2"}]}
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"multi_tool_chains": [{**case, "messages": earlier}]}))
    server = LightServer({"remove it": [[("remove_lamp", {"lamp_id": "lamp_2"})], "Gone."]})
    report = measure(settings, load_suite([path], LIGHTS), server)
    assert report.failures == ()
    assert server.bodies[0]["messages"][1:5] == earlier
    assert report.metrics["tool_selection"].rate is None
    assert {result.name: result.passed for result in gate_results(report, settings.gates)}["tool_selection"] is False


def with_evaluation(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update=changes)})


def test_the_load_curve_is_measured_after_all_else_with_ever_more_at_once(settings: Settings, suite: Suite) -> None:
    server = LightServer(RIGHT, delay_s=0.05)
    told: list[tuple[str, int, int]] = []
    chosen = with_evaluation(settings, load_concurrency=4, load_requests=8)
    report = measure(chosen, suite, server, on_progress=lambda *what: told.append(what))
    assert report.load is not None
    steps = [(point.concurrency, point.requests) for point in report.load.points]
    assert steps == [(1, 8), (2, 8), (4, 8)][: len(steps)]
    assert told[-1] == (f"load, {steps[-1][0]} at once", 8, 8)
    asked = [body["messages"][-1]["content"] for body in server.bodies[-8 * len(steps) :]]
    assert len(set(asked)) == len(asked), "no answer comes from a cache of whole requests"
    assert all(point.requests_per_s > 0 and point.p50_ms <= point.p95_ms for point in report.load.points)
    assert f"{steps[-1][0]}: " in render_report(report, chosen.gates)


@pytest.mark.parametrize(
    ("rates", "saturated"), [([1], None), ([1, 1.9], None), ([1, 1.05], 1), ([1, 2, 3, 3.1], 4), ([1, 2, 0.5], 2)]
)
def test_saturation(rates: list[float], saturated: int | None) -> None:
    points = [
        LoadPoint(concurrency=2**number, requests=9, requests_per_s=rate, p50_ms=1, p95_ms=1)
        for number, rate in enumerate(rates)
    ]
    assert saturation(points) == saturated


def test_the_load_curve_is_bounded_in_concurrency_and_in_time(settings: Settings, suite: Suite) -> None:
    one = measure(with_evaluation(settings, load_concurrency=1, load_requests=4), suite, LightServer(RIGHT)).load
    assert one is not None
    assert (one.ended, one.saturated_at, len(one.points)) == ("highest concurrency", None, 1)
    hurried = with_evaluation(settings, load_concurrency=64, load_requests=1000, load_seconds=0.05)
    load = measure(hurried, suite, LightServer(RIGHT, delay_s=0.1)).load
    assert load is not None
    assert load.ended == "time"
    assert [point.requests for point in load.points] == [1]


def test_load_is_not_measured_where_latency_is_not_or_the_settings_leave_it_out(
    settings: Settings, suite: Suite
) -> None:
    assert settings.evaluation.load_concurrency == 0
    assert measure(settings, suite, LightServer(RIGHT)).load is None
    chosen = with_evaluation(settings, load_concurrency=4)
    assert measure(chosen, suite, LightServer(RIGHT), measure_latency=False).load is None


def test_pass_hat_k_is_measured_at_a_temperature_if_it_is_asked_for(settings: Settings, suite: Suite) -> None:
    assert measure(settings, suite, LightServer(RIGHT)).reliability is None
    server = LightServer(RIGHT)
    report = measure(with_evaluation(settings, samples=3, sample_cases=2), suite, server)
    warm = [body for body in server.bodies if body["temperature"] > 0]
    assert {body["temperature"] for body in warm} == {settings.evaluation.sample_temperature}
    assert {body["seed"] for body in warm} == {settings.seed, settings.seed + 1, settings.seed + 2}
    assert all("seed" not in body for body in server.bodies if not body["temperature"])
    assert report.reliability is not None
    assert report.reliability.cases == {
        "tool_selection": 2, "argument_extraction": 2, "multi_tool": 1, "abstention": 2,
    }  # fmt: skip
    assert report.reliability.pass_hat_k["multi_tool"] == (1.0, 1.0, 1.0)
    assert "pass^k of 3 samples at temperature 0.7" in render_report(report, settings.gates)


def test_slices_and_what_may_be_compared_are_in_the_report(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    cases = [{"input": f"show {n}", "expected_tool": "list_lights", "slice": "terse"} for n in range(3)]
    path.write_text(json.dumps({"tool_selection": [*cases, {"input": "hmm", "expected_tool": "list_lights"}]}))
    suite = load_suite([path], LIGHTS)
    report = measure(settings, suite, LightServer(RIGHT))
    assert {name: (rate.correct, rate.total) for name, rate in report.slices.items()} == {
        "plain": (0, 1), "terse": (3, 3),
    }  # fmt: skip
    assert {case.slice for case in report.cases} == {"terse", ""}
    assert report.settings["conditions"] == conditions(settings, LIGHTS, Suites(suite, None))


def test_robustness_cases_are_asked_beside_the_suite_and_counted_by_no_gate(
    settings: Settings, suite: Suite, tmp_path: Path
) -> None:
    path = tmp_path / "hard.json"
    hard = [{"input": f"shwo {n}", "expected_tool": "list_lights", "slice": "typos"} for n in range(12)]
    destroyed = {"input": "thx", "category": "small_talk", "slice": "terse"}
    path.write_text(json.dumps({"tool_selection": hard, "abstention": [destroyed]}))
    robustness = load_suite([path], LIGHTS)
    turns = {**RIGHT, "shwo 0": [[("list_lights", {})]], "thx": [[("remove_lamp", {"lamp_id": "lamp_1"})]]}
    alone = measure(settings, suite, LightServer(turns))
    server = LightServer(turns)
    told: list[tuple[str, int, int]] = []
    report = measure(settings, suite, server, robustness=robustness, on_progress=lambda *what: told.append(what))
    assert (report.metrics, report.categories, report.verdicts) == (alone.metrics, alone.categories, alone.verdicts)
    assert all(result.passed for result in gate_results(report, settings.gates))
    assert {name: (rate.correct, rate.total) for name, rate in report.slices.items()} == {
        "plain": (17, 17), "terse": (0, 1), "typos": (1, 12),
    }  # fmt: skip
    assert [case.id for case in report.robustness] == [case.id for case in robustness.cases]
    assert report.suites == {"suite": suite.digest, "robustness": robustness.digest}
    assert report.suite_files.keys() == {"suite.json", "hard.json"}
    assert (len(report.failures), report.minefields, report.fault_types["no_call"]) == (12, 1, 11)
    assert ("cases", 22, 22) in told
    timed = [body["messages"][-1]["content"] for body in server.bodies[-4:]]
    assert not [text for text in timed if text.startswith("shwo")], "the latency is that of the suite"
    limited = measure(with_evaluation(settings, case_limit=2), suite, LightServer(turns), robustness=robustness)
    assert [case.input for case in limited.robustness] == ["shwo 0", "shwo 6", "thx"]


def test_the_case_limit_is_used_and_said(settings: Settings, suite: Suite) -> None:
    limited = settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update={"case_limit": 2})})
    report = measure(limited, suite, LightServer(RIGHT))
    assert report.case_limit == 2
    assert report.metrics["tool_selection"].total == 2
    assert "at most 2 cases of each list" in render_report(report, limited.gates)


@pytest.mark.parametrize("measure_latency", [True, False])
def test_a_first_request_longer_than_the_context_ends_the_evaluation(
    settings: Settings, suite: Suite, measure_latency: bool
) -> None:
    """Nothing is known of a model that was never reached; the refusal is neither its silence nor a fast answer."""
    too_long = (400, "This model's maximum context length is 4096 tokens.")
    for before in (0, len(suite.cases) - 1):
        server = LightServer(RIGHT, failures=[None] * before + [too_long] * 50)
        with pytest.raises(PlatformError, match=r"longer than its context: .* serving\.max_model_len"):
            measure(settings, suite, server, measure_latency=measure_latency)


@pytest.mark.parametrize(
    ("status", "said"), [(404, "has no model 'lights'"), (400, "refuses a request: nope"), (401, "status 401")]
)
def test_an_endpoint_that_fails_fails_the_evaluation(settings: Settings, suite: Suite, status: int, said: str) -> None:
    with pytest.raises(PlatformError, match=said):
        measure(settings, suite, LightServer(RIGHT, failures=[(status, "nope")] * 50))


def test_an_endpoint_that_is_not_there_is_named(settings: Settings, suite: Suite) -> None:
    with pytest.raises(PlatformError, match=r"http://127\.0\.0\.1:9/v1 does not answer"):
        evaluate(settings, LIGHTS, base_url="http://127.0.0.1:9/v1", model_name="m", model_digest=None, suite=suite)


def test_a_report_is_written_and_read_again(settings: Settings, suite: Suite, tmp_path: Path) -> None:
    report = measure(settings, suite, LightServer({}))
    save_report(report, tmp_path, settings.gates)
    assert load_report(tmp_path) == report
    assert (tmp_path / "report.txt").read_text() == render_report(report, settings.gates)
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    verdict = EvalVerdict.model_validate_json((tmp_path / "verdict.json").read_text())
    assert verdict.gates == tuple(gate_results(report, settings.gates))
    assert (verdict.passed, verdict.against_base, verdict.against_champion) == (False, (), ())
    better = measure(settings, suite, LightServer(RIGHT))
    save_report(better, tmp_path, settings.gates, base=report, champion=better)
    verdict = EvalVerdict.model_validate_json((tmp_path / "verdict.json").read_text())
    assert verdict.passed
    assert verdict.against_base == compare(better, report)
    assert verdict.against_champion == compare(better, better)
    assert verdict.gates[-1] == champion_gate(better, better, settings.gates)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(PlatformError, match="is damaged"):
        load_report(tmp_path)
    with pytest.raises(PlatformError, match="There is no evaluation report"):
        load_report(tmp_path / "nowhere")


def test_request_body_leaves_nothing_to_defaults_of_the_server() -> None:
    body = request_body("m", [{"role": "user", "content": "hi"}], LIGHTS.openai_tools(), max_tokens=7)
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.0, 7, "m")
    assert all(tool["function"]["strict"] for tool in body["tools"])
