"""The evaluation report as one HTML page that needs nothing else: no network, no other file.

Everything that a model, a user or a tool wrote is escaped by the template engine, control and direction-changing
characters are written out, and the page's own security policy lets nothing be loaded and no script run but its own.
"""

import base64
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from taskagent_platform.evaluation.comparison import compare
from taskagent_platform.evaluation.gate import CHAMPION_GATE, LATENCY_GATE, GateResult
from taskagent_platform.evaluation.metric import METRIC_TITLES

if TYPE_CHECKING:  # the report is saved as a page, too
    from taskagent_platform.evaluation.latency import Latency
    from taskagent_platform.evaluation.load_curve import LoadCurve
    from taskagent_platform.evaluation.report import CaseRecord, EvalReport, Rate

PAGE_FILE = "report.html"
NO_CALL = "no call"
UNREADABLE = "unreadable"
UNKNOWN = "unknown tool"
_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_SCRIPT = Path(__file__).with_name("page.js")
_BINS = 20
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 520.0, 200.0, 56.0, 34.0


class Bar(NamedTuple):
    """One bar of a chart, in the chart's units."""

    x: float
    y: float
    width: float
    height: float
    label: str


class Axis(NamedTuple):
    """A mark on an axis: where it is and what it says."""

    at: float
    label: str


class Chart(NamedTuple):
    """A drawing: bars, or dots joined by a line; ``marks`` are upright lines with a label."""

    width: float
    height: float
    left: float
    floor: float
    bars: tuple[Bar, ...]
    dots: tuple[Bar, ...]
    x_axis: tuple[Axis, ...]
    y_axis: tuple[Axis, ...]
    marks: tuple[Axis, ...] = ()

    @property
    def line(self) -> str:
        """The dots as an SVG polyline's points."""
        return " ".join(f"{dot.x:.1f},{dot.y:.1f}" for dot in self.dots)


def render_page(
    report: "EvalReport",
    gates: Sequence[GateResult],
    *,
    base: "EvalReport | None" = None,
    champion: "EvalReport | None" = None,
) -> str:
    """Renders a report as a page.

    Args:
        report: the report.
        gates: as they were judged.
        base: the base model's report.
        champion: the report of the model that this one would replace.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: "-" if value is None else f"{value:.1%}"
    environment.filters["points"] = lambda value: f"{value * 100:+.1f}"
    environment.filters["written"] = lambda value: value if isinstance(value, str) else _JSON.encode(value)
    script = _SCRIPT.read_text(encoding="utf-8")
    others = [(title, other) for title, other in (("base model", base), ("champion", champion)) if other is not None]
    return environment.get_template(_TEMPLATE.name).render(
        report=report,
        gates=gates,
        gate_titles={gate.name: METRIC_TITLES.get(gate.name, _GATE_TITLES.get(gate.name, gate.name)) for gate in gates},  # type: ignore[call-overload]
        gate_figures={gate.name: _figures(gate) for gate in gates},
        targets={gate.name: gate.target for gate in gates},
        passed=all(gate.passed for gate in gates),
        titles=METRIC_TITLES,
        comparisons=[(title, other, compare(report, other)) for title, other in others],
        others=others,
        slices=_with_others(report.slices, [(title, other.slices) for title, other in others]),
        robustness_ids={case.id for case in report.robustness},
        confusion=(confused := confusion(report.cases)),
        called=sorted({name for counts in confused.values() for name in counts}, key=_tools_first),
        latency_chart=_histogram(report.latency),
        load_chart=_load_chart(report.load),
        fault_types=sorted({fault.type for case in report.failures for fault in case.faults}),
        failed_tools=sorted({tool for case in report.failures for tool in _tools(case)}),
        failed_slices=sorted({case.slice for case in report.failures if case.slice}),
        failed_lists=sorted({case.list_name for case in report.failures}),
        failed_verdicts=sorted({case.verdict for case in report.failures}),
        tools_of=_tools,
        # The file is ours and holds nothing of a report.
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


_JSON = json.JSONEncoder(ensure_ascii=False)
_GATE_TITLES = {LATENCY_GATE: "Latency (p95)", CHAMPION_GATE: "No worse than the champion"}


def visible(value: Any) -> Any:
    """Returns a text with its invisible characters written out: controls, and those that change the direction."""
    if type(value) is not str:
        return value
    return "".join(
        f"\\u{ord(character):04x}"
        if character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co")
        else character
        for character in value
    )


def confusion(cases: Iterable["CaseRecord"]) -> dict[str, dict[str, int]]:
    """Counts which tool was called where which was right, over the cases that ask for one call or none.

    Returns:
        for each right tool (or :data:`NO_CALL`), how often each tool was called first. An answer that could not be
        read counts as :data:`UNREADABLE`, whatever name a model made up as :data:`UNKNOWN`.
    """
    counts: dict[str, Counter[str]] = {}
    for case in cases:
        if case.list_name == "multi_tool_chains":
            continue
        right = case.expected[0]["tool"] if case.expected else NO_CALL
        if case.verdict == "malformed":
            called = UNREADABLE
        else:
            called = case.got[0]["tool"] or UNREADABLE if case.got else NO_CALL
        if called in _unknown(case):
            called = UNKNOWN
        counts.setdefault(right, Counter())[called] += 1
    return {right: dict(counts[right]) for right in sorted(counts, key=_tools_first)}


def _tools_first(name: str) -> tuple[int, str]:
    others = (NO_CALL, UNKNOWN, UNREADABLE)
    return (others.index(name) + 1 if name in others else 0), name


def _with_others(
    own: Mapping[str, "Rate"], others: Sequence[tuple[str, Mapping[str, "Rate"]]]
) -> list[tuple[str, "Rate", list["Rate | None"]]]:
    return [(name, rate, [rates.get(name) for _, rates in others]) for name, rate in own.items()]


def _tools(case: "CaseRecord") -> list[str]:
    """Returns the tools that a case can be found by; a name that the model made up is found by its fault."""
    return sorted({call["tool"] for call in (*case.expected, *case.got) if call["tool"]} - _unknown(case))


def _unknown(case: "CaseRecord") -> set[str | None]:
    return {fault.tool for fault in case.faults if fault.type == "unknown_tool"}


class _Figures(NamedTuple):
    """What was measured and what is wanted, and how sure the first is, as texts."""

    measured: str
    target: str
    interval: str


def _figures(gate: GateResult) -> _Figures:
    low, high = gate.interval or (None, None)
    if gate.name == LATENCY_GATE:
        return _Figures("-" if gate.value is None else f"{gate.value:.0f} ms", f"< {gate.target:.0f} ms", "-")
    if gate.name == CHAMPION_GATE:
        measured = "-" if gate.value is None else f"{gate.value * 100:+.1f} points"
        interval = "-" if low is None or high is None else f"{low * 100:+.1f} to {high * 100:+.1f}"
        return _Figures(measured, f"≥ {gate.target * 100:+.1f} points", interval)
    interval = "-" if low is None or high is None else f"{low:.1%} to {high:.1%}"
    return _Figures("-" if gate.value is None else f"{gate.value:.1%}", f"> {gate.target:.1%}", interval)


def _histogram(latency: "Latency | None") -> Chart | None:
    if latency is None or not latency.all_ms:
        return None
    low, high = min(latency.all_ms), max(latency.all_ms)
    count = min(_BINS, len(latency.all_ms))
    step = (high - low) / count or 1.0
    bins = Counter(min(count - 1, int((value - low) / step)) for value in latency.all_ms)
    most = max(bins.values())
    floor, wide = _HEIGHT - _BOTTOM, (_WIDTH - _LEFT) / count
    bars = tuple(
        Bar(
            _LEFT + place * wide,
            floor - bins[place] / most * (floor - 10),
            wide - 1,
            bins[place] / most * (floor - 10),
            f"{low + place * step:.0f} to {low + (place + 1) * step:.0f} ms: {bins[place]} requests",
        )
        for place in range(count)
    )
    x_axis = (Axis(_LEFT + 24, f"{low:.0f} ms"), Axis(_WIDTH - 30, f"{low + count * step:.0f} ms"))
    marks = tuple(
        Axis(_LEFT + (value - low) / (count * step) * (_WIDTH - _LEFT), name)
        for value, name in ((latency.p50_ms, "p50"), (latency.p95_ms, "p95"))
    )
    return Chart(_WIDTH, _HEIGHT, _LEFT, floor, bars, (), x_axis, (Axis(10, str(most)), Axis(floor, "0")), marks)


def _load_chart(load: "LoadCurve | None") -> Chart | None:
    if load is None or not load.points:
        return None
    most = max(point.requests_per_s for point in load.points) or 1.0
    floor = _HEIGHT - _BOTTOM
    gap = (_WIDTH - _LEFT - 60) / max(1, len(load.points) - 1)
    dots = tuple(
        Bar(
            _LEFT + 20 + place * gap,
            floor - point.requests_per_s / most * (floor - 10),
            0,
            0,
            f"{point.concurrency} at once: {point.requests_per_s:.2f} requests/s, p95 {point.p95_ms:.0f} ms",
        )
        for place, point in enumerate(load.points)
    )
    x_axis = tuple(Axis(dot.x, str(point.concurrency)) for dot, point in zip(dots, load.points, strict=True))
    return Chart(_WIDTH, _HEIGHT, _LEFT, floor, (), dots, x_axis, (Axis(10, f"{most:.2f}/s"), Axis(floor, "0")))
