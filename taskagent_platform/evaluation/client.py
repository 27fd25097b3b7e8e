"""Asking an endpoint the cases of a suite, as the agent would: same body, same prompt, tools really executed."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taskagent_platform.domains.base import Backend, Domain, Message, ToolError
from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.answer import Answer, Attempt, read_answer
from taskagent_platform.evaluation.scoring import Conversation, Executed, Replay
from taskagent_platform.evaluation.suite import Case

if TYPE_CHECKING:  # the package takes a second to import; listing assets or printing help must not wait for it
    from openai import APIStatusError, AsyncOpenAI

CaseProgress = Callable[[int, int], None]
"""Is told how many cases are done, and of how many."""

_REQUEST_TIMEOUT_S = 600.0
_NOT_FOUND = 404


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server and how to ask it.

    Attributes:
        base_url: its address, with ``/v1``.
        model: the name that it serves the model under.
        max_tokens: the longest answer asked for.
        api_key: sent as a bearer token; servers without keys ignore it.
        temperature: 0 as the agent asks; higher only to sample several answers to a case.
        seed: of the samples; not sent if None.
    """

    base_url: str
    model: str
    max_tokens: int
    api_key: str = "none"
    temperature: float = 0.0
    seed: int | None = None


@dataclass(frozen=True)
class CaseRun:
    """One case as it was asked.

    Attributes:
        case: the case.
        messages: the conversation without the system message: earlier messages, the input, answers, tool results.
        conversation: the same, read.
        seconds: how long the first answer took, waiting for other cases included.
    """

    case: Case
    messages: tuple[Message, ...]
    conversation: Conversation
    seconds: float


def request_body(
    model: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, max_tokens: int
) -> dict[str, Any]:
    """Returns a request's body, the same as the Agents SDK sends for the same conversation.

    A test compares it with the SDK's, byte for byte: what is measured is what is served.
    """
    body: dict[str, Any] = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0.0}
    # A server refuses an empty list of tools.
    return {**body, "tools": list(tools)} if tools else body


def opening_messages(domain: Domain, case: Case) -> list[Message]:
    """Returns the messages of a case's first request."""
    return [
        {"content": domain.system_prompt(case.now), "role": "system"},
        *case.messages,
        {"role": "user", "content": case.input},
    ]


def tool_schemas(domain: Domain) -> dict[str, dict[str, Any]]:
    """Returns the JSON schema of every tool's arguments, by name."""
    return {tool.name: tool.parameters() for tool in domain.tools}


def destructive_tools(domain: Domain) -> frozenset[str]:
    """Returns the names of the tools that destroy something."""
    return frozenset(tool.name for tool in domain.tools if tool.destructive)


def case_backend(domain: Domain, case: Case) -> Backend:
    """Returns a fresh backend of a case, brought to where its earlier conversation left it."""
    backend = domain.backend(case.now, case.fixture)
    for message in case.messages:
        for call in message.get("tool_calls") or []:
            function = call["function"]
            _execute(backend, function["name"], json.loads(function["arguments"]))
    return backend


def replay_on(domain: Domain, case: Case) -> Replay:
    """Returns the function that executes calls on a fresh backend of a case."""

    def replay(turns: Sequence[Sequence[Attempt]]) -> list[Mapping[str, Any]]:
        backend = case_backend(domain, case)
        states: list[Mapping[str, Any]] = []
        for calls in turns:
            for call in calls:
                _execute(backend, call.name, call.arguments or {})
            states.append(backend.snapshot())
        return states

    return replay


@asynccontextmanager
async def open_client(endpoint: Endpoint) -> AsyncIterator["AsyncOpenAI"]:
    """Opens a client of an endpoint. The proxies of the environment are not asked for it."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    http_client = DefaultAsyncHttpxClient(trust_env=False)
    async with AsyncOpenAI(
        base_url=endpoint.base_url, api_key=endpoint.api_key, http_client=http_client, timeout=_REQUEST_TIMEOUT_S
    ) as client:
        yield client


class ContextExceededError(PlatformError):
    """A conversation is longer than the server takes."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(
            f"{endpoint.base_url} refuses a request as longer than its context: prompt, tools and serving.max_tokens "
            f"({endpoint.max_tokens}) do not fit; raise serving.max_model_len or lower serving.max_tokens."
        )


@contextmanager
def clear_errors(endpoint: Endpoint) -> Iterator[None]:
    """Turns the client's errors into sentences that name the endpoint.

    Raises:
        ContextExceededError: the conversation is longer than the server takes.
        PlatformError: anything else that the client complains about.
    """
    import openai

    url = endpoint.base_url
    try:
        yield
    except openai.BadRequestError as error:
        if "context length" in str(error).lower():
            raise ContextExceededError(endpoint) from error
        raise PlatformError(f"{url} refuses a request: {_reason(error)}") from error
    except openai.NotFoundError as error:
        raise PlatformError(f"{url} has no model {endpoint.model!r}: {_reason(error)}") from error
    except openai.APIStatusError as error:
        raise PlatformError(f"{url} answers with status {error.status_code}: {_reason(error)}") from error
    except openai.APIConnectionError as error:
        cause = error.__cause__ or error
        raise PlatformError(f"{url} does not answer ({type(cause).__name__}: {cause}).") from error


def _reason(error: "APIStatusError") -> str:
    said = error.body.get("message") if isinstance(error.body, dict) else None
    return str(said or error.message)


async def ask(
    client: "AsyncOpenAI", endpoint: Endpoint, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> Message | None:
    """Asks for one answer.

    Returns:
        The assistant's message in the form that it has in a conversation; None if the conversation is longer than the
        server takes.

    Raises:
        PlatformError: the endpoint does not answer or refuses the request.
    """
    body = request_body(endpoint.model, messages, tools, max_tokens=endpoint.max_tokens)
    if endpoint.temperature:
        body |= {"temperature": endpoint.temperature, "seed": endpoint.seed}
    try:
        with clear_errors(endpoint):
            completion = await client.chat.completions.create(**body)
    except ContextExceededError:
        return None
    if not completion.choices:
        raise PlatformError(f"{endpoint.base_url} answers without a choice; is it an OpenAI-compatible server?")
    return _as_message(completion.choices[0].message)


async def run_case(
    client: "AsyncOpenAI",
    endpoint: Endpoint,
    domain: Domain,
    tools: Sequence[Mapping[str, Any]],
    case: Case,
    *,
    max_turns: int,
) -> CaseRun:
    """Asks one case: a chain until the model stops calling tools, anything else for one answer.

    Raises:
        ContextExceededError: the case's first request is longer than the server takes: nothing is known of the model
            then. A chain that outgrows the context later is the model's doing.
        PlatformError: the endpoint fails.
    """
    names = [tool["function"]["name"] for tool in tools]
    messages = opening_messages(domain, case)
    backend = case_backend(domain, case)
    answers: list[Answer] = []
    executed: list[Executed] = []
    states: list[Mapping[str, Any]] = []
    seconds = 0.0
    ended = exceeded = False
    begin = time.monotonic()
    while not ended and len(answers) < (max_turns if case.list_name == "multi_tool_chains" else 1):
        message = await ask(client, endpoint, messages, tools)
        seconds = seconds or time.monotonic() - begin
        if message is None:
            if not answers:
                raise ContextExceededError(endpoint)
            exceeded = ended = True
            break
        messages.append(message)
        answer = read_answer(message, names)
        ended = not answer.calls or answer.is_malformed
        if not ended and case.list_name == "multi_tool_chains":
            done = [_execute_attempt(backend, call, len(answers)) for call in answer.calls]
            messages += [
                {"role": "tool", "tool_call_id": call["id"], "content": json.dumps(one.result, ensure_ascii=False)}
                for call, one in zip(message["tool_calls"], done, strict=True)
            ]
            executed += done
            states.append(backend.snapshot())
        answers.append(answer)
    conversation = Conversation(
        answers=tuple(answers),
        executed=tuple(executed),
        states=tuple(states),
        hit_turn_limit=not ended and case.list_name == "multi_tool_chains",
        context_exceeded=exceeded,
    )
    return CaseRun(case, tuple(messages[1:]), conversation, seconds)


async def run_cases(
    client: "AsyncOpenAI",
    endpoint: Endpoint,
    domain: Domain,
    cases: Sequence[Case],
    *,
    concurrency: int,
    max_turns: int,
    on_progress: CaseProgress | None = None,
) -> list[CaseRun]:
    """Asks cases, ``concurrency`` at a time, and returns them in the order given.

    Raises:
        PlatformError: the endpoint fails; the cases still running are cancelled.
    """
    tools = domain.openai_tools()
    slots = asyncio.Semaphore(concurrency)
    done = 0

    async def one(case: Case) -> CaseRun:
        nonlocal done
        async with slots:
            run = await run_case(client, endpoint, domain, tools, case, max_turns=max_turns)
        done += 1
        if on_progress is not None:
            on_progress(done, len(cases))
        return run

    try:
        async with asyncio.TaskGroup() as group:
            # Cases of the same moment share a prompt, which the server then has in its cache.
            order = sorted(range(len(cases)), key=lambda index: cases[index].now)
            tasks = {index: group.create_task(one(cases[index])) for index in order}
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [tasks[index].result() for index in range(len(cases))]


def _as_message(answer: Any) -> Message:
    """Returns an answer as the next request repeats it; the SDK repeats it in the same form."""
    message: Message = {"role": "assistant", "content": answer.content}
    if calls := [call for call in answer.tool_calls or [] if call.type == "function"]:
        message["content"] = answer.content or None
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in calls
        ]
    return message


def _execute_attempt(backend: Backend, attempt: Attempt, turn: int) -> Executed:
    before = backend.snapshot()
    result, refusal = _execute(backend, attempt.name, attempt.arguments or {})
    return Executed(
        attempt=attempt,
        turn=turn,
        result=result,
        refused=refusal is not None,
        not_found=refusal is not None and refusal.status == _NOT_FOUND,
        changed=backend.snapshot() != before,
    )


def _execute(backend: Backend, tool: str, arguments: Mapping[str, Any]) -> tuple[Mapping[str, Any], ToolError | None]:
    try:
        return backend.execute(tool, arguments), None
    except ToolError as error:
        return error.as_result(), error
