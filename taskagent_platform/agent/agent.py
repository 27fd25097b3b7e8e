"""The agent itself: the domain's prompt and tools on the OpenAI Agents SDK.

Importing this module imports the SDK, which takes a second or more; light modules import it inside functions.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import openai
from agents import Agent, FunctionTool, ModelSettings, OpenAIChatCompletionsModel, RunConfig, Runner
from agents.exceptions import MaxTurnsExceeded, ModelBehaviorError, UserError
from agents.items import ModelResponse, ToolApprovalItem
from agents.run_config import ToolErrorFormatterArgs, ToolExecutionConfig
from agents.run_context import RunContextWrapper
from agents.tool_context import ToolContext
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from openai.types.responses import ResponseFunctionToolCall
from pydantic import ValidationError

from taskagent_platform.agent.execution import ExecutedCall, ToolExecutor
from taskagent_platform.domains.base import Domain, Tool
from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.client import Endpoint
from taskagent_platform.serving.active import DIGEST_HEADER

_REQUEST_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Answer:
    """What came of one request.

    Attributes:
        text: the model's last message; the platform's own sentence where a call was refused or the turns ran out.
        calls: every call that the model made, in order.
        model_digest: the model that answered last; None where the server does not say.
        is_finished: whether the model came to an end; False where its turns ran out or it gave no usable answer.
    """

    text: str
    calls: tuple[ExecutedCall, ...]
    model_digest: str | None
    is_finished: bool = True


def build_agent(
    domain: Domain, executor: ToolExecutor, client: AsyncOpenAI, endpoint: Endpoint, now: datetime
) -> Agent:
    """Builds the agent of a domain.

    Args:
        domain: the tools and the prompt.
        executor: executes the calls.
        client: a client of the endpoint.
        endpoint: the model to ask.
        now: the moment at which the conversation takes place.
    """
    return Agent(
        name=domain.agent_name,
        instructions=domain.system_prompt(now),
        tools=[_function_tool(tool, executor) for tool in domain.tools],
        model=_Model(endpoint.model, client, executor),
        model_settings=ModelSettings(temperature=0, max_tokens=endpoint.max_tokens),
    )


async def run_agent(
    domain: Domain, executor: ToolExecutor, endpoint: Endpoint, text: str, *, now: datetime, max_turns: int
) -> Answer:
    """Answers one request: the model calls tools until it has something to say.

    A refused call ends the conversation: a small model told of a refusal may still claim that the thing is done.

    Raises:
        PlatformError: the endpoint does not answer or refuses the request.
    """

    async def note_digest(response: Any) -> None:
        executor.model_digest = response.headers.get(DIGEST_HEADER) or executor.model_digest

    # The address is the user's own setting; a proxy of the environment is not asked for it.
    http_client = DefaultAsyncHttpxClient(trust_env=False, event_hooks={"response": [note_digest]})
    client = AsyncOpenAI(
        base_url=endpoint.base_url, api_key=endpoint.api_key, http_client=http_client, timeout=_REQUEST_TIMEOUT_S
    )
    async with client:
        agent = build_agent(domain, executor, client, endpoint, now)
        config = RunConfig(
            # The SDK would send traces to OpenAI.
            tracing_disabled=True,
            tool_not_found_behavior="return_error_to_model",
            tool_error_formatter=_unknown_tool_message,
            # Calls of one turn run in the order in which the model wrote them, as in the evaluation.
            tool_execution=ToolExecutionConfig(max_function_tool_concurrency=1),
        )
        is_finished = True
        try:
            result = await Runner.run(agent, text, run_config=config, max_turns=max_turns)
            while result.interruptions:
                state = result.to_state()
                if not executor.approve([_pending(item) for item in result.interruptions]):
                    text = _refusal(executor)
                    break
                for item in result.interruptions:
                    state.approve(item)
                result = await Runner.run(agent, state, run_config=config, max_turns=max_turns)
            else:
                text = str(result.final_output)
        except MaxTurnsExceeded:
            is_finished = False
            text = f"Stopped: the model was still calling tools after {max_turns} turns."
        except openai.APITimeoutError as error:
            raise PlatformError(
                f"{endpoint.base_url} has not answered within {_REQUEST_TIMEOUT_S:g} s: wait until it has less to do, "
                "or see its log."
            ) from error
        except openai.APIConnectionError as error:
            raise PlatformError(
                f"Nothing answers at {endpoint.base_url}: deploy a model first, or see `taskagent status`."
            ) from error
        except openai.APIStatusError as error:
            raise PlatformError(f"{endpoint.base_url} answered {error.status_code}: {error.message}") from error
        except (ModelBehaviorError, ValidationError, UnicodeError, RecursionError) as error:
            # An empty answer, one cut off before its first word, or one that the SDK cannot read or send back (a call
            # without an id, half a character): the model's fault, not the platform's.
            is_finished = False
            text = f"The model gave no usable answer: {_in_one_line(error)}"
        except UserError as error:
            # The SDK wraps what a tool raises; the sentence meant for the user is the cause.
            if isinstance(error.__cause__, PlatformError):
                raise error.__cause__ from None
            raise
    return Answer(text, tuple(executor.calls), executor.model_digest, is_finished)


class _Model(OpenAIChatCompletionsModel):
    """Tells the executor of the calls of each answer before the SDK looks at them and any of them runs."""

    def __init__(self, name: str, client: AsyncOpenAI, executor: ToolExecutor) -> None:
        super().__init__(model=name, openai_client=client)
        self._executor = executor

    async def get_response(self, *arguments: Any, **options: Any) -> ModelResponse:
        response = await super().get_response(*arguments, **options)
        calls = [item for item in response.output if isinstance(item, ResponseFunctionToolCall)]
        fault = self._executor.begin_answer([(call.name, call.arguments) for call in calls])
        if fault is not None:
            raise ModelBehaviorError(fault)
        return response


def _unknown_tool_message(problem: ToolErrorFormatterArgs[Any]) -> str | None:
    if problem.kind == "tool_not_found":
        return ToolExecutor.unknown_tool_result(problem.tool_name)
    return None


def _function_tool(tool: Tool, executor: ToolExecutor) -> FunctionTool:
    made = FunctionTool(
        name=tool.name,
        description=tool.description,
        params_json_schema=tool.parameters(),
        on_invoke_tool=_invoker(tool, executor),
        strict_json_schema=False,
        needs_approval=tool.destructive or _waits_for_approval(executor),
    )
    # Asked for strict, the SDK would rewrite the schema so that every argument is required. The server takes
    # optional ones in strict mode too, and the model was taught and judged with exactly this schema.
    made.strict_json_schema = True
    return made


def _waits_for_approval(executor: ToolExecutor) -> Callable[..., Awaitable[bool]]:
    # The SDK would run the harmless calls of an answer while a destructive one waits for its approval: in another
    # order than the model wrote, and than the evaluation measured.
    async def waits(context: RunContextWrapper[Any], arguments: dict[str, Any], call_id: str) -> bool:
        return executor.answer_is_destructive

    return waits


def _invoker(tool: Tool, executor: ToolExecutor) -> Callable[[ToolContext[Any], str], Awaitable[str]]:
    async def invoke(context: ToolContext[Any], arguments: str) -> str:
        return executor.execute(tool.name, arguments)

    return invoke


def _pending(item: ToolApprovalItem) -> tuple[str, str]:
    raw = item.raw_item
    if not isinstance(raw, ResponseFunctionToolCall):
        raise PlatformError(f"The SDK asks to approve something that is no function call: {raw!r}.")
    return raw.name, raw.arguments


def _in_one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
    return str(error)


def _refusal(executor: ToolExecutor) -> str:
    refused = executor.refused
    assert refused is not None
    return f"Not done: {refused.tool} was refused, {refused.reason}."
