"""Alerts on runs that failed for another reason than a check, which has an alert of its own."""

import dagster as dg

from taskagent_platform.alerts import Alert, outbox, run_link, what_serves
from taskagent_platform.defs.alert_sensor import status_at_first
from taskagent_platform.errors import PlatformError
from taskagent_platform.run_progress import failure_reason, is_failed_check
from taskagent_platform.settings import Settings, load_settings, settings

NAME = "run_failure"


def run_failure_sensor() -> dg.SensorDefinition:
    """Builds the sensor. It looks at every run of the instance, also at those that the command line executes itself."""

    @dg.run_failure_sensor(
        name=NAME,
        default_status=status_at_first(settings()),
        description="Alerts on runs that failed: which step, why, and what still serves.",
        # Without it, a run that no code location was asked for (`make demo`, sweep, improve) is passed over.
        monitor_all_code_locations=True,
    )
    def failed(context: dg.RunFailureSensorContext) -> dg.SkipReason:
        run, steps = context.dagster_run, context.get_step_failure_events()
        broken = [event for event in steps if not is_failed_check(event)]
        if steps and not broken:
            return dg.SkipReason(f"Run {run.run_id[:8]} was stopped by a check, which is told by itself.")
        present = _present_settings()
        domain = run.tags.get("domain", present.domain)
        reasons = [f"{event.step_key}: {failure_reason(event)}" for event in broken]
        alert = Alert.now(
            f"run/{run.run_id}",
            f"Run {run.run_id[:8]} of {run.job_name} failed",
            "failure",
            [
                ("Why", "\n".join(reasons) or context.failure_event.message or ""),
                ("Serving", _serving(present, domain)),
                ("Run", run_link(present, run.run_id)),
            ],
        )
        try:
            outbox(present).put(alert)
        except (PlatformError, OSError) as error:
            # After an error of its own Dagster looks at the same run again; after another it goes on to the next one.
            raise dg.DagsterInvariantViolationError(f"The alert on run {run.run_id[:8]} waits: {error}") from error
        return dg.SkipReason(f"Alert: {alert.title}.")

    return failed


def _present_settings() -> Settings:
    """Returns the settings as they are now; where they are wrong, as they were when this process started."""
    try:
        return load_settings()
    except PlatformError:
        return settings()


def _serving(present: Settings, domain: str) -> str | None:
    try:
        return what_serves(present, domain)
    except PlatformError:
        return None  # what is damaged there is no reason to say nothing of the run
