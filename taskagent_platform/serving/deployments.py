"""Deployments: a model that passes its gates becomes the endpoint's champion, and the last one stays ready.

Nothing is deployed on the word of somebody else: the model's files, its evaluation report, the suites and every gate
are looked at again here. The only way past is an override with a written reason, which is recorded with the
deployment and in the audit log.
"""

import json
import os
import shlex
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import psutil

from taskagent_platform.artifacts import Manifest, digest_of, read_manifest
from taskagent_platform.audit import account, audit_log
from taskagent_platform.domains.base import Domain
from taskagent_platform.errors import PlatformError
from taskagent_platform.serving.active import (
    ActiveDeployments,
    Deployment,
    DomainDeployments,
    active_file,
    deployment_lock,
    endpoint_url,
    model_name,
    read_active,
    url_at,
    write_active,
)
from taskagent_platform.serving.gates import Verdict, champion_report_folder, judge
from taskagent_platform.serving.gateway_process import (
    GatewayProcess,
    check_gateway_port,
    running_gateway,
    start_gateway,
    stop_gateway,
)
from taskagent_platform.serving.server import (
    LOOPBACK,
    Progress,
    Server,
    check_startable,
    detach,
    memory_held_gib,
    options_of,
    read_server,
    server_command,
    server_is_alive,
    server_is_healthy,
    start_server,
    stop_server,
)
from taskagent_platform.settings import Settings, default_gates

MODEL_KIND = "merged_model"
_WARM_UP_TIMEOUT_S = 300.0
# The gates that let more through the lower, and the higher, they are set.
_FLOORS = ("tool_selection", "argument_extraction", "json_validity", "multi_tool")
_CEILINGS = ("latency_p95_ms", "champion_margin")


class DeploymentRefusedError(PlatformError):
    """A model that may not be deployed.

    Attributes:
        verdict: the gates, and why they refuse.
    """

    def __init__(self, domain: str, digest: str, verdict: Verdict) -> None:
        lines = "\n".join(f"- {refusal}" for refusal in verdict.refusals)
        super().__init__(f"Model {digest[:12]} of {domain} is not deployed:\n{lines}")
        self.verdict = verdict


class ServerFiles(NamedTuple):
    """Where a model server's record and output lie."""

    record_file: Path
    log_file: Path


class DomainStatus(NamedTuple):
    """What runs for one domain.

    Attributes:
        deployments: the champion and the one before it; None if nothing was deployed.
        active_is_healthy: whether the champion's server answers.
        previous_is_ready: whether a rollback is instant.
        others: running servers that are not deployed: candidates and base models being measured.
    """

    domain: str
    deployments: DomainDeployments | None
    active_is_healthy: bool
    previous_is_ready: bool
    others: tuple[Server, ...]


class PlatformStatus(NamedTuple):
    """What runs for one profile.

    Attributes:
        endpoint: where the gateway listens; where the settings put it if none runs.
        gateway: its process, if it runs.
        domains: what is deployed.
    """

    endpoint: str
    gateway: GatewayProcess | None
    domains: tuple[DomainStatus, ...]


def server_files(settings: Settings, domain: str, digest: str) -> ServerFiles:
    """Returns where the server of a model, run as the settings say, keeps its record and output.

    A record belongs to one model and one way of serving it for good: a candidate that is promoted keeps its own, and
    the next candidate, or the same model with other serving settings, has another one.
    """
    folder = _servers_folder(settings, domain)
    stem = f"{digest[:16]}-{digest_of(_wanted_options(settings, model_name(settings, domain)))[:8]}"
    return ServerFiles(folder / f"{stem}.json", folder / f"{stem}.log")


def find_server(settings: Settings, domain: str, digest: str, *, any_settings: bool = False) -> Server | None:
    """Returns a healthy server of exactly this model, or None.

    Args:
        settings: the profile.
        domain: the domain.
        digest: the merged model's digest.
        any_settings: take one that was deployed with other serving settings than the present ones, too.
    """
    # One that is deployed comes first: another is being measured, and ends with who measures it.
    for server in sorted(_servers(settings, domain), key=lambda server: not server.detached):
        fits = (any_settings and server.detached) or _runs_as_set(settings, domain, server)
        if server.model_digest == digest and fits and server_is_healthy(server):
            return server
    return None


def deploy(
    settings: Settings,
    domain: Domain,
    merged_folder: Path,
    report_folder: Path,
    *,
    override_reason: str | None = None,
    actor: str | None = None,
    on_progress: Progress | None = None,
) -> Deployment:
    """Makes a model the champion of its domain, if its gates let it.

    The candidate's server that the evaluation measured is promoted as it runs; it is started where it is gone. The
    champion before keeps running for a rollback; older ones are stopped. Deploying the present champion again changes
    nothing but what is recorded of it, and how it is served where the settings changed: the server that runs is
    stopped once the new one has taken its place.

    Args:
        settings: the gates, and how to serve.
        domain: the domain.
        merged_folder: the ``merged_model`` artifact.
        report_folder: the ``eval_report`` artifact of exactly this model.
        override_reason: deploy although the gates refuse, for this written reason.
        actor: who deploys; the account of the process if None.
        on_progress: is told what is happening.

    Raises:
        DeploymentRefusedError: the report is missing, stale or unfinished, or a gate failed; says which, by how much.
        PlatformError: the model's folder was changed, the server or the gateway does not start, the override has no
            reason.
    """
    if override_reason is not None and not override_reason.strip():
        raise PlatformError("An override needs a written reason: who decided it, and why.")
    actor = actor or account()
    log = audit_log(settings)
    with deployment_lock(settings):
        try:
            model = read_manifest(merged_folder, kind=MODEL_KIND, verify=True)
        except PlatformError as error:
            log.append("deploy", "refused", domain=domain.name, actor=actor, reason=str(error))
            raise
        verdict = judge(settings, domain, model, report_folder)
        who = {"domain": domain.name, "model_digest": model.digest, "actor": actor}
        if verdict.refusals and override_reason is None:
            log.append("deploy", "refused", reason=" ".join(verdict.refusals), **who)
            raise DeploymentRefusedError(domain.name, model.digest, verdict)
        if verdict.refusals:
            overridden = f"{override_reason} (overridden: {' '.join(verdict.refusals)})"
            log.append("gate_override", "approved", reason=overridden, **who)
        kept = _keep_model(settings, domain.name, merged_folder, model)
        with _running(settings, domain, model.digest, kept, on_progress) as server:
            deployment = Deployment(
                domain=domain.name,
                model_name=model_name(settings, domain.name),
                model_digest=model.digest,
                model_folder=kept,
                report_digest=verdict.report_digest,
                gates=verdict.gates,
                base_url=server.base_url,
                server=server.record_file,
                deployed_at=datetime.now(UTC),
                deployed_by=actor,
                override_reason=override_reason if verdict.refusals else None,
                refusals=verdict.refusals,
                server_options=_options(server),
            )
            log.check()
            if verdict.report_digest is not None:
                _keep_report(settings, domain.name, report_folder, model.digest)
            _promote(settings, deployment, server)
        reasons = [deployment.override_reason, _lowered_gates(settings)]
        log.append("deploy", "executed", reason="; ".join(filter(None, reasons)) or None, **who)
        return deployment


def rollback(
    settings: Settings,
    domain: Domain,
    *,
    reason: str,
    actor: str | None = None,
    on_progress: Progress | None = None,
) -> Deployment:
    """Makes the champion before the present one the champion again; the present one stays ready in turn.

    It is instant where its server still runs; else the server is started on the deployment's own copy of the model.

    Raises:
        PlatformError: there is nothing to go back to, its copy was changed, or its server does not start.
    """
    if not reason.strip():
        raise PlatformError("A rollback needs a reason, for the audit log.")
    with deployment_lock(settings):
        present = read_active(active_file(settings)).domains.get(domain.name)
        if present is None or present.previous is None:
            raise PlatformError(f"There is no earlier deployment of {domain.name} to go back to.")
        deployment = _serve_again(settings, domain, present.previous, on_progress)
        who = {"domain": domain.name, "model_digest": deployment.model_digest, "actor": actor}
        told = "; ".join(filter(None, (reason, _served_otherwise(present.previous, deployment))))
        audit_log(settings).append("rollback", "executed", reason=told, **who)
        return deployment


def serve(
    settings: Settings, domain: Domain, *, actor: str | None = None, on_progress: Progress | None = None
) -> Deployment:
    """Serves a domain's champion again where its server or the gateway ended; one that answers goes on as it is.

    The gates are not asked again: it is deployed already. The server is started on the deployment's own copy of the
    model; the one before stays what a rollback goes back to.

    Args:
        settings: how to serve.
        domain: the domain.
        actor: who asks for it; the account of the process if None.
        on_progress: is told what is happening.

    Raises:
        PlatformError: nothing is deployed, the copy was changed, or the server or the gateway does not start.
    """
    with deployment_lock(settings):
        present = read_active(active_file(settings)).domains.get(domain.name)
        if present is None:
            raise PlatformError(f"No model of {domain.name} is deployed; `taskagent demo` makes and deploys one.")
        deployment = _serve_again(settings, domain, present.active, on_progress)
        who = {"domain": domain.name, "model_digest": deployment.model_digest, "actor": actor}
        told = _served_otherwise(present.active, deployment)
        audit_log(settings).append("serve", "executed", reason=told, **who)
        return deployment


def make_room(settings: Settings, domain: str) -> None:
    """Stops every detached server of a domain but the champion's, so that a candidate finds memory to be judged in.

    A rollback starts the one before again, from the copy of its model that is kept.
    """
    with deployment_lock(settings):
        for server in _all_but_champion(settings, domain):
            stop_server(server)


def status(settings: Settings) -> PlatformStatus:
    """Returns what is deployed and what of it runs."""
    active = read_active(active_file(settings))
    gateway = running_gateway(settings)
    names = sorted({*active.domains, *(folder.parent.name for folder in _server_folders(settings))})
    return PlatformStatus(
        endpoint_url(settings) if gateway is None else url_at(gateway.host, gateway.port),
        gateway,
        tuple(_domain_status(settings, active, name) for name in names),
    )


def stop_all(settings: Settings) -> list[str]:
    """Stops the gateway and every model server that the profile started, and no other process.

    What is deployed stays on record: :func:`serve` starts its server again.

    Returns:
        What was stopped, and what could not be, one text each.
    """
    told = []
    with deployment_lock(settings):
        try:
            gateway = running_gateway(settings)
            if stop_gateway(settings) and gateway is not None:
                told.append(f"gateway on port {gateway.port} (process {gateway.pid})")
        except PlatformError as error:
            told.append(f"not the gateway: {error}")
        for record_file in sorted((settings.home / settings.profile).glob("*/servers/*.json")):
            try:
                server = read_server(record_file)
                if server is not None and stop_server(server):
                    told.append(f"server of {server.name} {server.model_digest[:12]} (process {server.pid})")
            except PlatformError as error:
                # One damaged record must not keep the other servers running.
                told.append(f"not a server: {error}")
    return told


def copy_model(source: Path, target: Path) -> None:
    """Copies a model's folder; files are shared with the original where the file system can link them."""

    def link_or_copy(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:
            shutil.copy2(old, new)

    shutil.copytree(source, target, copy_function=link_or_copy)


def _lowered_gates(settings: Settings) -> str | None:
    """Returns which settings let more through than the profile does by itself; None if none does."""
    own, present = default_gates(settings.profile), settings.gates
    lowered = [name for name in _FLOORS if getattr(present, name) < getattr(own, name)]
    lowered += [name for name in _CEILINGS if getattr(present, name) > getattr(own, name)]
    told = [f"gates.{name} {getattr(present, name):g} (default {getattr(own, name):g})" for name in lowered]
    if settings.evaluation.case_limit is not None:
        told.append(f"evaluation.case_limit {settings.evaluation.case_limit}")
    return f"gates lowered by settings: {', '.join(told)}" if told else None


def _serve_again(settings: Settings, domain: Domain, target: Deployment, on_progress: Progress | None) -> Deployment:
    """Makes what was deployed once the champion: by its server as it runs, else by one started as the settings say."""
    folder = target.model_folder
    with _running(settings, domain, target.model_digest, folder, on_progress, any_settings=True) as server:
        place = {"base_url": server.base_url, "server": server.record_file}
        served = {"model_name": server.name, "server_options": _options(server), **place}
        deployment = target.model_copy(update=served)
        audit_log(settings).check()
        _promote(settings, deployment, server)
    return deployment


def _served_otherwise(before: Deployment, now: Deployment) -> str | None:
    """Returns how a model is served otherwise than it was judged, for the record; None if it is not known to be."""
    if not before.server_options or before.server_options == now.server_options:
        return None
    return f"served with {shlex.join(now.server_options)}; it was judged with {shlex.join(before.server_options)}"


@contextmanager
def _running(
    settings: Settings,
    domain: Domain,
    digest: str,
    model_folder: Path,
    on_progress: Progress | None,
    *,
    any_settings: bool = False,
) -> Iterator[Server]:
    """Yields a healthy server of the model behind a running gateway; ends what it started if the block fails."""
    gateway_ran = running_gateway(settings) is not None
    check_gateway_port(settings)
    started: Server | None = None
    try:
        server = find_server(settings, domain.name, digest, any_settings=any_settings)
        if server is None:
            server = started = _start(settings, domain, digest, model_folder, on_progress)
            _warm_up(settings, domain, server)
        # Last, because it outlives this process at once; a server that is not detached yet does not.
        start_gateway(settings)
        yield server
    except BaseException:
        if started is not None:
            stop_server(started)
        if not gateway_ran:
            stop_gateway(settings)
        raise


def _start(settings: Settings, domain: Domain, digest: str, model_folder: Path, on_progress: Progress | None) -> Server:
    files = server_files(settings, domain.name, digest)
    # The server of this very record does not answer.
    mute = read_server(files.record_file)
    if mute is not None and not mute.detached and mute.owner_pid != os.getpid() and server_is_alive(mute):
        raise PlatformError(
            f"Process {mute.owner_pid} is starting a server of model {digest[:12]}; wait until it has, and try again."
        )
    surplus = [s for s in _all_but_champion(settings, domain.name) if mute is None or s.record_file != mute.record_file]
    surplus += [mute] if mute is not None else []
    # Before anything is stopped: what cannot start leaves what runs as it is.
    if check_startable(settings, model_folder, freed_gib=sum(map(memory_held_gib, surplus))).digest != digest:
        raise PlatformError(f"{model_folder} does not hold model {digest[:12]}; deploy that model again.")
    for server in surplus:
        stop_server(server)
    return start_server(
        settings,
        model_folder,
        name=model_name(settings, domain.name),
        log_file=files.log_file,
        record_file=files.record_file,
        on_progress=on_progress,
    )


def _all_but_champion(settings: Settings, domain: str) -> list[Server]:
    """Returns the servers that were deployed once and are not the champion's."""
    present = read_active(active_file(settings)).domains.get(domain)
    champion = None if present is None else present.active.server
    return [server for server in _servers(settings, domain) if server.detached and server.record_file != champion]


def _promote(settings: Settings, deployment: Deployment, server: Server) -> None:
    """Replaces the champion in one step, and stops and removes what no rollback needs any more."""
    path = active_file(settings)
    active = read_active(path)
    present = active.domains.get(deployment.domain)
    previous = None
    if present is not None:
        again = present.active.model_digest == deployment.model_digest
        previous = present.previous if again else present.active
    detach(server)
    replaced = DomainDeployments(active=deployment, previous=previous)
    write_active(path, ActiveDeployments(domains={**active.domains, deployment.domain: replaced}))
    kept_ready = [deployment] if previous is None else [deployment, previous]
    for other in _servers(settings, deployment.domain):
        if other.detached and other.record_file not in {ready.server for ready in kept_ready}:
            stop_server(other)
    needed = {ready.model_digest for ready in kept_ready}
    reports = champion_report_folder(settings, deployment.domain, deployment.model_digest).parent
    for kept in (_kept_folder(settings, deployment.domain), reports):
        for folder in kept.iterdir() if kept.is_dir() else ():
            if folder.name not in needed:
                shutil.rmtree(folder, ignore_errors=True)


def _keep_model(settings: Settings, domain: str, merged_folder: Path, model: Manifest) -> Path:
    """Returns the deployment's own copy of the model.

    The next training replaces the original; a restart or a rollback must find what was deployed.
    """
    kept = _kept_folder(settings, domain) / model.digest
    if merged_folder.resolve() == kept:
        return kept
    try:
        read_manifest(kept, kind=MODEL_KIND, verify=True)
        return kept
    except PlatformError:
        shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = kept.with_name(f".{kept.name}.{uuid4().hex[:8]}.partial")
    try:
        copy_model(merged_folder, scratch)
        scratch.rename(kept)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return kept


def _keep_report(settings: Settings, domain: str, report_folder: Path, digest: str) -> None:
    """Keeps the report by which a model was let through: the next candidate is compared with it."""
    kept = champion_report_folder(settings, domain, digest)
    if report_folder.resolve() == kept.resolve():
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = kept.with_name(f".{kept.name}.{uuid4().hex[:8]}.partial")
    try:
        copy_model(report_folder, scratch)
        shutil.rmtree(kept, ignore_errors=True)
        scratch.rename(kept)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _warm_up(settings: Settings, domain: Domain, server: Server) -> None:
    """Sends one request: the first use of a tool set compiles its grammar, which no client should wait for."""
    from taskagent_platform.evaluation.client import request_body

    messages = [*domain.system_messages(datetime.now()), {"role": "user", "content": "Hello!"}]
    body = request_body(server.name, messages, domain.openai_tools(), max_tokens=settings.serving.max_tokens)
    request = urllib.request.Request(
        f"{server.base_url}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    # A proxy of the environment is not asked for this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(request, timeout=_WARM_UP_TIMEOUT_S).close()
    except OSError as error:
        raise PlatformError(
            f"The model server started but does not answer a request ({error}); look at {server.log_file}."
        ) from error


def _runs_as_set(settings: Settings, domain: str, server: Server) -> bool:
    """Tells whether a server was started with the options that the settings ask for now."""
    return _options(server) == _wanted_options(settings, model_name(settings, domain))


def _options(server: Server) -> tuple[str, ...]:
    """Returns how a running server serves; nothing of one that ended."""
    try:
        return options_of(psutil.Process(server.pid).cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ()


def _wanted_options(settings: Settings, name: str) -> tuple[str, ...]:
    return options_of(server_command(settings, Path("model"), name=name, host=LOOPBACK, port=1))


def _domain_status(settings: Settings, active: ActiveDeployments, domain: str) -> DomainStatus:
    deployments = active.domains.get(domain)
    alive = {(s.record_file, s.base_url): s for s in _servers(settings, domain) if server_is_alive(s)}
    deployed = [] if deployments is None else [d for d in (deployments.active, deployments.previous) if d is not None]
    # The address, too: one that is measured may have taken over the record of a deployed server that ended.
    places = [(deployment.server, deployment.base_url) for deployment in deployed]
    healthy = [place in alive and server_is_healthy(alive[place]) for place in places]
    return DomainStatus(
        domain=domain,
        deployments=deployments,
        active_is_healthy=bool(healthy) and healthy[0],
        previous_is_ready=len(healthy) > 1 and healthy[1],
        others=tuple(server for place, server in alive.items() if place not in places),
    )


def _servers(settings: Settings, domain: str) -> Iterator[Server]:
    """Yields the recorded servers of a domain, running or not."""
    for record_file in sorted(_servers_folder(settings, domain).glob("*.json")):
        server = read_server(record_file)
        if server is not None:
            yield server


def _server_folders(settings: Settings) -> list[Path]:
    return sorted((settings.home / settings.profile).glob("*/servers"))


def _servers_folder(settings: Settings, domain: str) -> Path:
    return settings.folder(domain) / "servers"


def _kept_folder(settings: Settings, domain: str) -> Path:
    return settings.folder(domain) / "deployments"
