"""The gates between a model and its deployment. They fail closed: what cannot be shown to pass does not."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict

from taskagent_platform.artifacts import Manifest, code_version, read_manifest
from taskagent_platform.domains.base import Domain
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import GateSettings, Settings

if TYPE_CHECKING:  # the evaluation imports the OpenAI client, which takes a second; the gateway need not wait for it
    from taskagent_platform.evaluation.report import EvalReport

REPORT_KIND = "eval_report"


class GateResult(BaseModel):
    """One gate as it was judged.

    Attributes:
        name: a metric's name, or ``latency_p95_ms``.
        value: what was measured: a rate, or milliseconds; None if it was not measured.
        target: the rate must be greater, the latency less.
        n: cases, calls or requests that were counted.
        interval: the Wilson 95 % interval of a rate; None for milliseconds and for what was not measured.
        passed: whether it lets the model through.
        reason: why it does not, and by how much; empty if it does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    value: float | None
    target: float
    n: int
    interval: tuple[float, float] | None
    passed: bool
    reason: str


class Verdict(NamedTuple):
    """What the gates say of one model.

    Attributes:
        gates: every gate; none where there is no report to read.
        refusals: why the model may not be deployed, a sentence each; none if it may.
        report_digest: the report that was read; None where there is none.
    """

    gates: tuple[GateResult, ...]
    refusals: tuple[str, ...]
    report_digest: str | None


def check_gates(report: "EvalReport", gates: GateSettings) -> list[GateResult]:
    """Judges a report by the gates as they are set now, from its cases, whatever it says of itself.

    Rates must be strictly greater than their target, the latency strictly less; a measure that is missing, rests on
    nothing or comes from an evaluation that did not end does not pass.
    """
    from taskagent_platform.evaluation.report import LATENCY_GATE, gate_results, metrics_of

    metrics = {str(name): metric for name, metric in metrics_of(report.cases, gates).items()}
    results = []
    for result in gate_results(report, gates):
        metric = metrics.get(result.name)
        n = metric.total if metric is not None else 0 if report.latency is None else report.latency.requests
        interval = None if metric is None or metric.low is None or metric.high is None else (metric.low, metric.high)
        passed, reason = result.passed, result.reason
        value, target = result.measured, result.target
        # Said again in the positive: a figure that is no number is neither over nor under its target.
        good = value is not None and (value < target if result.name == LATENCY_GATE else value > target)
        if passed and (n < 1 or not good):
            passed, reason = False, f"{result.name} is {value} on {n} cases or requests: it was not really measured."
        results.append(
            GateResult(
                name=result.name, value=value, target=target, n=n, interval=interval, passed=passed, reason=reason
            )
        )
    return results


def report_code_version(domain: Domain) -> str:
    """Returns the version of the code that decides what a report says; the report's artifact carries it."""
    return code_version("evaluation", "serving/server.py", f"domains/{domain.name}")


def judge(settings: Settings, domain: Domain, model: Manifest, report_folder: Path) -> Verdict:
    """Reads the report of exactly this model and judges it by the present gates, suites, code and settings.

    Args:
        settings: the gates, and how the model would be served.
        domain: whose suites it must have been measured on.
        model: the merged model's manifest.
        report_folder: the ``eval_report`` artifact.
    """
    from taskagent_platform.evaluation.report import load_report

    try:
        manifest = read_manifest(report_folder, kind=REPORT_KIND, verify=True)
        report = load_report(report_folder)
    except PlatformError as error:
        return Verdict((), (f"There is no evaluation report to go by: {error}",), None)
    gates = tuple(check_gates(report, settings.gates))
    refusals = _mismatches(settings, domain, model, manifest, report)
    refusals += [gate.reason for gate in gates if not gate.passed]
    return Verdict(gates, tuple(dict.fromkeys(refusals)), manifest.digest)


def _mismatches(
    settings: Settings, domain: Domain, model: Manifest, manifest: Manifest, report: "EvalReport"
) -> list[str]:
    """Returns why the report says nothing of this model as it would be served now."""
    from taskagent_platform.evaluation.suite import load_suite

    problems = []
    if report.model_digest != model.digest:
        judged = "an unknown model" if report.model_digest is None else f"model {report.model_digest[:12]}"
        problems.append(f"The report is of {judged}, not of {model.digest[:12]}: evaluate this model.")
    if report.domain != domain.name:
        problems.append(f"The report is of the domain {report.domain}, not of {domain.name}.")
    suite = load_suite(domain.suites, domain).limited(settings.evaluation.case_limit)
    if report.suite_digest != suite.digest:
        problems.append("The report is stale: the domain's suites, or evaluation.case_limit, changed since.")
    elif sorted(case.id for case in report.cases) != sorted(case.id for case in suite.cases):
        problems.append(f"The report holds other cases ({len(report.cases)}) than the suites ({len(suite.cases)}).")
    if manifest.code_version != report_code_version(domain):
        problems.append("The report is stale: the code that evaluates changed since.")
    serving = settings.serving
    served = {
        "profile": settings.profile, "max_tokens": serving.max_tokens, "dtype": serving.dtype,
        "speculation": serving.speculation, "enforce_eager": serving.enforce_eager,
    }  # fmt: skip
    for name, value in served.items():
        measured = report.settings.get(name)
        if measured != value:
            problems.append(f"The report is stale: it was measured with {name} = {measured}, which is {value} now.")
    single = [case for case in suite.cases if case.list_name in ("tool_selection", "argument_extraction")]
    wanted = min(settings.evaluation.latency_requests, len(single))
    if report.latency is not None and report.latency.requests < wanted:
        problems.append(f"The latency was measured on {report.latency.requests} requests instead of {wanted}.")
    return problems
