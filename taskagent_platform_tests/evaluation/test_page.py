"""The report as a page: whole, self-contained, and safe whatever a model wrote."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

from taskagent_platform.evaluation.comparison import champion_gate
from taskagent_platform.evaluation.latency import Latency
from taskagent_platform.evaluation.load_curve import LoadCurve, LoadPoint
from taskagent_platform.evaluation.page import NO_CALL, UNKNOWN, UNREADABLE, confusion, render_page, visible
from taskagent_platform.evaluation.report import CaseRecord, EvalReport, FaultRecord, Rate, Reliability, gate_results
from taskagent_platform_tests.evaluation.test_report import ALL, GATES, record, report_of

HOSTILE = '</script><script>alert(1)</script><img src="http://127.0.0.1/x" onerror=alert(2)>\'"&{{ 7 * 7 }}'
CURVE = LoadCurve(
    points=(
        LoadPoint(concurrency=1, requests=9, requests_per_s=1.0, p50_ms=900, p95_ms=1200),
        LoadPoint(concurrency=2, requests=9, requests_per_s=1.5, p50_ms=1100, p95_ms=1500),
        LoadPoint(concurrency=4, requests=9, requests_per_s=1.5, p50_ms=2100, p95_ms=2500),
    ),
    saturated_at=2,
    ended="saturated",
)


class Page(HTMLParser):
    """What a browser would make of a page, as far as safety goes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.failures: list[dict[str, str | None]] = []
        self.text = ""
        self.script = ""
        self.source = text
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "details":
            self.failures.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.script += data
        self.text += data


def failed(number: int, **changes: Any) -> CaseRecord:
    return record("tool_selection", number, False).model_copy(update=changes)


def hostile_report() -> EvalReport:
    case = failed(
        0,
        id=HOSTILE, input=HOSTILE, category=HOSTILE, text=HOSTILE, slice="typos",
        faults=(FaultRecord(type="wrong_tool", sentence=HOSTILE, tool="fly", argument="x"),),
        expected=({"tool": "list_lights", "arguments": {HOSTILE: HOSTILE}},),
        got=({"tool": HOSTILE, "arguments": HOSTILE},),
        messages=(
            {"role": "user", "content": HOSTILE},
            {"role": "assistant", "tool_calls": [{"function": {"name": HOSTILE, "arguments": HOSTILE}}]},
            {"role": "tool", "content": "bell\x07 and \u202eturned"},
        ),
    )  # fmt: skip
    slices = {"plain": Rate.of(3, 4), "typos": Rate.of(0, 1)}
    return report_of({}, cases=(case, record("abstention", 0, True)), slices=slices, load=CURVE, model_name=HOSTILE)


def page_of(report: EvalReport, **others: EvalReport) -> Page:
    gates = [*gate_results(report, GATES), champion_gate(report, others.get("champion"), GATES)]
    return Page(render_page(report, gates, **others))


def test_what_a_model_wrote_is_text_and_nothing_else() -> None:
    page = page_of(hostile_report())
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    # Title, heading, id, input, category, fault, expected, got, conversation: all of it is there to be read.
    assert page.text.count(HOSTILE) >= 8
    assert "bell\\u0007 and \\u202eturned" in page.text


def test_the_page_needs_nothing_else_and_may_load_nothing() -> None:
    page = page_of(hostile_report())
    assert not {name for name, _ in page.attributes} & {"src", "srcset", "action"}
    assert all(value and value.startswith("#") for name, value in page.attributes if name == "href")
    policy = next(value for name, value in page.attributes if name == "content" and value and "default-src" in value)
    assert "default-src 'none'" in policy
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy, "the page's own script may run"


def test_every_failure_is_there_with_what_it_can_be_filtered_by() -> None:
    page = page_of(report_of({**ALL, "multi_tool_chains": (90, 100)}))
    assert len(page.failures) == 10
    [one] = page_of(hostile_report()).failures
    assert json.loads(one["data-list"] or "") == ["tool_selection"]
    assert json.loads(one["data-faults"] or "") == ["wrong_tool"]
    assert json.loads(one["data-slice"] or "") == ["typos"]
    assert set(json.loads(one["data-tools"] or "")) == {"list_lights", HOSTILE}
    filters = {value for name, value in page.attributes if name == "data-filter"}
    assert filters == {"list", "verdict", "faults", "tools", "text"}


def test_failures_of_robustness_suites_are_marked_as_such() -> None:
    page = page_of(hostile_report().model_copy(update={"robustness": (failed(9, id="hard"),)}))
    assert [json.loads(failure["data-suite"] or "") for failure in page.failures] == [["gated"], ["robustness"]]
    assert "1 of these cases are of the robustness suites" in page.text
    filters = {value for name, value in page.attributes if name == "data-filter"}
    assert filters == {"list", "verdict", "faults", "tools", "text", "slice", "suite"}


def test_the_figures_are_those_of_the_report() -> None:
    report = report_of(
        {**ALL, "abstention": (3, 4)},
        latency=Latency(requests=4, p50_ms=100, p95_ms=190, p99_ms=200, all_ms=(80.0, 100.0, 150.0, 200.0)),
        load=CURVE,
        slices={"plain": Rate.of(5, 8), "typos": Rate.of(1, 4)},
        reliability=Reliability(
            temperature=0.7, samples=2, cases={"tool_selection": 9}, pass_hat_k={"tool_selection": (0.9, 0.8)}
        ),
    )
    worse = report_of({**ALL, "tool_selection": (90, 100)})
    page = page_of(report, base=worse, champion=worse)
    text = re.sub(r"\s+", " ", page.text)
    for shown in (
        "Compared with the base model", "Compared with the champion", "+10.0", "typos", "25.0%", "p95 190 ms",
        "Saturated at 2 requests at once", "k = 2", "80.0%", "2 at once: 1.50 requests/s", "PASS: ready",
        "+3.3 points", "+1.2 to +5.4",
    ):  # fmt: skip
        assert shown in text, shown
    assert "1.2% to 5.4%" not in text, "a difference is told in points"
    assert page.tags.count("circle") == 3
    assert page.tags.count("rect") == 4


def test_a_page_of_nothing_but_passes() -> None:
    assert "No case failed." in page_of(report_of(ALL)).text


def test_confusion_counts_the_tool_called_first() -> None:
    def case(number: int, right: str | None, *called: str, **changes: Any) -> CaseRecord:
        expected = ({"tool": right},) if right else ()
        return failed(number, expected=expected, got=tuple({"tool": name} for name in called), **changes)

    cases = [
        case(1, "add", "add"), case(2, "add", "list", "add"), case(3, "add"), case(4, None, "add"), case(5, None),
        case(6, "add", "add", verdict="malformed"), case(7, "add", "list", list_name="multi_tool_chains"),
        case(8, "add", "fly", faults=(FaultRecord(type="unknown_tool", sentence="x", tool="fly"),)),
    ]  # fmt: skip
    assert confusion(cases) == {
        "add": {"add": 1, "list": 1, NO_CALL: 1, UNREADABLE: 1, UNKNOWN: 1},
        NO_CALL: {"add": 1, NO_CALL: 1},
    }
    page = page_of(report_of({}, cases=tuple(cases)))
    assert "fly" not in re.findall(r"<option>(\w+)", page.source), "a made-up name is found by its fault"


def test_invisible_characters_are_written_out() -> None:
    assert visible("a\u200bb\n\tc\ud800") == "a\\u200bb\n\tc\\ud800"
    assert visible("Grüße 日本 🙂") == "Grüße 日本 🙂"
    assert visible(3) == 3
