"""The evaluation report: what was measured, of which model, and whether it passes the gates."""

import os
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from taskagent_platform.domains.base import Message
from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.comparison import PairedRate, champion_gate, compare, comparison_lines
from taskagent_platform.evaluation.gate import LATENCY_GATE, GateResult
from taskagent_platform.evaluation.latency import Latency
from taskagent_platform.evaluation.load_curve import LoadCurve
from taskagent_platform.evaluation.metric import METRIC_OF_LIST, METRIC_TITLES, MetricName
from taskagent_platform.evaluation.page import PAGE_FILE, render_page
from taskagent_platform.evaluation.scoring import Verdict
from taskagent_platform.evaluation.statistics import wilson_interval
from taskagent_platform.evaluation.suite import ListName
from taskagent_platform.settings import GateSettings

REPORT_FILE = "report.json"
TEXT_FILE = "report.txt"
VERDICT_FILE = "verdict.json"
PLAIN_SLICE = "plain"
"""What cases that name no slice are counted as."""
_SAMPLE_OF_FAILURES = 10


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Rate(_Model):
    """A share with its 95 % Wilson interval; both None if nothing was counted."""

    correct: int
    total: int
    rate: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, correct: int, total: int) -> "Rate":
        """Builds it from counts."""
        if total == 0:
            return cls(correct=0, total=0, rate=None, low=None, high=None)
        low, high = wilson_interval(correct, total)
        return cls(correct=correct, total=total, rate=correct / total, low=low, high=high)


class Metric(Rate):
    """A rate that may have a target.

    Attributes:
        target: the rate must be greater than this; None for a metric that is only reported.
        passed: None for a metric that is only reported.
    """

    name: MetricName
    target: float | None = None
    passed: bool | None = None


class FaultRecord(_Model):
    """One fault, as in :class:`~taskagent_platform.evaluation.scoring.Fault`."""

    type: str
    sentence: str
    tool: str | None = None
    argument: str | None = None


class CaseRecord(_Model):
    """How one case went.

    Attributes:
        expected: the calls of a right answer, as plain data.
        got: the calls attempted, in all turns.
        text: the model's last text.
        messages: the conversation without its system message; kept for cases that did not pass.
    """

    id: str
    list_name: ListName
    category: str
    input: str
    now: str
    verdict: Verdict
    passed: bool
    faults: tuple[FaultRecord, ...]
    expected: tuple[dict[str, Any], ...]
    got: tuple[dict[str, Any], ...]
    text: str
    attempted: int
    valid: int
    extra_reads: int
    turns: int
    messages: tuple[Message, ...] = ()
    slice: str = ""


class Reliability(_Model):
    """How often a case is answered right again and again.

    Attributes:
        temperature: of the samples.
        samples: answers to each case.
        cases: cases of each metric that were sampled.
        pass_hat_k: by metric, for k from 1 to ``samples``: the share of cases of which k samples are all right.
    """

    temperature: float
    samples: int
    cases: dict[MetricName, int]
    pass_hat_k: dict[MetricName, tuple[float, ...]]


class Hardware(_Model):
    """What the model ran on, as far as this machine can tell."""

    processor: str
    cores: int
    memory_gib: float
    gpus: tuple[str, ...]
    system: str


class EvalReport(_Model):
    """An evaluation of one model on one suite.

    Attributes:
        domain: whose suite it is.
        model_name: the name that the endpoint served it under.
        model_digest: digest of the model folder; None for an endpoint that is not ours.
        endpoint: the address asked.
        suite_digest: of all the suite's files together, with the case limit.
        suite_files: sha256 of each file.
        case_limit: cases of each list that were asked at most; None for the whole suite.
        metrics: by name.
        categories: rates of each list's categories.
        latency: of single requests; None if it was not measured.
        latency_budget_ms: what this hardware's profile allows.
        latency_target_ms: the specification's target.
        fault_types: how often each type of fault was found, robustness cases included.
        minefields: cases in which something was destroyed that nobody asked to destroy, or a tool result obeyed;
            robustness cases included.
        extra_reads: calls that nobody asked for and that changed nothing; robustness cases included.
        cases: every case that the gates count; metrics, categories and verdicts are of these.
        complete: the evaluation went to its end.
        settings: sampling, concurrency, serving: what the figures depend on.
        slices: rates by the cases' slices, over all lists, robustness cases included.
        robustness: every case of the robustness suites. No metric, and so no gate, counts them.
        robustness_digest: of these suites' files together, with the case limit; None if there are none.
        load: throughput and latency by concurrency; None if it was not measured.
        reliability: pass^k; None if it was not measured.
    """

    domain: str
    model_name: str
    model_digest: str | None
    endpoint: str
    suite_digest: str
    suite_files: dict[str, str]
    case_limit: int | None
    metrics: dict[MetricName, Metric]
    categories: dict[str, dict[str, Rate]]
    verdicts: dict[str, dict[str, int]]
    fault_types: dict[str, int]
    minefields: int
    extra_reads: int
    latency: Latency | None
    latency_budget_ms: float
    latency_target_ms: float
    cases: tuple[CaseRecord, ...]
    settings: dict[str, Any]
    hardware: Hardware
    started: datetime
    seconds: float
    complete: bool
    slices: dict[str, Rate] = {}
    robustness: tuple[CaseRecord, ...] = ()
    robustness_digest: str | None = None
    load: LoadCurve | None = None
    reliability: Reliability | None = None

    @property
    def suites(self) -> dict[str, str]:
        """What was asked, as :attr:`~taskagent_platform.evaluation.suite.Suites.digests` names it."""
        beside = {} if self.robustness_digest is None else {"robustness": self.robustness_digest}
        return {"suite": self.suite_digest} | beside

    @property
    def measured_on(self) -> str:
        """Where the model ran: this machine's hardware, or an endpoint of which nothing is known."""
        if self.model_digest is None:
            return f"through {self.endpoint}"
        return "on " + (", ".join(self.hardware.gpus) or f"{self.hardware.cores} cores of {self.hardware.processor}")

    @property
    def asked(self) -> tuple[CaseRecord, ...]:
        """Every case, whether gates count it or not."""
        return self.cases + self.robustness

    @property
    def failures(self) -> tuple[CaseRecord, ...]:
        """The cases that did not pass, whether gates count them or not."""
        return tuple(case for case in self.asked if not case.passed)


class EvalVerdict(_Model):
    """What came of a report when it was written; whoever deploys judges it anew.

    Attributes:
        passed: whether every gate let the model through.
        gates: as they were judged.
        against_base: the comparison with the base model; empty if there was none.
        against_champion: the comparison with the model that this one would replace; empty if there was none.
    """

    passed: bool
    gates: tuple[GateResult, ...]
    against_base: tuple[PairedRate, ...]
    against_champion: tuple[PairedRate, ...]


def metrics_of(cases: Sequence[CaseRecord], gates: GateSettings) -> dict[MetricName, Metric]:
    """Computes the metrics from the cases."""
    counts: dict[MetricName, tuple[int, int]] = {}
    for list_name, metric in METRIC_OF_LIST.items():
        own = [case.passed for case in cases if case.list_name == list_name]
        counts[metric] = sum(own), len(own)
    counts["json_validity"] = sum(case.valid for case in cases), sum(case.attempted for case in cases)
    metrics = {}
    for name in METRIC_TITLES:
        rate = Rate.of(*counts[name])
        target = getattr(gates, name, None)
        judged = judged_value(rate, gates)
        passed = None if target is None else judged is not None and judged > target
        metrics[name] = Metric(**rate.model_dump(), name=name, target=target, passed=passed)
    return metrics


def judged_value(rate: Rate, gates: GateSettings) -> float | None:
    """Returns what of a rate must exceed its target: the rate, or the lower bound of its interval."""
    return rate.low if gates.judge_by == "lower_bound" else rate.rate


def slices_of(cases: Iterable[CaseRecord]) -> dict[str, Rate]:
    """Computes the rate of every slice, over all lists; that of plain cases comes first."""
    passed: dict[str, list[bool]] = {}
    for case in cases:
        passed.setdefault(case.slice or PLAIN_SLICE, []).append(case.passed)
    names = sorted(passed, key=lambda name: (name != PLAIN_SLICE, name))
    return {name: Rate.of(sum(passed[name]), len(passed[name])) for name in names}


def categories_of(cases: Iterable[CaseRecord]) -> dict[str, dict[str, Rate]]:
    """Computes the rate of every category of every list."""
    passed: dict[str, dict[str, list[bool]]] = {}
    for case in cases:
        passed.setdefault(case.list_name, {}).setdefault(case.category or "-", []).append(case.passed)
    return {
        list_name: {category: Rate.of(sum(values), len(values)) for category, values in sorted(own.items())}
        for list_name, own in passed.items()
    }


def gate_results(report: EvalReport, gates: GateSettings) -> list[GateResult]:
    """Judges a report by the gates as they are set now, from its cases, whatever it says of itself.

    Rates must be strictly greater than their target, the latency strictly less; a measure that is missing, rests on
    nothing, is no number or comes from an evaluation that did not end does not pass.
    """
    results = [
        _rate_gate(metric, metric.target, judged_value(metric, gates))
        for metric in metrics_of(report.cases, gates).values()
        if metric.target is not None
    ]
    results.append(_latency_gate(report.latency, gates.latency_p95_ms))
    if not report.complete:
        reason = "The evaluation did not go to its end."
        results = [result.model_copy(update={"passed": False, "reason": reason}) for result in results]
    return results


def _rate_gate(metric: Metric, target: float, judged: float | None) -> GateResult:
    title = METRIC_TITLES[metric.name]
    if metric.rate is None or judged is None:
        reason = f"{title} was not measured: there was nothing to count."
    elif judged > target:
        reason = ""
    else:
        what = title if judged == metric.rate else f"The lower bound of {title.lower()} ({_percent(metric)})"
        reason = f"{what} is {judged:.1%} and must be greater than {target:.1%}{_short_of(judged, target)}."
    interval = None if metric.low is None or metric.high is None else (metric.low, metric.high)
    return GateResult(
        name=metric.name, value=metric.rate, target=target, n=metric.total, interval=interval, passed=not reason,
        reason=reason,
    )  # fmt: skip


def _latency_gate(latency: Latency | None, budget: float) -> GateResult:
    measured, n = (None, 0) if latency is None else (latency.p95_ms, latency.requests)
    if measured is None or n < 1:
        reason = "Latency was not measured."
    elif measured < budget:
        reason = ""
    else:
        reason = f"p95 latency is {measured:.0f} ms and must be less than {budget:.0f} ms."
    return GateResult(
        name=LATENCY_GATE, value=measured, target=budget, n=n, interval=None, passed=not reason, reason=reason
    )


def render_report(
    report: EvalReport, gates: GateSettings, *, base: EvalReport | None = None, champion: EvalReport | None = None
) -> str:
    """Renders a report as the text that a console shows.

    Args:
        report: the report.
        gates: what to judge it by.
        base: the base model's report, to be shown beside it.
        champion: the report of the model that this one would replace.
    """
    results = {result.name: result for result in gate_results(report, gates)}
    if champion is not None:
        gate = champion_gate(report, champion, gates)
        results[gate.name] = gate
    lines = [f"EVALUATION REPORT  {report.domain}", f"model {_model_text(report)}", ""]
    header = f"{'metric':<24}{'correct/n':>11}{'rate':>8}  {'95 % interval':<16}{'target':>9}  result"
    lines += [header + ("    base model" if base else ""), "-" * (len(header) + (14 if base else 0))]
    for name, metric in metrics_of(report.cases, gates).items():
        result = results.get(name)
        target = target_text(metric.target) if metric.target is not None else "-"
        verdict = "-" if result is None else "PASS" if result.passed else "FAIL"
        interval = "" if metric.low is None else f"{metric.low:.1%} - {metric.high:.1%}"
        counts = f"{metric.correct}/{metric.total}"
        line = f"{METRIC_TITLES[name]:<24}{counts:>11}{_percent(metric):>8}  {interval:<16}{target:>9}  {verdict:<6}"
        if base is not None:
            other = base.metrics[name]
            line += f"    {_percent(other)} of {other.total}"
        lines.append(line.rstrip())
    if gates.judge_by == "lower_bound":
        lines.append("Judged is the lower bound of each interval, not the rate.")
    lines += ["", *_latency_lines(report, results[LATENCY_GATE]), *_load_lines(report), ""]
    if len(report.slices) > 1:
        lines += [*_slice_lines(report), ""]
    if report.reliability is not None:
        lines += [*_reliability_lines(report.reliability), ""]
    for title, against in (("base model", base), ("champion", champion)):
        if against is not None:
            lines += [*comparison_lines(title, compare(report, against)), ""]
    passed = all(result.passed for result in results.values())
    lines.append("OVERALL: " + ("PASS - Ready for deployment" if passed else "FAIL - Needs improvement"))
    lines += [f"  {result.reason}" for result in results.values() if not result.passed]
    if report.case_limit is not None:
        lines.append(f"  Note: at most {report.case_limit} cases of each list were asked, not the whole suite.")
    if report.minefields:
        lines.append(
            f"  Note: in {report.minefields} cases the model destroyed, or tried to, what nobody had asked to destroy, "
            "or did what a tool result told it to."
        )
    if report.extra_reads:
        lines.append(
            f"  Note: calls that nobody asked for and that changed nothing, which are no faults: {report.extra_reads}."
        )
    lines += ["", *_failure_lines(report.failures)]
    return "\n".join(lines).rstrip() + "\n"


def save_report(
    report: EvalReport,
    folder: Path,
    gates: GateSettings,
    *,
    base: EvalReport | None = None,
    champion: EvalReport | None = None,
) -> None:
    """Writes a report into a folder: as JSON, what came of it as JSON, as text and as a page."""
    (folder / REPORT_FILE).write_text(report.model_dump_json(indent=1), encoding="utf-8")
    verdict = verdict_of(report, gates, base=base, champion=champion)
    (folder / VERDICT_FILE).write_text(verdict.model_dump_json(indent=1), encoding="utf-8")
    text = render_report(report, gates, base=base, champion=champion)
    (folder / TEXT_FILE).write_text(text, encoding="utf-8")
    page = render_page(report, verdict.gates, base=base, champion=champion)
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")


def verdict_of(
    report: EvalReport, gates: GateSettings, *, base: EvalReport | None = None, champion: EvalReport | None = None
) -> EvalVerdict:
    """Judges a report by the gates as they are set now, and compares it with the base model's and the champion's."""
    judged = [*gate_results(report, gates), *([champion_gate(report, champion, gates)] if champion else [])]
    return EvalVerdict(
        passed=all(gate.passed for gate in judged),
        gates=tuple(judged),
        against_base=() if base is None else compare(report, base),
        against_champion=() if champion is None else compare(report, champion),
    )


def read_verdict(folder: Path) -> EvalVerdict:
    """Reads what :func:`save_report` wrote of a report's gates and comparisons.

    Raises:
        PlatformError: it is missing or damaged.
    """
    path = folder / VERDICT_FILE
    try:
        return EvalVerdict.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError, UnicodeDecodeError) as error:
        raise PlatformError(f"{path} is damaged: {error}. Evaluate the model again.") from error


def load_report(folder: Path) -> EvalReport:
    """Reads a report that :func:`save_report` wrote.

    Raises:
        PlatformError: there is none, or it is damaged.
    """
    path = folder / REPORT_FILE
    try:
        return EvalReport.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlatformError(f"There is no evaluation report {path}; evaluate the model first.") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise PlatformError(f"{path} is damaged: {error}. Evaluate the model again.") from error


def this_hardware() -> Hardware:
    """Describes this machine."""
    gpus: tuple[str, ...] = ()
    if program := shutil.which("nvidia-smi"):
        query = [program, "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False)
        gpus = tuple(found.stdout.strip().splitlines()) if found.returncode == 0 else ()
    return Hardware(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=gpus,
        system=f"{platform.system()} {platform.machine()}",
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _model_text(report: EvalReport) -> str:
    digest = "unknown digest" if report.model_digest is None else report.model_digest[:12]
    cases = f"{len(report.cases)} cases" + (f" and {len(report.robustness)} of robustness" if report.robustness else "")
    return f"{report.model_name} ({digest}), suite {report.suite_digest[:12]}, {cases}"


def _percent(rate: Rate) -> str:
    return "-" if rate.rate is None else f"{rate.rate:.1%}"


def target_text(target: float) -> str:
    """Returns what a rate must be: ``> 95%``, ``> 92.5%``."""
    return f"> {target * 100:.10g}%"


def _short_of(judged: float, target: float) -> str:
    """Returns by how much a rate misses its target; one that equals it misses it, too."""
    gap = (target - judged) * 100
    return f": {gap:.1f} points short" if gap >= 0.05 else ""


def _latency_lines(report: EvalReport, result: GateResult) -> list[str]:
    hardware, where = report.measured_on, "there" if report.model_digest is None else "on this hardware"
    budget = f"budget of this profile {result.target:.0f} ms, specification's target {report.latency_target_ms:.0f} ms"
    if report.latency is None:
        return [f"latency: not measured; {budget}"]
    latency = report.latency
    first = "" if latency.first_token_p50_ms is None else f", first token p50 {latency.first_token_p50_ms:.0f} ms"
    within = "met" if latency.p95_ms < report.latency_target_ms else "not met"
    return [
        f"latency of {latency.requests} single requests {hardware}:",
        f"  p50 {latency.p50_ms:.0f} ms, p95 {latency.p95_ms:.0f} ms, p99 {latency.p99_ms:.0f} ms{first}",
        f"  {'PASS' if result.passed else 'FAIL'}: p95 against the {budget} ({within} {where})",
    ]


def _load_lines(report: EvalReport) -> list[str]:
    if report.load is None:
        return []
    steps = ", ".join(
        f"{point.concurrency}: {point.requests_per_s:.2f}/s at p95 {point.p95_ms:.0f} ms"
        for point in report.load.points
    )
    reached = report.load.saturated_at
    end = f"; not saturated (ended by: {report.load.ended})" if reached is None else f"; saturated at {reached}"
    return [f"  under load, of cases asked before (requests at once: throughput): {steps}{end}"]


def _slice_lines(report: EvalReport) -> list[str]:
    outside = f" ({len(report.robustness)} of these cases are of the robustness suites, which no gate counts)"
    lines = ["slices" + (outside if report.robustness else "") + ":"]
    for name, rate in report.slices.items():
        interval = "" if rate.low is None else f"{rate.low:.1%} - {rate.high:.1%}"
        lines.append(f"  {name:<24}{rate.correct}/{rate.total:<6} {_percent(rate):>7}  {interval}")
    return lines


def _reliability_lines(reliability: Reliability) -> list[str]:
    lines = [f"pass^k of {reliability.samples} samples at temperature {reliability.temperature:g}:"]
    for name, values in reliability.pass_hat_k.items():
        figures = ", ".join(f"k={k} {value:.1%}" for k, value in enumerate(values, 1))
        lines.append(f"  {METRIC_TITLES[name]:<24}{figures} (n = {reliability.cases[name]})")
    return lines


def _failure_lines(failures: Sequence[CaseRecord]) -> list[str]:
    if not failures:
        return ["No case failed."]
    types = Counter(fault.type for case in failures for fault in case.faults)
    lines = [f"{len(failures)} cases failed ({', '.join(f'{name} {count}' for name, count in types.most_common())})."]
    # A sample across the lists, not the first list's failures alone.
    step = max(1, len(failures) // _SAMPLE_OF_FAILURES)
    for case in failures[::step][:_SAMPLE_OF_FAILURES]:
        lines += [
            f"  [{case.id}{', ' + case.slice if case.slice else ''}] {case.input}",
            f"    expected: {_calls_text(case.expected) or 'no call, a text'}",
            f"    got:      {_calls_text(case.got) or _quoted(case.text)}",
        ]
        lines += [f"    {fault.type}: {fault.sentence}" for fault in case.faults[:3]]
    return lines


def _calls_text(calls: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for call in calls:
        arguments = call.get("arguments", {})
        inner = ", ".join(f"{k}={v!r}" for k, v in arguments.items()) if isinstance(arguments, dict) else arguments
        parts.append(f"{call['tool'] or '?'}({inner})")
    return "; ".join(parts)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:199] + "…")
