"""The gates between a model and its deployment. They fail closed: what cannot be shown to pass does not."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from taskagent_platform.artifacts import Manifest, read_manifest
from taskagent_platform.domains.base import Domain
from taskagent_platform.domains.version import version_with
from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.gate import GateResult
from taskagent_platform.serving.active import Deployment, active_file, read_active
from taskagent_platform.settings import Settings

if TYPE_CHECKING:  # the evaluation imports the OpenAI client, which takes a second; the gateway need not wait for it
    from taskagent_platform.evaluation.report import EvalReport

REPORT_KIND = "eval_report"


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


def report_code_version(domain: Domain) -> str:
    """Returns the version of the code and the domain that decide what a report says; its artifact carries it."""
    return version_with(domain, "evaluation", "serving/server.py")


def judge(settings: Settings, domain: Domain, model: Manifest, report_folder: Path) -> Verdict:
    """Reads the report of exactly this model and judges it by the present gates, suites, code and settings.

    Args:
        settings: the gates, and how the model would be served.
        domain: whose suites it must have been measured on.
        model: the merged model's manifest.
        report_folder: the ``eval_report`` artifact.
    """
    from taskagent_platform.evaluation.comparison import champion_gate
    from taskagent_platform.evaluation.report import gate_results, load_report

    try:
        manifest = read_manifest(report_folder, kind=REPORT_KIND, verify=True)
        report = load_report(report_folder)
    except PlatformError as error:
        return Verdict((), (f"There is no evaluation report to go by: {error}",), None)
    champion = champion_of(settings, domain, model.digest)
    try:
        against = None if champion is None else read_champion_report(settings, domain, champion)
        rank = champion_gate(report, against, settings.gates)
    except PlatformError as error:
        rank = champion_gate(report, None, settings.gates).model_copy(
            update={"passed": False, "reason": str(error), "note": ""}
        )
    gates = (*gate_results(report, settings.gates), rank)
    refusals = _mismatches(settings, domain, model, manifest, report)
    refusals += [gate.reason for gate in gates if not gate.passed]
    return Verdict(gates, tuple(dict.fromkeys(refusals)), manifest.digest)


def champion_of(settings: Settings, domain: Domain, model_digest: str) -> Deployment | None:
    """Returns the deployment that a model would replace; None where nothing is deployed, or the model itself is."""
    present = read_active(active_file(settings)).domains.get(domain.name)
    return None if present is None or present.active.model_digest == model_digest else present.active


def champion_report_folder(settings: Settings, domain: str, model_digest: str) -> Path:
    """Returns where the report of a deployed model is kept; the next evaluation replaces the one it was judged by."""
    return settings.folder(domain) / "deployment_reports" / model_digest


def read_champion_report(settings: Settings, domain: Domain, champion: Deployment) -> "EvalReport":
    """Reads the report that a candidate is compared with.

    Raises:
        PlatformError: it is missing or damaged, or says nothing of the champion on the present suites under the present
            conditions (:func:`~taskagent_platform.evaluation.run.conditions`).
    """
    from taskagent_platform.evaluation.report import load_report
    from taskagent_platform.evaluation.run import conditions
    from taskagent_platform.evaluation.suite import domain_suites

    remedy = "materialize eval_report to measure the champion again."
    folder = champion_report_folder(settings, domain.name, champion.model_digest)
    try:
        read_manifest(folder, kind=REPORT_KIND, verify=True)
        report = load_report(folder)
    except PlatformError as error:
        raise PlatformError(f"The champion's report cannot be used: {error} To go on, {remedy}") from error
    suites = domain_suites(domain, settings.evaluation.case_limit)
    if report.model_digest != champion.model_digest:
        raise PlatformError(f"The champion's report is of another model; {remedy}")
    if report.suites != suites.digests or report.settings.get("conditions") != conditions(settings, domain, suites):
        raise PlatformError(f"The champion was measured on other suites or under other conditions; {remedy}")
    return report


def _mismatches(
    settings: Settings, domain: Domain, model: Manifest, manifest: Manifest, report: "EvalReport"
) -> list[str]:
    """Returns why the report says nothing of this model as it would be served now."""
    from taskagent_platform.evaluation.run import SERVED_WITH
    from taskagent_platform.evaluation.suite import domain_suites

    problems = []
    if report.model_digest != model.digest:
        judged = "an unknown model" if report.model_digest is None else f"model {report.model_digest[:12]}"
        problems.append(f"The report is of {judged}, not of {model.digest[:12]}: evaluate this model.")
    if report.domain != domain.name:
        problems.append(f"The report is of the domain {report.domain}, not of {domain.name}.")
    suite, robustness = suites = domain_suites(domain, settings.evaluation.case_limit)
    if report.suites != suites.digests:
        problems.append("The report is stale: the domain's suites, or evaluation.case_limit, changed since.")
    else:
        wanted_of = {"suites": suite.cases, "robustness suites": robustness.cases if robustness is not None else ()}
        for (name, cases), held in zip(wanted_of.items(), (report.cases, report.robustness), strict=True):
            if sorted(case.id for case in held) != sorted(case.id for case in cases):
                problems.append(f"The report holds other cases ({len(held)}) than the {name} ({len(cases)}).")
    if manifest.code_version != report_code_version(domain):
        problems.append("The report is stale: the code that evaluates changed since.")
    served = {
        "profile": settings.profile,
        "max_tokens": settings.serving.max_tokens,
        "max_turns": settings.evaluation.max_turns,
        **{name: getattr(settings.serving, name) for name in SERVED_WITH},
    }
    for name, value in served.items():
        measured = report.settings.get(name)
        if measured != value:
            problems.append(f"The report is stale: it was measured with {name} = {measured}, which is {value} now.")
    single = [case for case in suite.cases if case.list_name in ("tool_selection", "argument_extraction")]
    wanted = min(settings.evaluation.latency_requests, len(single))
    if report.latency is not None and report.latency.requests < wanted:
        problems.append(f"The latency was measured on {report.latency.requests} requests instead of {wanted}.")
    return problems
