"""Execution of an agent's tool calls: on a backend, each one recorded in the audit log."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from taskagent_platform.agent.approvals import INTERRUPTED, Call, LimitedApprover
from taskagent_platform.audit import AuditLog, Outcome
from taskagent_platform.domains.base import Backend, Domain, ToolError


@dataclass(frozen=True)
class ExecutedCall:
    """One call that a model made and what came of it.

    Attributes:
        tool: the tool's name.
        arguments: the arguments: an object, or the text as the model wrote it where that is none.
        outcome: ``executed``, ``failed`` (the service answered with an error) or ``refused`` (it never ran).
        result: what the model got to read; None for a refused call.
        reason: why it failed or was refused.
    """

    tool: str
    arguments: Mapping[str, Any] | str
    outcome: Outcome
    result: dict[str, Any] | None = None
    reason: str | None = None


class ToolExecutor:
    """Executes the calls of one conversation, in order, and remembers them.

    Args:
        domain: whose tools are called.
        backend: what executes them.
        log: the audit log.
        approver: decides on the destructive calls.
        actor: who is responsible for the conversation; the account of the process if None.
        on_call: is told of each call as soon as its outcome is known.

    Attributes:
        model_digest: the model that is answering; kept up to date by whoever talks to the server.
        calls: every call so far, refused ones too.
        answer_is_destructive: whether the latest answer holds a destructive call, so that all its calls wait.
        refused: the destructive call that was not approved; the conversation ends with it.
    """

    def __init__(
        self,
        domain: Domain,
        backend: Backend,
        log: AuditLog,
        approver: LimitedApprover,
        actor: str | None = None,
        on_call: Callable[[ExecutedCall], None] | None = None,
    ) -> None:
        self.domain = domain
        self.model_digest: str | None = None
        self.calls: list[ExecutedCall] = []
        self.answer_is_destructive = False
        self.refused: ExecutedCall | None = None
        self._known = {tool.name for tool in domain.tools}
        self._destructive = {tool.name for tool in domain.tools if tool.destructive}
        self._backend = backend
        self._log = log
        self._approver = approver
        self._actor = actor
        self._on_call = on_call

    def execute(self, tool: str, arguments: str) -> str:
        """Executes a call and returns its result as the JSON text that the model reads.

        A call that the service refuses is a result too: the model may correct itself.

        Raises:
            PlatformError: the audit log cannot be written; nothing was executed.
        """
        # Whether the log can take the line shows before the call happens, not after.
        self._log.check()
        parsed = parse_arguments(arguments)
        try:
            if isinstance(parsed, str):
                raise ToolError(400, "invalid_argument", "the arguments are not a JSON object")
            result = self._backend.execute(tool, parsed)
        except ToolError as error:
            result = error.as_result()
            self._record(ExecutedCall(tool, parsed, "failed", result, str(error)))
        else:
            self._record(ExecutedCall(tool, parsed, "executed", result))
        return json.dumps(result, ensure_ascii=False)

    def begin_answer(self, calls: Sequence[tuple[str, str]]) -> str | None:
        """Takes note of the calls of one answer before they run, and records those of unknown tools.

        Args:
            calls: tools and arguments, in the order of the answer.

        Returns:
            Why none of the calls can run, which are then on record as refused; None if they can.

        Raises:
            PlatformError: the audit log cannot be written; nothing was executed.
        """
        fault = next(filter(None, (_fault(tool, arguments) for tool, arguments in calls)), None)
        if fault is not None:
            for tool, arguments in calls:
                self._record(ExecutedCall(_encodable(tool), _encodable(arguments), "refused", reason=fault))
            return fault
        self.answer_is_destructive = any(tool in self._destructive for tool, _ in calls)
        for tool, arguments in calls:
            if tool not in self._known:
                error = _unknown_tool(tool)
                self._record(ExecutedCall(tool, parse_arguments(arguments), "refused", error.as_result(), str(error)))
        return None

    def approve(self, pending: Sequence[tuple[str, str]]) -> bool:
        """Returns whether the calls of one answer may run: all of them, or none. Harmless ones need no approval.

        Args:
            pending: tools and arguments, in the order of the answer.

        Raises:
            PlatformError: the audit log cannot be written; nothing was executed.
            KeyboardInterrupt: the approver was interrupted; the calls are on record as refused.
        """
        calls = [Call(tool, parse_arguments(arguments)) for tool, arguments in pending]
        for index, call in enumerate(calls):
            if call.tool not in self._destructive:
                continue
            try:
                decision = self._approver(
                    call, domain=self.domain.name, model_digest=self.model_digest, actor=self._actor
                )
            except KeyboardInterrupt:
                self._refuse(calls, index, INTERRUPTED)
                raise
            if not decision.approved:
                self._refuse(calls, index, decision.reason)
                return False
        return True

    @staticmethod
    def unknown_tool_result(tool: str) -> str:
        """Returns what the model reads after calling a tool that does not exist."""
        return json.dumps(_unknown_tool(tool).as_result(), ensure_ascii=False)

    def _refuse(self, calls: Sequence[Call], index: int, reason: str) -> None:
        """Refuses an answer's calls because of one of them, whose refusal the approver has recorded."""
        refused = calls[index]
        self.refused = ExecutedCall(*refused, "refused", reason=reason)
        self._remember(self.refused)
        for other in (*calls[:index], *calls[index + 1 :]):
            self._record(ExecutedCall(*other, "refused", reason=f"{refused.tool} of the same answer was refused"))

    def _remember(self, call: ExecutedCall) -> None:
        self.calls.append(call)
        if self._on_call is not None:
            self._on_call(call)

    def _record(self, call: ExecutedCall) -> None:
        # Whoever is told of the call may fail; the backend has changed, and that has to be on record.
        self._log.append(
            "tool_call",
            call.outcome,
            domain=self.domain.name,
            model_digest=self.model_digest,
            tool=call.tool,
            arguments=call.arguments,
            reason=call.reason,
            actor=self._actor,
        )
        self._remember(call)


def _unknown_tool(tool: str) -> ToolError:
    return ToolError(404, "unknown_tool", f"there is no tool {tool}")


def _fault(tool: str, arguments: str) -> str | None:
    """Returns why a call can be neither recorded nor sent back to the server, or None if it can."""
    try:
        to_json((tool, arguments, parse_arguments(arguments)))
    except (ValueError, RecursionError):
        return f"the call of {_encodable(tool)} holds half a character, or is nested too deeply"
    return None


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def parse_arguments(text: str) -> dict[str, Any] | str:
    """Returns the arguments as an object, or the text itself where it is no JSON object."""
    try:
        parsed = json.loads(text)
    except ValueError:
        return text
    return parsed if isinstance(parsed, dict) else text
