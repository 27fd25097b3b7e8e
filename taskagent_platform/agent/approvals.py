"""Approvals of destructive calls: a person sees the exact call and says yes, or it does not happen."""

import json
import signal
import sys
import termios
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

from taskagent_platform.audit import AuditLog

SMOKE_ACTOR = "agent_smoke"
"""Whom the audit log names for the calls of the smoke test, which run on a fixture in memory."""
INTERRUPTED = "interrupted"
"""Why a call did not run where the person who was asked pressed Ctrl-C."""
_WINDOW = timedelta(minutes=1)


class Call(NamedTuple):
    """One tool call as the model wrote it: ``arguments`` is an object, or the text where that is none."""

    tool: str
    arguments: Mapping[str, Any] | str


class Decision(NamedTuple):
    """Whether a call may run, and why or why not."""

    approved: bool
    reason: str


Approver = Callable[[Call], Decision]


def printable(text: str, keep: str = "") -> str:
    """Returns text that changes nothing but its own place on a terminal.

    Control and format characters (escape sequences, line breaks, bidirectional overrides, zero-width characters)
    become visible escapes; letters of every script stay.

    Args:
        text: what a model, a tool or a person wrote.
        keep: control characters to leave as they are, for example line breaks.
    """
    return "".join(
        character
        if character in keep or (unicodedata.category(character)[0] != "C" and character not in "\u2028\u2029")
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def describe(call: Call) -> str:
    """Returns a call in one line, complete and exact: ``delete_task(task_id="task_001")``."""
    if isinstance(call.arguments, str):
        return f"{printable(call.tool)}({printable(call.arguments)})"
    arguments = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())
    return f"{printable(call.tool)}({printable(arguments)})"


def ask_on_terminal(call: Call) -> Decision:
    """Shows the call and asks whether it may run; only ``y`` or ``yes`` approves. Without a terminal, refuses.

    Raises:
        KeyboardInterrupt: the person pressed Ctrl-C instead of an answer.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return Decision(False, "there is no terminal to ask on, and --yes was not given")
    # What was typed before the question was no answer to it.
    termios.tcflush(sys.stdin, termios.TCIFLUSH)
    print(f"The agent wants to run:\n  {describe(call)}\nRun it? [y/N] ", end="", file=sys.stderr, flush=True)
    with _interruptible():
        answer = sys.stdin.readline().strip().lower()
    if answer in ("y", "yes"):
        return Decision(True, "approved on the terminal")
    return Decision(False, "not approved on the terminal")


@contextmanager
def _interruptible() -> Iterator[None]:
    # asyncio keeps the first Ctrl-C until the coroutine waits again, which it does only after the answer.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def approve_all(reason: str) -> Approver:
    """Returns an approver that says yes to everything, for the stated reason."""
    return lambda call: Decision(True, reason)


class LimitedApprover:
    """Asks an approver, but approves no more destructive calls in a minute than the limit.

    The audit log is what is counted, so the limit holds across processes. The smoke test, whose calls change nothing
    that lasts, and everybody else are counted apart.

    Args:
        approver: who decides below the limit.
        log: the audit log; every decision is appended to it.
        per_minute: the limit.
    """

    def __init__(self, approver: Approver, log: AuditLog, per_minute: int) -> None:
        self._approver = approver
        self._log = log
        self._per_minute = per_minute

    def __call__(self, call: Call, *, domain: str, model_digest: str | None, actor: str | None = None) -> Decision:
        """Decides on one call and appends the decision to the audit log.

        Raises:
            PlatformError: the audit log cannot be written; nobody was asked.
            KeyboardInterrupt: the approver was interrupted; the call is on record as refused.
        """
        self._log.check()

        def record(decision: Decision) -> None:
            self._log.append(
                "tool_call",
                "approved" if decision.approved else "refused",
                domain=domain,
                model_digest=model_digest,
                tool=call.tool,
                arguments=call.arguments,
                reason=decision.reason,
                actor=actor,
            )

        try:
            decision = self._over_limit(domain, actor) or self._approver(call)
        except KeyboardInterrupt:
            record(Decision(False, INTERRUPTED))
            raise
        # A person may take a while to answer: the count is taken again together with the approval.
        with self._log.lock():
            if decision.approved:
                decision = self._over_limit(domain, actor) or decision
            record(decision)
        return decision

    def _over_limit(self, domain: str, actor: str | None) -> Decision | None:
        is_smoke = actor == SMOKE_ACTOR
        approved = [
            entry
            for entry in self._log.recent(_WINDOW)
            # An overridden gate is approved, too, and no call.
            if (entry.action, entry.outcome, entry.domain) == ("tool_call", "approved", domain)
            and (entry.actor == SMOKE_ACTOR) == is_smoke
        ]
        if len(approved) < self._per_minute:
            return None
        return Decision(
            False,
            f"{len(approved)} destructive calls were approved in the last minute and serving.destructive_per_minute "
            f"is {self._per_minute}: wait, then ask again",
        )
