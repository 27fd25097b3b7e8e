"""What is deployed: the one small file that the gateway follows and a promotion replaces by rename."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.gate import GateResult
from taskagent_platform.settings import Settings

DIGEST_HEADER = "x-model-digest"
"""The response header that names the model which answered."""
API_KEY_VARIABLE = "TASKAGENT_API_KEY"
"""Holds the key that this machine's own clients show the gateway, where it wants one."""


def checked_key(key: str) -> str:
    """Returns a key as it is sent to an endpoint.

    Raises:
        PlatformError: no header can hold it.
    """
    if not all("!" <= character <= "~" for character in key):
        # Not the key itself: messages are kept in logs.
        raise PlatformError(
            f"The API key ({API_KEY_VARIABLE}) holds a blank, a line break, or a character that is no ASCII, which no "
            "key has: set it again."
        )
    return key


class Deployment(BaseModel):
    """One model that was allowed to serve, and why.

    Attributes:
        domain: the domain that it serves.
        model_name: the name that clients ask for.
        model_digest: digest of the merged model's manifest.
        model_folder: the deployment's own copy of the model, which later training does not touch.
        report_digest: digest of the evaluation report that it was judged by; None where an override stood in for it.
        gates: every gate as it was recomputed at the deployment.
        base_url: the model server's address, with ``/v1``.
        server: the model server's record.
        deployed_at: when, in UTC.
        deployed_by: who.
        override_reason: why it was deployed although the gates refused it; None for a regular deployment.
        refusals: what the gates said where they were overridden.
        server_options: how vLLM serves it: its options but for the model's folder and the address.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    domain: str
    model_name: str
    model_digest: str
    model_folder: Path
    report_digest: str | None
    gates: tuple[GateResult, ...]
    base_url: str
    server: Path
    deployed_at: datetime
    deployed_by: str
    override_reason: str | None = None
    refusals: tuple[str, ...] = ()
    server_options: tuple[str, ...] = ()


class DomainDeployments(BaseModel):
    """The champion of a domain and the one before it, which a rollback returns to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    active: Deployment
    previous: Deployment | None = None


class ActiveDeployments(BaseModel):
    """Every domain's deployments, by the domain's name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    domains: dict[str, DomainDeployments] = {}


def active_file(settings: Settings) -> Path:
    """Returns the path of the profile's ``active.json``."""
    return settings.home / settings.profile / "active.json"


def read_active(path: Path) -> ActiveDeployments:
    """Reads what is deployed; nothing is where the file is missing.

    Raises:
        PlatformError: the file is damaged.
    """
    try:
        return ActiveDeployments.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return ActiveDeployments()
    except ValidationError as error:
        raise PlatformError(f"{path} is damaged: {error}. Delete it and deploy again.") from error


def write_active(path: Path, active: ActiveDeployments) -> None:
    """Replaces the file in one step: a reader sees the old deployments or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    with scratch.open("w") as file:
        file.write(active.model_dump_json(indent=1))
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


@contextmanager
def deployment_lock(settings: Settings) -> Iterator[None]:
    """Lets one process at a time change what is deployed."""
    path = active_file(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name("active.lock")):
        yield


def model_name(settings: Settings, domain: str) -> str:
    """Returns the name under which a domain's model is served."""
    return settings.serving.model_name.format(domain=domain)


def endpoint_url(settings: Settings) -> str:
    """Returns the stable address of the gateway, with ``/v1``, as a client on this machine reaches it."""
    return url_at(settings.serving.host, settings.serving.port)


def url_at(host: str, port: int) -> str:
    """Returns the address, with ``/v1``, at which a client on this machine reaches who listens on host and port."""
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
