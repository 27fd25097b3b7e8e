"""What every asset works with: the settings of its run, the folders of its domain, and a way to tell how it goes."""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
from filelock import FileLock, Timeout
from pydantic import Field

from taskagent_platform.artifacts import Manifest, code_version, digest_of, read_manifest
from taskagent_platform.data.targeted import KIND as TARGETED
from taskagent_platform.data.targeted import targeted_digest
from taskagent_platform.domains.base import Domain
from taskagent_platform.domains.version import domain_version
from taskagent_platform.errors import PlatformError
from taskagent_platform.launchers.routes import PROCESS_TAG
from taskagent_platform.process_identity import process_mark
from taskagent_platform.settings import Settings, load_settings

FINGERPRINT_TAG = "taskagent/fingerprint"
"""A run's tag with the digest of all that decides its outcome."""
_OBSERVE_EVERY_S = 2.0
_WITHOUT_INFLUENCE = {
    "home",
    "ports",
    "domain",
    "more_domains",
    "retrain",
    "monitoring",
    "alerts",
    "mlflow_uri",
    "mlflow_url",
    "bfcl",
}
# What models are judged by, and where the champion is found. A run that chose these for itself would pass its gates by
# its configuration, without the written reason that an override needs.
_OF_EVERY_RUN = ("gates", "evaluation.case_limit", "evaluation.latency_requests", "home", "profile")


@dataclass
class Stage:
    """One asset of a domain while it is being made.

    Attributes:
        context: Dagster's.
        settings: of this run.
        domain: whose asset.
        name: the asset's name, and its folder's.
    """

    context: dg.AssetExecutionContext
    settings: Settings
    domain: Domain
    name: str
    _begin: float = field(default_factory=time.monotonic)
    _observed: float = 0.0

    def folder(self, name: str | None = None) -> Path:
        """Returns the folder of this asset, or of another one of the domain."""
        return self.settings.folder(self.domain.name) / (name or self.name)

    def upstream(self, name: str, *, verify: bool = False) -> Manifest:
        """Returns the manifest of an asset that this one is made from.

        Args:
            name: the asset.
            verify: whether to read its files, too.

        Raises:
            PlatformError: it is not finished, or a file is not what it was when the asset was made.
        """
        return read_manifest(self.folder(name), kind=name, verify=verify)

    def say(self, text: str) -> None:
        """Logs a line of progress."""
        self.context.log.info(text)

    def observe(self, figures: Mapping[str, Any], *, now: bool = False) -> None:
        """Stores figures of the running step where the asset's page shows them, every two seconds at most.

        Args:
            figures: scalars by name; None values are left out.
            now: store them however recent the last ones are.
        """
        if not now and time.monotonic() - self._observed < _OBSERVE_EVERY_S:
            return
        self._observed = time.monotonic()
        known = {name: value for name, value in figures.items() if value is not None}
        self.context.log_event(dg.AssetObservation(asset_key=self.context.asset_key, metadata=known))

    def result(self, manifest: Manifest, *, reused: bool, **metadata: Any) -> "dg.MaterializeResult[None]":
        """Returns the asset's materialization: what a person wants to see first, then duration, path and digest."""
        if reused:
            self.say(f"{self.name} is up to date: inputs, settings and code are unchanged. Reused.")
        return dg.MaterializeResult(
            metadata={
                # The page shows them in this order.
                **{name: value for name, value in metadata.items() if value is not None},
                "reused": reused,
                "seconds": round(time.monotonic() - self._begin, 1),
                "profile": self.settings.profile,
                "path": dg.MetadataValue.path(self.folder()),
                "digest": manifest.digest,
            },
            data_version=dg.DataVersion(manifest.digest),
        )


class Platform(dg.ConfigurableResource[Any]):
    """The platform's settings, and one writer at a time in a domain's folder."""

    overrides: dict[str, Any] = Field(
        default={},
        description="settings of this run, nested by section (`training: {epochs: 2}`); they win over settings.yaml, "
        "TASKAGENT_… variables win over them; what models are judged by cannot be among them",
    )

    def settings(self) -> Settings:
        """Returns the settings of this run.

        Raises:
            PlatformError: a value is wrong, or a run may not choose it for itself.
        """
        for name in _OF_EVERY_RUN:
            section, _, field_name = name.partition(".")
            given = self.overrides.get(section)
            if section in self.overrides and (not field_name or (isinstance(given, Mapping) and field_name in given)):
                raise PlatformError(
                    f"{name} cannot be set for one run (overrides of the resource platform): set it in settings.yaml "
                    "or by variable, where it concerns every run; a model that its gates refuse is deployed only by "
                    "override_reason of vllm_endpoint."
                )
        return load_settings(**self.overrides)

    def finished(self, settings: Settings, domain: Domain, name: str) -> Manifest:
        """Returns the manifest of a domain's artifact, for a check. Raises ``dg.Failure`` if it is not finished."""
        try:
            return read_manifest(settings.folder(domain.name) / name, kind=name)
        except PlatformError as error:
            raise dg.Failure(description=str(error), allow_retries=False) from error

    @contextmanager
    def stage(self, context: dg.AssetExecutionContext, domain: Domain) -> Iterator[Stage]:
        """Yields the stage that makes this asset, once no other run writes to the domain's folder.

        A PlatformError ends the step with its sentence; trying again by itself would not help.
        """
        name = context.asset_key.path[-1]
        try:
            settings = self.settings()
            stage = Stage(context, settings, domain, name)
            _tag_run(context, settings, domain)
            with _only_writer(stage):
                remove_leftovers(stage.folder())
                yield stage
        except PlatformError as error:
            raise dg.Failure(description=str(error), allow_retries=False) from error


def fingerprint(settings: Settings, domain: Domain) -> str:
    """Returns the digest of what decides a run's outcome: code, data (generators, suites, targets) and settings."""
    chosen = settings.model_dump(mode="json", exclude=_WITHOUT_INFLUENCE)
    return digest_of(
        {
            "code": code_version(),
            "domain": domain_version(domain),
            "targeted": targeted_digest(settings.folder(domain.name) / TARGETED, domain),
            "settings": chosen,
        }
    )


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed run left beside an artifact; called while nobody else writes it."""
    for pattern in (f".{folder.name}.*.partial", f".{folder.name}.*.old"):
        for leftover in folder.parent.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _tag_run(context: dg.AssetExecutionContext, settings: Settings, domain: Domain) -> None:
    mark = fingerprint(settings, domain)
    if given := context.run.run_config.get("ops"):
        # What the launchpad gave to this run alone makes another outcome of it.
        mark = digest_of({"settings": mark, "given": given})
    tags = {PROCESS_TAG: process_mark(psutil.Process()), FINGERPRINT_TAG: mark}
    run = context.instance.get_run_by_id(context.run.run_id)
    if run is not None and not tags.items() <= run.tags.items():
        context.instance.add_run_tags(context.run.run_id, tags)


@contextmanager
def _only_writer(stage: Stage) -> Iterator[None]:
    path = stage.folder().with_name(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        stage.say(f"Another run is working on {stage.domain.name}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
