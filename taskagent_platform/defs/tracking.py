"""MLflow: one run for each model, with its settings, its training curve and what its evaluation measured."""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from taskagent_platform.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_TAG = "taskagent.model"
DAGSTER_TAG = "taskagent.dagster_run"
_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
_LOOPBACK = "127.0.0.1"


def store_uri(settings: Settings) -> str:
    """Returns the address of the platform's own store, a SQLite file under the home folder."""
    return f"sqlite:///{store_folder(settings) / 'mlflow.db'}"


def store_folder(settings: Settings) -> Path:
    """Returns the folder of the platform's own store."""
    return settings.home / "mlflow"


def server_environment() -> dict[str, str]:
    """Returns the environment of MLflow's own server: without telemetry, and without workers that nobody asked for."""
    return {**os.environ, **_QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


class TrackedRun:
    """One MLflow run that is being written to."""

    def __init__(self, client: "MlflowClient", experiment_id: str, run_id: str, page: str) -> None:
        self._client = client
        self.run_id = run_id
        self.url = f"{page}/#/experiments/{experiment_id}/runs/{run_id}"

    def log(self, figures: Mapping[str, Any], step: int = 0) -> None:
        """Stores the numbers among ``figures`` at a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), now, step)
            for name, value in figures.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        self._client.log_batch(self.run_id, metrics=metrics)

    def set_parameters(self, values: Mapping[str, Any]) -> None:
        """Stores settings, once."""
        from mlflow.entities import Param

        self._client.log_batch(self.run_id, params=[Param(name, str(value)) for name, value in values.items()])

    def set_tag(self, name: str, value: str) -> None:
        """Stores a tag that the run can be found by."""
        self._client.set_tag(self.run_id, name, value)

    def keep_file(self, path: Path) -> None:
        """Stores a copy of a file."""
        self._client.log_artifact(self.run_id, str(path))


class Tracking(dg.ConfigurableResource[Any]):
    """Where MLflow's runs are kept."""

    tracking_uri: str = Field(
        default="", description="an MLflow server or store; a SQLite file under the platform's home folder if empty"
    )

    @contextmanager
    def new_run(self, settings: Settings, experiment: str, name: str, dagster_run: str) -> Iterator[TrackedRun]:
        """Yields a new run; it ends as finished, failed, or killed when the block is interrupted."""
        client, experiment_id = self._open(settings, experiment)
        made = client.create_run(experiment_id, run_name=name, tags={DAGSTER_TAG: dagster_run})
        run_id = made.info.run_id
        status = "KILLED"
        try:
            yield TrackedRun(client, experiment_id, run_id, self.page(settings))
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            client.set_terminated(run_id, status)

    def run_of_model(self, settings: Settings, experiment: str, digest: str, name: str) -> TrackedRun:
        """Returns the run of a model (an adapter, or the base model), by its digest; a new one if there is none."""
        client, experiment_id = self._open(settings, experiment)
        found = client.search_runs([experiment_id], filter_string=f"tags.`{MODEL_TAG}` = '{digest}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
        else:
            run_id = client.create_run(experiment_id, run_name=name, tags={MODEL_TAG: digest}).info.run_id
            client.set_terminated(run_id)
        return TrackedRun(client, experiment_id, run_id, self.page(settings))

    def page(self, settings: Settings) -> str:
        """Returns the address of MLflow's page."""
        if settings.mlflow_url:
            return settings.mlflow_url.rstrip("/")
        if self.tracking_uri.startswith("http"):
            return self.tracking_uri.rstrip("/")
        return f"http://{_LOOPBACK}:{settings.ports.mlflow}"

    def _open(self, settings: Settings, experiment: str) -> "tuple[MlflowClient, str]":
        # Before the import, which reads them.
        os.environ.update(_QUIET)
        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        folder = store_folder(settings)
        folder.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(self.tracking_uri or store_uri(settings))
        known = client.get_experiment_by_name(experiment)
        if known is not None:
            return client, known.experiment_id
        location = None if self.tracking_uri else (folder / "artifacts").as_uri()
        try:
            return client, client.create_experiment(experiment, artifact_location=location)
        except MlflowException:
            # Another process was faster.
            known = client.get_experiment_by_name(experiment)
            if known is None:
                raise
            return client, known.experiment_id
