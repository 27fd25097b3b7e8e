"""Alerts on checks: a blocking one that failed, another one that failed, and a gate that never ran.

Dagster tells none of these to a run-failure sensor: a check that does not block leaves its run a success, and a gate
that was left out leaves no trace at all.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg

from taskagent_platform.alerts import Alert, Severity, asset_link, outbox, run_link, what_serves
from taskagent_platform.defs.alert_sensor import status_at_first
from taskagent_platform.defs.check_evaluations import RunChecks, checks_of_run
from taskagent_platform.defs.eval_report import GATES
from taskagent_platform.evaluation.report import TEXT_FILE
from taskagent_platform.serving.gates import REPORT_KIND
from taskagent_platform.settings import Settings, load_settings, settings

NAME = "checks"
_INTERVAL_S = 30
_BATCH = 50
# A run's record changes once more after its end; what is looked at twice is told once.
_OVERLAP = timedelta(seconds=60)
_ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]


def check_sensor() -> dg.SensorDefinition:
    """Builds the sensor. It looks at every run that ended since its last tick."""

    @dg.sensor(
        name=NAME,
        minimum_interval_seconds=_INTERVAL_S,
        default_status=status_at_first(settings()),
        description="Alerts on failed checks, blocking or not, and on gates that never ran: by how much, which model, "
        "and what still serves.",
    )
    def checks(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        present, now = load_settings(), datetime.now(UTC)
        if context.cursor is None:
            return dg.SensorResult(skip_reason="Looks at runs that end from now on.", cursor=_cursor(now, []))
        known = json.loads(context.cursor)
        since = datetime.fromisoformat(known["since"])
        records = context.instance.get_run_records(
            filters=dg.RunsFilter(statuses=_ENDED, updated_after=since - _OVERLAP),
            order_by="update_timestamp",
            ascending=True,
            limit=_BATCH + len(known["seen"]),
        )
        fresh = [record for record in records if record.dagster_run.run_id not in known["seen"]]
        told = [
            alert.title
            for record in fresh
            for alert in alerts_of_run(present, context.instance, record.dagster_run)
            if outbox(present).put(alert)
        ]
        latest = max((record.update_timestamp.replace(tzinfo=UTC) for record in records), default=since)
        seen = [
            record.dagster_run.run_id
            for record in records
            if record.update_timestamp.replace(tzinfo=UTC) >= latest - 2 * _OVERLAP
        ]
        said = f"{len(fresh)} runs ended. " + " ".join(f"Alert: {title}." for title in told)
        return dg.SensorResult(skip_reason=said.strip(), cursor=_cursor(latest, seen))

    return checks


def alerts_of_run(settings: Settings, instance: dg.DagsterInstance, run: dg.DagsterRun) -> Iterator[Alert]:
    """Yields what somebody should know of the checks of a run that ended: an alert for each asset and kind."""
    checks = checks_of_run(instance, run.run_id)
    failed: dict[tuple[dg.AssetKey, str], list[dg.AssetCheckEvaluation]] = {}
    for check in checks.evaluated.values():
        if not check.passed:
            failed.setdefault((check.asset_key, _kind(check)), []).append(check)
    for (asset, kind), own in failed.items():
        yield _failed(settings, run, checks, asset, kind, own)
    if run.status != dg.DagsterRunStatus.CANCELED:
        for asset, names in _never_ran(checks).items():
            yield _missing(settings, run, checks, asset, names)


def _kind(check: dg.AssetCheckEvaluation) -> str:
    if check.severity == dg.AssetCheckSeverity.WARN:
        return "warning"
    return "blocking" if check.blocking else "not blocking"


def _never_ran(checks: RunChecks) -> dict[dg.AssetKey, list[str]]:
    """Returns the checks without a result of assets that were made: planned ones, and every gate of a report."""
    gates = {dg.AssetCheckKey(asset, name) for asset in checks.made if asset.path[-1] == REPORT_KIND for name in GATES}
    missing: dict[dg.AssetKey, list[str]] = {}
    for key in sorted((checks.planned | gates) - set(checks.evaluated), key=str):
        if key.asset_key in checks.made:
            missing.setdefault(key.asset_key, []).append(key.name)
    return missing


def _failed(
    settings: Settings,
    run: dg.DagsterRun,
    checks: RunChecks,
    asset: dg.AssetKey,
    kind: str,
    failed: list[dg.AssetCheckEvaluation],
) -> Alert:
    names = ", ".join(check.check_name for check in failed)
    title = {
        "blocking": f"{asset.to_user_string()}: blocked by {names}",
        "not blocking": f"{asset.to_user_string()}: {names} failed and blocks nothing",
        "warning": f"{asset.to_user_string()}: {names} warns",
    }[kind]
    what = "\n".join(f"{check.check_name}: {_said(check)}" for check in failed)
    key = f"check/{run.run_id}/{asset.to_user_string()}/{kind}"
    severity: Severity = "warning" if kind == "warning" else "failure"
    return Alert.now(key, title, severity, [("What", what), *_facts(settings, run, checks, asset)])


def _missing(settings: Settings, run: dg.DagsterRun, checks: RunChecks, asset: dg.AssetKey, names: list[str]) -> Alert:
    title = f"{asset.to_user_string()}: {', '.join(names)} never ran"
    what = "The run ended without a result of these checks. A model is deployed only by a report that passes them all."
    key = f"missing/{run.run_id}/{asset.to_user_string()}"
    return Alert.now(key, title, "failure", [("What", what), *_facts(settings, run, checks, asset)])


def _said(check: dg.AssetCheckEvaluation) -> str:
    margin = check.metadata.get("margin")
    by = f" (margin {margin.value})" if margin is not None else ""
    return (check.description or "it failed without a reason") + by


def _facts(
    settings: Settings, run: dg.DagsterRun, checks: RunChecks, asset: dg.AssetKey
) -> Iterator[tuple[str, str | None]]:
    domain = asset.path[0]
    made = checks.made.get(asset)
    metadata = made.metadata if made is not None else {}
    model = metadata.get("model_digest") or metadata.get("digest")
    yield "Model" if "model_digest" in metadata else "Digest", str(model.value) if model is not None else None
    yield "Serving", what_serves(settings, domain)
    yield "Run", run_link(settings, run.run_id)
    yield "Report", asset_link(settings, *asset.path)
    report = settings.folder(domain) / REPORT_KIND / TEXT_FILE
    yield "Report file", str(report) if asset.path[-1] == REPORT_KIND and report.exists() else None


def _cursor(since: datetime, seen: list[str]) -> str:
    return json.dumps({"since": since.isoformat(), "seen": seen})
