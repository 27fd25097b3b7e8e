"""The job that runs a domain's whole line, and the nightly schedule for it, off until somebody switches it on."""

from typing import TYPE_CHECKING

import dagster as dg

from taskagent_platform.data.targeted import KIND as TARGETED
from taskagent_platform.defs.platform import FINGERPRINT_TAG, fingerprint
from taskagent_platform.domains.base import Domain
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import Settings, load_settings

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

_DEFAULT_DOMAIN: str = Settings.model_fields["domain"].default
ON_DEMAND = ("failure_diagnosis", TARGETED)
"""The assets that the main job leaves out: what they make is for the next run."""
RETRAIN_TAG = "taskagent/retrain"
"""A run's tag that names the domain it retrains; dagster.yaml lets one such run of each domain go at a time."""
_NIGHTLY = "30 2 * * *"


def job_name(domain: str) -> str:
    """Returns the name of a domain's job: ``retrain`` for the default domain, ``<domain>__retrain`` elsewhere."""
    return "retrain" if domain == _DEFAULT_DOMAIN else f"{domain}__retrain"


def retrain_job(domain: Domain) -> "UnresolvedAssetJobDefinition":
    """Builds the job. It holds every check: a blocking check holds only inside the run it is in.

    It holds every asset but those that look into an evaluation on demand: what they add is for the next run.
    """
    on_demand = [dg.AssetKey([domain.name, name]) for name in ON_DEMAND]
    return dg.define_asset_job(
        job_name(domain.name),
        selection=dg.AssetSelection.groups(domain.name) - dg.AssetSelection.assets(*on_demand),
        description=f"From source data to a served, gated model of {domain.name}, in one run.",
        tags={"domain": domain.name, RETRAIN_TAG: domain.name},
    )


def nightly_retrain(domain: Domain) -> dg.ScheduleDefinition:
    """Builds the schedule. It starts a run only where code or settings changed since the last one that succeeded."""
    job = job_name(domain.name)

    @dg.schedule(
        cron_schedule=_NIGHTLY,
        job_name=job,
        name=f"{job}_nightly",
        description="Retrains at night if code, data or settings changed since the last successful run.",
        default_status=dg.DefaultScheduleStatus.STOPPED,
    )
    def nightly(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        try:
            wanted = fingerprint(load_settings())
        except PlatformError as error:
            return dg.SkipReason(f"Not retrained: {error}")
        done = context.instance.get_runs(
            filters=dg.RunsFilter(job_name=job, statuses=[dg.DagsterRunStatus.SUCCESS], tags={FINGERPRINT_TAG: wanted}),
            limit=1,
        )
        if done:
            return dg.SkipReason(f"Code, data and settings are the same as in run {done[0].run_id[:8]}.")
        return dg.RunRequest(tags={FINGERPRINT_TAG: wanted})

    return nightly
