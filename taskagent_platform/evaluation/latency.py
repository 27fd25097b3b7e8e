"""How fast single requests are answered through the served endpoint."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict

from taskagent_platform.domains.base import Domain
from taskagent_platform.evaluation.client import (
    CaseRun,
    Endpoint,
    clear_errors,
    opening_messages,
    request_body,
    run_case,
)
from taskagent_platform.evaluation.suite import Case, Suite

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_FIRST_TOKEN_REQUESTS = 10


class Latency(BaseModel):
    """Latency of single requests, one at a time, in milliseconds.

    Attributes:
        requests: how many were timed.
        p50_ms: half of the answers were complete after this time.
        p95_ms: as is, for 95 %.
        p99_ms: as is, for 99 %.
        first_token_p50_ms: until the first token, median over fewer requests; None if it was not measured.
        all_ms: every request's time, in the order asked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    first_token_p50_ms: float | None = None
    all_ms: tuple[float, ...] = ()


class Split(NamedTuple):
    """A suite's cases, divided by how they are asked."""

    timed: tuple[Case, ...]
    first_token: tuple[Case, ...]
    rest: tuple[Case, ...]


def split_cases(suite: Suite, requests: int) -> Split:
    """Sets cases apart to be timed.

    A case that was asked before would be answered from the server's caches: the prompt is known, and suffix decoding
    remembers the answer. So the timed cases are asked only once, after the others.
    """
    single = [case for case in suite.cases if case.list_name in ("tool_selection", "argument_extraction")]
    timed = spread(single, requests)
    chosen = {case.id for case in timed}
    left = [case for case in single if case.id not in chosen]
    first_token = spread(left, min(_FIRST_TOKEN_REQUESTS, requests, len(left) // 2))
    apart = chosen | {case.id for case in first_token}
    return Split(tuple(timed), tuple(first_token), tuple(case for case in suite.cases if case.id not in apart))


async def time_cases(
    client: "AsyncOpenAI",
    endpoint: Endpoint,
    domain: Domain,
    split: Split,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Latency | None, list[CaseRun]]:
    """Times the cases set apart, one at a time, on a server that has just answered others.

    Returns:
        The latency, None if there was no case to time, and the cases as they were answered.
    """
    # What the client tries again in silence would be timed as one slow answer.
    client = client.with_options(max_retries=0)
    tools = domain.openai_tools()
    first_tokens = []
    runs = []
    for case in split.first_token:
        body = request_body(endpoint.model, opening_messages(domain, case), tools, max_tokens=endpoint.max_tokens)
        begin = time.perf_counter()
        with clear_errors(endpoint):
            async with await client.chat.completions.create(**body, stream=True) as stream:
                async for _ in stream:
                    first_tokens.append((time.perf_counter() - begin) * 1000)
                    break
        runs.append(await run_case(client, endpoint, domain, tools, case, max_turns=1))
    times = []
    for number, case in enumerate(split.timed):
        run = await run_case(client, endpoint, domain, tools, case, max_turns=1)
        runs.append(run)
        times.append(run.seconds * 1000)
        if on_progress is not None:
            on_progress(number + 1, len(split.timed))
    if not times:
        return None, runs
    latency = Latency(
        requests=len(times),
        p50_ms=percentile(times, 50),
        p95_ms=percentile(times, 95),
        p99_ms=percentile(times, 99),
        first_token_p50_ms=percentile(first_tokens, 50) if first_tokens else None,
        all_ms=tuple(round(value, 1) for value in times),
    )
    return latency, runs


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns a percentile, interpolated between the two nearest values.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("no percentile of nothing")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(cases: Sequence[Case], count: int) -> list[Case]:
    """Returns that many of the cases, or all if there are fewer, evenly from the first to the last."""
    count = min(count, len(cases))
    return [cases[index * len(cases) // count] for index in range(count)]
