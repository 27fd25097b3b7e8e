"""What the checks of one run said, read from its events."""

from typing import NamedTuple

import dagster as dg

_BATCH = 1000
_TYPES = {
    dg.DagsterEventType.ASSET_CHECK_EVALUATION,
    dg.DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED,
    dg.DagsterEventType.ASSET_MATERIALIZATION,
}


class RunChecks(NamedTuple):
    """The checks of one run.

    Attributes:
        evaluated: what they said, in their order; a check that ran twice is in it once, as it ended.
        planned: the checks that the run was to evaluate.
        made: the assets that the run materialized, with their events.
    """

    evaluated: dict[dg.AssetCheckKey, dg.AssetCheckEvaluation]
    planned: set[dg.AssetCheckKey]
    made: dict[dg.AssetKey, dg.AssetMaterialization]


def checks_of_run(instance: dg.DagsterInstance, run_id: str) -> RunChecks:
    """Reads the checks of a run."""
    found = RunChecks({}, set(), {})
    cursor: str | None = None
    while True:
        page = instance.get_records_for_run(run_id, cursor=cursor, of_type=_TYPES, limit=_BATCH)
        for record in page.records:
            _note(found, record.event_log_entry.get_dagster_event())
        if not page.has_more:
            return found
        cursor = page.cursor


def failed_checks(instance: dg.DagsterInstance, run_id: str) -> list[dg.AssetCheckEvaluation]:
    """Returns the checks of a run that failed, warnings too."""
    return [check for check in checks_of_run(instance, run_id).evaluated.values() if not check.passed]


def _note(found: RunChecks, event: dg.DagsterEvent) -> None:
    if event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
        evaluation = event.asset_check_evaluation_data
        found.evaluated[evaluation.asset_check_key] = evaluation
    elif event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED:
        found.planned.add(event.asset_check_planned_data.asset_check_key)
    else:
        made = event.step_materialization_data.materialization
        found.made[made.asset_key] = made
