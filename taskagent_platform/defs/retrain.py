"""The job that runs a domain's whole line, and the nightly schedule for it, off until a setting or a person says so."""

from typing import TYPE_CHECKING

import dagster as dg
from dagster._core.storage.tags import ASSET_RESUME_RETRY_TAG, RESUME_RETRY_TAG
from dagster._utils.schedules import is_valid_cron_schedule

from taskagent_platform.defs.check_evaluations import failed_checks
from taskagent_platform.defs.platform import FINGERPRINT_TAG, fingerprint
from taskagent_platform.domains.base import Domain
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import Settings, load_settings, settings

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

_DEFAULT_DOMAIN: str = Settings.model_fields["domain"].default
RETRAIN_TAG = "taskagent/retrain"
"""A run's tag that names the domain it retrains; dagster.yaml lets one such run of each domain go at a time."""
# Whoever makes single assets by hand leaves runs that do not count.
_RECENT = 20


def job_name(domain: str) -> str:
    """Returns the name of a domain's job: ``retrain`` for the default domain, ``<domain>__retrain`` elsewhere."""
    return "retrain" if domain == _DEFAULT_DOMAIN else f"{domain}__retrain"


def retrain_job(domain: Domain) -> "UnresolvedAssetJobDefinition":
    """Builds the job. It holds every check: a blocking check holds only inside the run it is in.

    It holds every asset but those made on demand: what they add is for the next run, or for a person.
    """
    return dg.define_asset_job(
        job_name(domain.name),
        selection=dg.AssetSelection.groups(domain.name),
        description=f"From source data to a served, gated model of {domain.name}, in one run.",
        tags={"domain": domain.name, RETRAIN_TAG: domain.name},
    )


def nightly_retrain(domain: Domain) -> dg.ScheduleDefinition:
    """Builds the schedule. It starts a run only where data, code or settings changed since the last one that ended.

    Raises:
        PlatformError: ``retrain.cron`` is not what cron understands.
    """
    job = job_name(domain.name)
    when = settings().retrain
    if not is_valid_cron_schedule(when.cron):
        raise PlatformError(
            f"retrain.cron is {when.cron!r}; it takes five fields, such as 30 2 * * * for 2:30 at night."
        )

    @dg.schedule(
        cron_schedule=when.cron,
        execution_timezone=when.time_zone,
        job_name=job,
        name=f"{job}_nightly",
        description="Retrains at night if code, data or settings changed since the last run that came to an end.",
        default_status=dg.DefaultScheduleStatus.RUNNING if when.nightly else dg.DefaultScheduleStatus.STOPPED,
    )
    def nightly(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        try:
            wanted = fingerprint(load_settings(), domain)
        except PlatformError as error:
            return dg.SkipReason(f"Not retrained: {error}")
        runs = context.instance.get_runs(
            filters=dg.RunsFilter(job_name=job, tags={FINGERPRINT_TAG: wanted}), limit=_RECENT
        )
        reason = next(filter(None, (_reason_to_skip(context.instance, run) for run in runs)), None)
        return dg.SkipReason(reason) if reason else dg.RunRequest(tags={FINGERPRINT_TAG: wanted})

    return nightly


def _reason_to_skip(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str | None:
    """Returns why an earlier run of the same data, code and settings makes another one needless, or None."""
    if not _is_whole(instance, run):
        return None
    same = f"Code, data and settings are the same as in run {run.run_id[:8]}"
    if run.status == dg.DagsterRunStatus.SUCCESS:
        return f"{same}."
    if not run.is_finished:
        return f"{same}, which has not ended yet ({run.status.value.lower()})."
    if run.status != dg.DagsterRunStatus.FAILURE:
        return None
    # A model that its checks blocked would be blocked again; a crash is a reason to try again.
    blocked = failed_checks(instance, run.run_id)
    stopping = [check.check_name for check in blocked if check.severity == dg.AssetCheckSeverity.ERROR]
    return f"{same}, which its checks stopped ({', '.join(stopping)})." if stopping else None


def _is_whole(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Tells whether a run makes everything that its job holds, by itself or by going on where such a run failed."""
    if RESUME_RETRY_TAG in run.tags or ASSET_RESUME_RETRY_TAG in run.tags:
        failed = instance.get_run_by_id(run.parent_run_id) if run.parent_run_id is not None else None
        return failed is not None and _is_whole(instance, failed)
    if run.asset_selection:
        return False
    # A run that is executed where it was asked for names its steps, also where it takes them all.
    plan = run.execution_plan_snapshot_id
    if run.step_keys_to_execute is None or plan is None:
        return run.step_keys_to_execute is None
    return {step.key for step in instance.get_execution_plan_snapshot(plan).steps} <= set(run.step_keys_to_execute)
