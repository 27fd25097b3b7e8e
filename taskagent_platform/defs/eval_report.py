"""The evaluation reports, of the base model and of the fine-tuned one, and the gates that block a deployment."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

import dagster as dg

from taskagent_platform.artifacts import Manifest, code_version, find_artifact, new_artifact, read_manifest
from taskagent_platform.defs.figures import latency_plot, table
from taskagent_platform.defs.keys import AssetOptions, asset_key, domain_asset
from taskagent_platform.defs.platform import Platform, Stage
from taskagent_platform.defs.tracking import TrackedRun, Tracking
from taskagent_platform.domains.base import Domain
from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.comparison import compare
from taskagent_platform.evaluation.gate import CHAMPION_GATE, LATENCY_GATE, GateResult
from taskagent_platform.evaluation.metric import METRIC_TITLES, MetricName
from taskagent_platform.evaluation.page import PAGE_FILE
from taskagent_platform.evaluation.report import (
    REPORT_FILE,
    TEXT_FILE,
    VERDICT_FILE,
    EvalReport,
    Rate,
    load_report,
    metrics_of,
    read_verdict,
    render_report,
    save_report,
    target_text,
    verdict_of,
)
from taskagent_platform.evaluation.run import conditions, evaluate
from taskagent_platform.evaluation.suite import Suite, Suites, domain_suites
from taskagent_platform.launchers.routes import GPU_POOL
from taskagent_platform.serving.active import Deployment, model_name
from taskagent_platform.serving.deployments import find_server, make_room, server_files
from taskagent_platform.serving.gates import (
    REPORT_KIND,
    Verdict,
    champion_of,
    champion_report_folder,
    judge,
    read_champion_report,
    report_code_version,
)
from taskagent_platform.serving.server import Server, read_server, start_server, stop_server, why_ended
from taskagent_platform.settings import GateSettings, Settings
from taskagent_platform.training.base_model import KIND as BASE
from taskagent_platform.training.base_model import published_model
from taskagent_platform.training.fine_tune import KIND as ADAPTER
from taskagent_platform.training.merge import KIND as MERGED

BASE_KIND = "base_eval_report"
GATES: tuple[str, ...] = (
    *(name for name in get_args(MetricName) if name in GateSettings.model_fields),
    LATENCY_GATE,
    CHAMPION_GATE,
)
_FAILURES_SHOWN = 12
_SERVING = ("dtype", "speculation", "enforce_eager", "max_tokens", "max_model_len", "max_num_seqs")


def base_eval_report(domain: Domain) -> dg.AssetsDefinition:
    """Builds the asset: the base model on a sample of the same suites, for comparison."""
    options = AssetOptions(
        name=BASE_KIND,
        deps=(BASE,),
        kinds={"vllm"},
        description="The base model, served and measured as the fine-tuned one is, on the stated sample of the same "
        "suites. Remembered by the digests of model and suites: it does not change.",
        code=("evaluation",),
        pool=GPU_POOL,
    )

    @domain_asset(domain, options)
    def report(
        context: dg.AssetExecutionContext, platform: Platform, tracking: Tracking
    ) -> "dg.MaterializeResult[None]":
        with platform.stage(context, domain) as stage:
            model = stage.upstream(BASE)
            limits = (stage.settings.evaluation.base_sample, stage.settings.evaluation.case_limit)
            suites = domain_suites(domain, min((n for n in limits if n), default=None))
            made_from: dict[str, Any] = {
                "kind": BASE_KIND,
                # What the answers depend on; the generators of training data are not among it.
                "inputs": {
                    BASE: model.digest, **suites.digests, "conditions": conditions(stage.settings, domain, suites),
                },
                "settings": measured_with(stage.settings),
                "code_version": code_version("evaluation", "serving/server.py"),
            }  # fmt: skip
            found = find_artifact(stage.folder(), **made_from)
            if found is None:
                published = published_model(stage.folder(BASE))
                with model_server(stage, published, read_manifest(published)) as server:
                    measured = measure(stage, server, *suites, measure_latency=False)
                with new_artifact(stage.folder(), **made_from) as scratch:
                    save_report(measured, scratch, stage.settings.gates)
            measured = load_report(stage.folder())
            run = tracking.run_of_model(stage.settings, domain.name, model.digest, "base model")
            _track(run, stage, measured, {})
            return stage.result(
                found or read_manifest(stage.folder()),
                reused=found is not None,
                mlflow=dg.MetadataValue.url(run.url),
                cases_of_each_list=suites.gated.case_limit or "all",
                report=_rates_table(measured, stage.settings.gates, None),
            )

    return report


def eval_report(domain: Domain) -> dg.AssetsDefinition:
    """Builds the asset: the merged model, served as it will be, on the whole suites."""
    options = AssetOptions(
        name=REPORT_KIND,
        deps=(MERGED, BASE_KIND),
        kinds={"vllm", "mlflow"},
        description="The merged model, served by vLLM with the parser, template and request body that the agent uses, "
        "measured on the domain's suites, and beside them on its robustness suites, which no gate counts. A candidate "
        "that passes keeps running until it is promoted or the run ends; one that does not is stopped. The checks are "
        "the gates: they block the deployment.",
        code=("evaluation", "serving/server.py"),
        pool=GPU_POOL,
    )

    @domain_asset(domain, options)
    def report(
        context: dg.AssetExecutionContext, platform: Platform, tracking: Tracking
    ) -> "dg.MaterializeResult[None]":
        with platform.stage(context, domain) as stage:
            model = stage.upstream(MERGED)
            suites = domain_suites(domain, stage.settings.evaluation.case_limit)
            made_from: dict[str, Any] = {
                "kind": REPORT_KIND,
                "inputs": {MERGED: model.digest, **suites.digests},
                "settings": measured_with(stage.settings),
                "code_version": report_code_version(domain),
            }
            base = load_report(stage.folder(BASE_KIND))
            found = find_artifact(stage.folder(), **made_from)
            champion = champion_report(stage, model, suites)
            if found is None:
                verdict = _evaluate_candidate(stage, model, suites, made_from, base, champion)
            else:
                _write_anew(stage, made_from, base, champion)
                verdict = judge(stage.settings, domain, model, stage.folder())
            measured = load_report(stage.folder())
            stage.say("\n" + render_report(measured, stage.settings.gates, base=base, champion=champion))
            run = tracking.run_of_model(stage.settings, domain.name, model.inputs[ADAPTER], "fine-tuning")
            _track(run, stage, measured, {"base": base} | ({"champion": champion} if champion is not None else {}))
            return stage.result(
                read_manifest(stage.folder()),
                reused=found is not None,
                verdict="may be deployed" if not verdict.refusals else "\n".join(verdict.refusals),
                model_digest=model.digest,
                mlflow=dg.MetadataValue.url(run.url),
                report=_rates_table(measured, stage.settings.gates, base),
                gates=_gates_table(verdict.gates, measured),
                slices=_slices_table(measured, base, champion),
                robustness_cases=len(measured.robustness),
                minefields=measured.minefields,
                extra_reads=measured.extra_reads,
                against_base=_comparison_table(measured, base),
                against_champion=_comparison_table(measured, champion),
                latency=latency_plot(measured.latency, measured.load),
                failures=_failures_table(measured),
                page=dg.MetadataValue.path(stage.folder() / PAGE_FILE),
                text=dg.MetadataValue.path(stage.folder() / TEXT_FILE),
            )

    return report


def gate_checks(domain: Domain) -> dg.AssetChecksDefinition:
    """Builds the gates: a blocking check each, judged anew from the report of exactly this model."""
    key = asset_key(domain, REPORT_KIND)
    specs = [dg.AssetCheckSpec(name, asset=key, description=_gate_description(name), blocking=True) for name in GATES]

    @dg.multi_asset_check(specs=specs, name=f"{domain.name}__eval_report_checks", can_subset=True)
    def checks(context: dg.AssetCheckExecutionContext, platform: Platform) -> Iterator[dg.AssetCheckResult]:
        settings = platform.settings()
        model = platform.finished(settings, domain, MERGED)
        verdict = judge(settings, domain, model, settings.folder(domain.name) / REPORT_KIND)
        gates = {gate.name: gate for gate in verdict.gates}
        # Refusals that are no gate's own (a stale report, another model's) fail every gate: none was measured.
        own = {gate.reason for gate in verdict.gates}
        faults = [refusal for refusal in verdict.refusals if refusal not in own]
        for selected in sorted(context.selected_asset_check_keys, key=lambda check: GATES.index(check.name)):
            gate = gates.get(selected.name)
            yield dg.AssetCheckResult(
                check_name=selected.name,
                asset_key=key,
                passed=gate is not None and gate.passed and not faults,
                severity=dg.AssetCheckSeverity.ERROR,
                description=" ".join(faults) or (gate.reason or _passes(gate) if gate else "It was not measured."),
                metadata=_gate_metadata(gate) if gate else {},
            )

    return checks


def champion_report(stage: Stage, model: Manifest, suites: Suites) -> EvalReport | None:
    """Returns the report of the model that this one would replace; measures that model again where it is outdated.

    None where there is no such model.
    """
    champion = champion_of(stage.settings, stage.domain, model.digest)
    if champion is None:
        return None
    try:
        return read_champion_report(stage.settings, stage.domain, champion)
    except PlatformError as error:
        stage.say(f"The champion is measured again. {error}")
        return _measure_champion(stage, champion, suites)


def _measure_champion(stage: Stage, champion: Deployment, suites: Suites) -> EvalReport:
    kept = read_manifest(champion.model_folder, kind=MERGED, verify=True)
    # As a candidate is served now: the two are compared.
    with model_server(stage, champion.model_folder, kept) as server:
        measured = measure(stage, server, *suites, measure_latency=False)
    folder = champion_report_folder(stage.settings, stage.domain.name, champion.model_digest)
    with new_artifact(
        folder,
        kind=REPORT_KIND,
        inputs={MERGED: champion.model_digest, **suites.digests},
        settings=measured_with(stage.settings),
        code_version=report_code_version(stage.domain),
    ) as scratch:
        save_report(measured, scratch, stage.settings.gates)
    return measured


def _write_anew(stage: Stage, made_from: dict[str, Any], base: EvalReport, champion: EvalReport | None) -> None:
    """Writes text, page and verdict of a report that is kept anew where the gates or the comparisons changed since."""
    folder, gates = stage.folder(), stage.settings.gates
    report = load_report(folder)
    # The champion that a model was compared with is gone once the model itself is deployed; what is written stays.
    kept, now = read_verdict(folder), verdict_of(report, gates, base=base, champion=champion)
    others = [gate for gate in kept.gates if champion is not None or gate.name != CHAMPION_GATE]
    against = now.against_champion if champion is not None else kept.against_champion
    if (others, kept.against_base, kept.against_champion) != (list(now.gates), now.against_base, against):
        with new_artifact(folder, **made_from) as scratch:
            save_report(report, scratch, gates, base=base, champion=champion)


def _evaluate_candidate(
    stage: Stage,
    model: Manifest,
    suites: Suites,
    made_from: dict[str, Any],
    base: EvalReport,
    champion: EvalReport | None,
) -> Verdict:
    """Serves and measures the candidate; leaves its server running only if it may be deployed."""
    with model_server(stage, stage.folder(MERGED), model, keep=lambda: not verdict.refusals) as server:
        measured = measure(stage, server, *suites, measure_latency=True)
        with new_artifact(stage.folder(), **made_from) as scratch:
            save_report(measured, scratch, stage.settings.gates, base=base, champion=champion)
        verdict = judge(stage.settings, stage.domain, model, stage.folder())
    return verdict


@contextmanager
def model_server(
    stage: Stage,
    folder: Path,
    model: Manifest,
    keep: Callable[[], bool] = lambda: False,
) -> Iterator[Server]:
    """Yields a server of one of the domain's models: the one that runs already, or one started for the block.

    Args:
        stage: the asset that measures.
        folder: the model's.
        model: its manifest.
        keep: asked when the block has succeeded: whether a server that was started here goes on, owned by this
            process, until it is promoted or the process ends.
    """
    settings, domain = stage.settings, stage.domain.name
    running = find_server(settings, domain, model.digest)
    if running is not None:
        stage.say(f"The server of this model runs already at {running.base_url}.")
        yield running
        return
    make_room(settings, domain)
    files = server_files(settings, domain, model.digest)
    server = start_server(
        settings,
        folder,
        name=model_name(settings, domain),
        log_file=files.log_file,
        record_file=files.record_file,
        on_progress=stage.say,
    )
    stage.say(f"The model server answers at {server.base_url} after {server.cold_start_s:.0f} s.")
    kept = False
    try:
        yield server
        kept = keep()
    except PlatformError as error:
        ended = why_ended(server)
        if ended is None:
            raise
        raise PlatformError(f"The model server ended while it was asked: {ended}") from error
    finally:
        # Served meanwhile (`taskagent serve`), it is the endpoint's.
        recorded = None
        with suppress(PlatformError):
            recorded = read_server(server.record_file)
        if not kept and (recorded is None or not recorded.detached):
            stop_server(server)


def measure(
    stage: Stage, server: Server, suite: Suite, robustness: Suite | None = None, *, measure_latency: bool
) -> EvalReport:
    """Measures a served model on suites; the asset's page shows how far it is."""
    begin = time.monotonic()

    def on_progress(what: str, done: int, total: int) -> None:
        left = (time.monotonic() - begin) / done * (total - done) if done and what == "cases" else None
        figures = {"what": what, "cases_done": done, "cases": total, "eta_s": left}
        stage.observe(figures, now=done == total)

    return evaluate(
        stage.settings,
        stage.domain,
        base_url=server.base_url,
        model_name=server.name,
        model_digest=server.model_digest,
        suite=suite,
        robustness=robustness,
        measure_latency=measure_latency,
        on_progress=on_progress,
    )


def measured_with(settings: Settings) -> dict[str, Any]:
    """Returns the settings that a report depends on; the gates are not among them, they are applied to it."""
    serving = {name: getattr(settings.serving, name) for name in _SERVING}
    return {"profile": settings.profile, **settings.evaluation.model_dump(mode="json"), **serving}


def _track(run: TrackedRun, stage: Stage, report: EvalReport, others: Mapping[str, EvalReport]) -> None:
    figures: dict[str, float] = {"eval.minefields": report.minefields, "eval.extra_reads": report.extra_reads}
    for name, metric in report.metrics.items():
        if metric.rate is not None:
            figures |= {f"eval.{name}": metric.rate, f"eval.{name}.n": metric.total}
    if report.latency is not None:
        latency = report.latency
        figures |= {"eval.p50_ms": latency.p50_ms, "eval.p95_ms": latency.p95_ms, "eval.p99_ms": latency.p99_ms}
    for slice_name, rate in report.slices.items():
        if rate.rate is not None:
            figures |= {f"eval.slice.{slice_name}": rate.rate, f"eval.slice.{slice_name}.n": rate.total}
    for point in report.load.points if report.load is not None else ():
        figures |= {
            f"eval.load.{point.concurrency}.requests_per_s": point.requests_per_s,
            f"eval.load.{point.concurrency}.p95_ms": point.p95_ms,
        }
    if report.reliability is not None:
        for metric_name, values in report.reliability.pass_hat_k.items():
            figures |= {f"eval.pass_hat_{k}.{metric_name}": value for k, value in enumerate(values, 1)}
    for title, other in others.items():
        for pair in compare(report, other):
            figures |= {f"eval.against_{title}.{pair.name}": pair.difference}
            figures |= {f"eval.against_{title}.{pair.name}.p": pair.p_value}
    run.log(figures)
    for file in (REPORT_FILE, VERDICT_FILE, TEXT_FILE, PAGE_FILE):
        run.keep_file(stage.folder() / file)


def _rates_table(report: EvalReport, gates: GateSettings, base: EvalReport | None) -> dg.MarkdownMetadataValue:
    header = ["metric", "correct/n", "rate", "95 % interval", "target", "result"]
    rows = []
    for name, metric in metrics_of(report.cases, gates).items():
        target = "-" if metric.target is None else target_text(metric.target)
        result = "-" if metric.passed is None else "PASS" if metric.passed else "FAIL"
        row = [METRIC_TITLES[name], f"{metric.correct}/{metric.total}", _percent(metric.rate), _interval(metric)]
        rows.append([*row, target, result, *([_rate_of(base.metrics[name])] if base else [])])
    return table([*header, "base model"] if base else header, rows)


def _rate_of(rate: Rate | None) -> str:
    return "-" if rate is None else f"{_percent(rate.rate)} of {rate.total}"


def _gates_table(gates: tuple[GateResult, ...], report: EvalReport) -> dg.MarkdownMetadataValue:
    rows = []
    for gate in gates:
        is_latency = gate.name == LATENCY_GATE
        note = f"the specification's target is {report.latency_target_ms:.0f} ms" if is_latency else ""
        result = "PASS" if gate.passed else "FAIL"
        rows.append([gate.name, _measured(gate), _target(gate), gate.n, result, gate.reason or gate.note or note])
    return table(["gate", "measured", "target", "n", "result", "note"], rows)


def _slices_table(report: EvalReport, base: EvalReport, champion: EvalReport | None) -> dg.MarkdownMetadataValue | None:
    if len(report.slices) < 2:
        return None
    others = {"base model": base} | ({"champion": champion} if champion is not None else {})
    rows = [
        (
            name, f"{rate.correct}/{rate.total}", _percent(rate.rate), _interval(rate),
            *(_rate_of(other.slices.get(name)) for other in others.values()),
        )
        for name, rate in report.slices.items()
    ]  # fmt: skip
    return table(["slice", "correct/n", "rate", "95 % interval", *others], rows)


def _comparison_table(report: EvalReport, other: EvalReport | None) -> dg.MarkdownMetadataValue | None:
    if other is None:
        return None
    rows = [
        (
            pair.title, pair.n, f"{pair.rate:.1%}", f"{pair.other_rate:.1%}", f"{pair.difference * 100:+.1f} points",
            f"{pair.low * 100:+.1f} to {pair.high * 100:+.1f}", pair.only_this, pair.only_other, f"{pair.p_value:.2g}",
        )
        for pair in compare(report, other)
    ]  # fmt: skip
    header = ["metric", "same cases", "this", "other", "difference", "95 % interval", "won", "lost", "McNemar p"]
    return table(header, rows)


def _failures_table(report: EvalReport) -> dg.MarkdownMetadataValue:
    rows = []
    step = max(1, len(report.failures) // _FAILURES_SHOWN)
    for case in report.failures[::step][:_FAILURES_SHOWN]:
        sentences = " ".join(fault.sentence for fault in case.faults[:2])
        rows.append([case.id, case.input, list(case.expected) or "no call", list(case.got) or case.text, sentences])
    return table(["case", "input", "expected", "got", "what is wrong"], rows)


def _gate_description(name: str) -> str:
    if name == LATENCY_GATE:
        return "p95 latency of single requests stays under the budget of the profile's hardware."
    if name == CHAMPION_GATE:
        return "On the same cases the model is not worse than the one that it would replace, but for the margin."
    return f"{METRIC_TITLES[name]} exceeds its target."  # type: ignore[index]


def _gate_metadata(gate: GateResult) -> dict[str, Any]:
    metadata: dict[str, Any] = {"measured": _measured(gate), "target": _target(gate), "n": gate.n}
    if gate.value is not None:
        metadata["margin"] = _margin(gate)
        metadata["value"] = round(gate.value, 4)
    if gate.interval is not None:
        low, high = gate.interval
        metadata["interval_95"] = f"{low:.1%} to {high:.1%}"
    return metadata


def _passes(gate: GateResult) -> str:
    return gate.note or f"{_measured(gate)} of {gate.n}, {_target(gate)} is wanted."


def _measured(gate: GateResult) -> str:
    if gate.value is None:
        return "not measured"
    if gate.name == CHAMPION_GATE:
        return f"{gate.value * 100:+.1f} points"
    return f"{gate.value:.0f} ms" if gate.name == LATENCY_GATE else f"{gate.value:.1%}"


def _target(gate: GateResult) -> str:
    if gate.name == CHAMPION_GATE:
        return f">= {gate.target * 100:+.1f} points"
    return f"< {gate.target:.0f} ms" if gate.name == LATENCY_GATE else f"> {gate.target:.1%}"


def _margin(gate: GateResult) -> str:
    assert gate.value is not None
    if gate.name == LATENCY_GATE:
        return f"{gate.target - gate.value:+.0f} ms"
    return f"{(gate.value - gate.target) * 100:+.1f} points"


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1%}"


def _interval(metric: Any) -> str:
    return "-" if metric.low is None else f"{metric.low:.1%} to {metric.high:.1%}"
