"""Watching the endpoint: does it answer, does it still call the right tools, and is it asked what it was taught.

Two kinds of evidence. Canary requests, whose right tool is known, go through the gateway as any client's do. The audit
log says what agents called in the last hours: how many calls no tool would take, and how far the mix of tools is from
the mix of the training data.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

import httpx

from taskagent_platform.artifacts import read_manifest
from taskagent_platform.audit import AuditEntry, audit_log
from taskagent_platform.data.training_dataset import KIND as DATASET
from taskagent_platform.domains.base import Domain
from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.answer import Attempt, is_valid, read_answer
from taskagent_platform.evaluation.client import request_body, tool_schemas
from taskagent_platform.evaluation.statistics import wilson_interval
from taskagent_platform.serving.active import (
    API_KEY_VARIABLE,
    Deployment,
    active_file,
    checked_key,
    endpoint_url,
    read_active,
)
from taskagent_platform.settings import Settings

ProblemKind = Literal["down", "canary", "malformed", "drift"]
PROBLEM_KINDS: tuple[ProblemKind, ...] = ("down", "canary", "malformed", "drift")
_HEALTH_TIMEOUT_S = 10.0
_NOW = datetime(2024, 1, 15, 9)


class Canary(NamedTuple):
    """One request whose right tool is known.

    Attributes:
        request: what was asked.
        expected: the tool that has to be called, alone.
        called: the tools that were called.
        fault: what is wrong with the answer; empty if nothing is.
    """

    request: str
    expected: str
    called: tuple[str, ...]
    fault: str


class Use(NamedTuple):
    """What agents called in the window.

    Attributes:
        calls: how many.
        malformed: how many of them no tool takes.
        mix: calls by tool.
        drift: total variation distance of the mix from the training mix, 0 to 1; None for too few calls, or where the
            training mix is not known.
    """

    calls: int
    malformed: int
    mix: Mapping[str, int]
    drift: float | None


class Problem(NamedTuple):
    """Something about the endpoint that somebody should know."""

    kind: ProblemKind
    sentence: str


class Look(NamedTuple):
    """What one look at a domain's endpoint found."""

    deployment: Deployment
    healthy: bool
    canaries: tuple[Canary, ...]
    use: Use
    problems: tuple[Problem, ...]


def look(settings: Settings, domain: Domain) -> Look | None:
    """Looks at a domain's endpoint; None where nothing of the domain is deployed.

    Raises:
        PlatformError: what is deployed, or the audit log, is damaged.
    """
    deployments = read_active(active_file(settings)).domains.get(domain.name)
    if deployments is None:
        return None
    deployment = deployments.active
    used = _use(settings, domain)
    # The gateway is on this machine, or beside it; a proxy of the environment is not asked for it.
    with httpx.Client(trust_env=False, timeout=settings.monitoring.canary_timeout_s, headers=_key()) as client:
        fault = _health_fault(settings, client, domain)
        canaries = () if fault else _ask_canaries(settings, domain, deployment, client)
    problems = tuple(_problems(settings, fault, canaries, used))
    return Look(deployment, not fault, canaries, used, problems)


def _key() -> dict[str, str]:
    key = os.environ.get(API_KEY_VARIABLE)
    return {"authorization": f"Bearer {checked_key(key)}"} if key else {}


def _health_fault(settings: Settings, client: httpx.Client, domain: Domain) -> str:
    url = endpoint_url(settings).removesuffix("/v1") + "/health"
    remedy = f"`taskagent status` says what runs, `taskagent serve --domain {domain.name}` starts it again."
    try:
        states = client.get(url, timeout=_HEALTH_TIMEOUT_S).json()["deployments"]
    except httpx.HTTPError as error:
        return f"The gateway does not answer at {url} ({type(error).__name__}); {remedy}"
    except (ValueError, KeyError, TypeError):
        return f"Something else than the gateway answers at {url}."
    if not states.get(domain.name, {}).get("healthy"):
        return f"The gateway answers, the model server of {domain.name} does not; {remedy}"
    return ""


def _ask_canaries(
    settings: Settings, domain: Domain, deployment: Deployment, client: httpx.Client
) -> tuple[Canary, ...]:
    def ask(canary: tuple[str, str]) -> Canary:
        return _ask(settings, domain, deployment, client, *canary)

    # At once: Dagster gives a sensor a minute.
    with ThreadPoolExecutor(max_workers=max(1, len(domain.agent_requests))) as pool:
        return tuple(pool.map(ask, domain.agent_requests))


def _ask(
    settings: Settings, domain: Domain, deployment: Deployment, client: httpx.Client, request: str, expected: str
) -> Canary:
    messages = [*domain.system_messages(_NOW), {"role": "user", "content": request}]
    max_tokens = settings.serving.max_tokens
    body = request_body(deployment.model_name, messages, domain.openai_tools(), max_tokens=max_tokens)
    try:
        answer = client.post(f"{endpoint_url(settings)}/chat/completions", json=body)
        answer.raise_for_status()
        message = answer.json()["choices"][0]["message"]
    except httpx.HTTPStatusError as error:
        return Canary(request, expected, (), f"was answered with status {error.response.status_code}")
    except httpx.HTTPError as error:
        return Canary(request, expected, (), f"was not answered ({type(error).__name__})")
    except (ValueError, KeyError, IndexError, TypeError):
        return Canary(request, expected, (), "was not answered in OpenAI's format")
    read = read_answer(message, [tool.name for tool in domain.tools])
    called = tuple(call.name for call in read.calls)
    if read.is_malformed or not all(is_valid(call, tool_schemas(domain)) for call in read.calls):
        fault = "was answered with a call that no tool takes"
    elif called != (expected,):
        fault = f"called {', '.join(called) or 'no tool'} instead of {expected}"
    else:
        fault = ""
    return Canary(request, expected, called, fault)


def _use(settings: Settings, domain: Domain) -> Use:
    schemas = tool_schemas(domain)
    window = timedelta(hours=settings.monitoring.window_h)
    # An approved call is followed by its execution, as a line of its own.
    calls = [
        entry
        for entry in audit_log(settings).recent(window)
        if entry.action == "tool_call" and entry.domain == domain.name and entry.outcome != "approved"
    ]
    malformed = sum(not is_valid(_attempt(entry), schemas) for entry in calls)
    mix = Counter(entry.tool for entry in calls if entry.tool in schemas)
    known: dict[str, int] = {str(tool): count for tool, count in mix.items()}
    enough = sum(known.values()) >= settings.monitoring.min_calls
    taught = _training_mix(settings, domain) if enough else None
    return Use(len(calls), malformed, known, None if taught is None else _distance(known, taught))


def _attempt(entry: AuditEntry) -> Attempt:
    arguments = entry.arguments if isinstance(entry.arguments, dict) else None
    return Attempt(entry.tool or "", "", {} if entry.arguments is None else arguments)


def _training_mix(settings: Settings, domain: Domain) -> dict[str, int] | None:
    try:
        manifest = read_manifest(settings.folder(domain.name) / DATASET, kind=DATASET)
    except PlatformError:
        return None
    usage: dict[str, int] = manifest.details["distribution"]["tool_usage"]
    return usage if sum(usage.values()) else None


def _distance(first: Mapping[str, int], second: Mapping[str, int]) -> float:
    """Returns the total variation distance of two mixes: the share that would have to change to make them equal."""
    totals = sum(first.values()), sum(second.values())
    tools = {*first, *second}
    return sum(abs(first.get(tool, 0) / totals[0] - second.get(tool, 0) / totals[1]) for tool in tools) / 2


def _problems(settings: Settings, fault: str, canaries: tuple[Canary, ...], used: Use) -> Iterator[Problem]:
    monitoring = settings.monitoring
    if fault:
        yield Problem("down", fault)
    wrong = [canary for canary in canaries if canary.fault]
    if wrong:
        told = "; ".join(f"{canary.request!r} {canary.fault}" for canary in wrong)
        yield Problem("canary", f"{len(wrong)} of {len(canaries)} canary requests went wrong: {told}.")
    # The whole interval has to be above: one bad call among few is no trend.
    if used.calls >= monitoring.min_calls:
        low, _ = wilson_interval(used.malformed, used.calls)
        if low > monitoring.max_malformed:
            yield Problem(
                "malformed",
                f"{used.malformed} of {used.calls} calls of the last {monitoring.window_h:g} h "
                f"({used.malformed / used.calls:.1%}) are malformed; {monitoring.max_malformed:.1%} is allowed.",
            )
    if used.drift is not None and used.drift > monitoring.max_drift:
        yield Problem(
            "drift",
            f"The tools called in the last {monitoring.window_h:g} h are {used.drift:.0%} away from the training mix; "
            f"{monitoring.max_drift:.0%} is allowed. Teach what is asked now, or find out who asks otherwise.",
        )


def observed(found: Look) -> dict[str, Any]:
    """Returns the figures of a look, for the endpoint's page."""
    return {
        "healthy": found.healthy,
        "model_digest": found.deployment.model_digest,
        "canaries_right": sum(not canary.fault for canary in found.canaries),
        "canaries": len(found.canaries),
        "calls": found.use.calls,
        "malformed": found.use.malformed,
        "drift": found.use.drift,
        "problems": "\n".join(problem.sentence for problem in found.problems) or "none",
    }
