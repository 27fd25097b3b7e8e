"""Sessions with the agent: one request of a user, or the smoke test of a fresh deployment."""

import asyncio
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from taskagent_platform.agent.approvals import (
    SMOKE_ACTOR,
    Approver,
    Call,
    LimitedApprover,
    approve_all,
    ask_on_terminal,
    describe,
    printable,
)
from taskagent_platform.agent.execution import ExecutedCall, ToolExecutor
from taskagent_platform.agent.state import stored_backend
from taskagent_platform.audit import audit_log
from taskagent_platform.domains.base import Backend, Domain
from taskagent_platform.errors import PlatformError
from taskagent_platform.serving.active import API_KEY_VARIABLE, checked_key, endpoint_url, model_name
from taskagent_platform.settings import Settings

if TYPE_CHECKING:  # the SDK takes a second to import; listing assets or printing help must not wait for it
    from taskagent_platform.agent.agent import Answer

SMOKE_NOW = datetime(2024, 1, 15, 9)
"""The moment of the smoke test: the one around which the fixtures lie."""


def ask(
    settings: Settings,
    domain: Domain,
    text: str,
    *,
    yes: bool = False,
    now: datetime | None = None,
    base_url: str | None = None,
    approver: Approver | None = None,
    actor: str | None = None,
    echo: Callable[[str], None] = print,
) -> "Answer":
    """Answers one request of a user on the domain's stored state, and shows calls, results and the answer.

    Args:
        settings: the settings.
        domain: the domain.
        text: the request.
        yes: approve destructive calls without asking.
        now: the moment at which it is asked; the local time if None.
        base_url: another endpoint than the gateway's.
        approver: who approves destructive calls; a person at the terminal if None.
        actor: who is named in the audit log; the account of the process if None.
        echo: prints a line; the conversation goes on where the reader is gone.

    Raises:
        PlatformError: nothing answers, the state is damaged, or the audit log was changed.
    """
    if not text.strip():
        raise PlatformError("There is nothing to ask: give the request as one argument, in quotes.")
    try:
        text.encode()
    except UnicodeError as error:
        raise PlatformError(f"The request is not UTF-8 text ({error}): check the terminal's encoding.") from error
    moment = (now or datetime.now()).replace(second=0, microsecond=0)
    if yes:
        approver = approve_all("--yes")
    backend = stored_backend(settings, domain, moment)

    def show(call: ExecutedCall) -> None:
        _tell(echo, f"→ {describe(Call(call.tool, call.arguments))}")
        _tell(echo, f"  {_outcome(call)}")

    answer = _converse(settings, domain, backend, text, moment, approver or ask_on_terminal, base_url, actor, show)
    _tell(echo, printable(answer.text, keep="\n"))
    return answer


@dataclass(frozen=True)
class SmokeResult:
    """One request of the smoke test.

    Attributes:
        request: what was asked.
        expected: the tool that has to be called, alone.
        called: the tools that were called and executed, in order.
        answer: the model's last message.
    """

    request: str
    expected: str
    called: tuple[str, ...]
    answer: str

    @property
    def passed(self) -> bool:
        """Whether exactly the expected tool was called and executed."""
        return self.called == (self.expected,)


@dataclass(frozen=True)
class SmokeReport:
    """What the smoke test found."""

    results: tuple[SmokeResult, ...]
    model_digest: str | None

    @property
    def passed(self) -> bool:
        """Whether every request passed."""
        return all(result.passed for result in self.results)


def agent_smoke(settings: Settings, domain: Domain, *, base_url: str | None = None) -> SmokeReport:
    """Asks the domain's own requests through the SDK, each on a fresh fixture, and reports the tools called.

    Destructive calls are approved: the fixture is in memory and nobody else's.

    Raises:
        PlatformError: nothing answers.
    """
    results, digest = [], None
    for request, expected in domain.agent_requests:
        backend = domain.backend(SMOKE_NOW)
        answer = _converse(
            settings,
            domain,
            backend,
            request,
            SMOKE_NOW,
            approve_all("smoke test on a fixture"),
            base_url,
            SMOKE_ACTOR,
        )
        digest = answer.model_digest
        called = tuple(
            call.tool if call.outcome == "executed" else f"{call.tool} ({call.outcome})" for call in answer.calls
        )
        results.append(SmokeResult(request, expected, called, answer.text))
    return SmokeReport(tuple(results), digest)


def _converse(
    settings: Settings,
    domain: Domain,
    backend: Backend,
    text: str,
    now: datetime,
    approver: Approver,
    base_url: str | None,
    actor: str | None,
    on_call: Callable[[ExecutedCall], None] | None = None,
) -> "Answer":
    from taskagent_platform.agent.agent import run_agent
    from taskagent_platform.evaluation.client import Endpoint

    log = audit_log(settings)
    limited = LimitedApprover(approver, log, settings.serving.destructive_per_minute)
    endpoint = Endpoint(
        base_url=base_url or endpoint_url(settings),
        model=model_name(settings, domain.name),
        max_tokens=settings.serving.max_tokens,
        api_key=checked_key(os.environ.get(API_KEY_VARIABLE) or "none"),
    )
    executor = ToolExecutor(domain, backend, log, limited, actor, on_call)
    return asyncio.run(run_agent(domain, executor, endpoint, text, now=now, max_turns=settings.evaluation.max_turns))


def _tell(echo: Callable[[str], None], line: str) -> None:
    """Prints a line where that is possible: calls happen and are recorded whether or not somebody reads along."""
    with suppress(BrokenPipeError):
        try:
            echo(line)
        except UnicodeError:
            # What the terminal's encoding lacks stands there as an escape, as control characters do.
            echo(line.encode("ascii", "backslashreplace").decode())


def _outcome(call: ExecutedCall) -> str:
    if call.outcome == "refused":
        return f"refused: {printable(call.reason or '')}"
    return printable(json.dumps(call.result, ensure_ascii=False))
