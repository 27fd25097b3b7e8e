"""How an endpoint behaves under load: from one request at a time to the concurrency at which it gains nothing more."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from taskagent_platform.domains.base import Domain, Message
from taskagent_platform.evaluation.client import ContextExceededError, Endpoint, ask, opening_messages
from taskagent_platform.evaluation.latency import percentile, spread
from taskagent_platform.evaluation.suite import Case
from taskagent_platform.settings import EvaluationSettings

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_SATURATED_BELOW = 1.1
"""Twice the concurrency that gives less than this many times the throughput gives nothing worth waiting for."""
_STEPS_IN_TIME = 5
"""The share of the whole time that one step may take, so that a slow server is still asked at several."""


class LoadPoint(BaseModel):
    """What one concurrency gave.

    Attributes:
        concurrency: requests that were always under way.
        requests: how many were answered.
        requests_per_s: throughput.
        p50_ms: half of the answers were complete after this time.
        p95_ms: as is, for 95 %.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    concurrency: int
    requests: int
    requests_per_s: float
    p50_ms: float
    p95_ms: float


class LoadCurve(BaseModel):
    """Throughput and latency by concurrency.

    Attributes:
        points: in the order measured, by rising concurrency.
        saturated_at: the concurrency from which on more of it gained nothing; None if it was not reached.
        ended: what ended the measurement.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    points: tuple[LoadPoint, ...]
    saturated_at: int | None
    ended: Literal["saturated", "highest concurrency", "time"]


async def measure_load(
    client: "AsyncOpenAI",
    endpoint: Endpoint,
    domain: Domain,
    cases: Sequence[Case],
    settings: EvaluationSettings,
    *,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> LoadCurve | None:
    """Asks ever more requests at once until the throughput stops rising, or count or time run out.

    Every step asks the same cases, so that only the concurrency differs. Each request begins with a number of its own:
    what requests of one domain share (instructions, tools, date block) is in the server's cache, as it is when it
    serves, and the request itself is not. A server that proposes tokens from earlier answers (suffix decoding) knows
    these, though: the cases were asked before, so answers take less time than those of the timed single requests.

    Args:
        client: of the endpoint.
        endpoint: the endpoint.
        domain: whose prompt and tools.
        cases: whose inputs are asked, spread over all of them; their answers are not judged.
        settings: ``load_concurrency``, ``load_requests`` and ``load_seconds``.
        on_progress: is told the step, and the requests done of it and in it.

    Returns:
        The curve, None if there is no case to ask or the settings leave it out.

    Raises:
        PlatformError: the endpoint fails.
    """
    if not cases or not settings.load_concurrency:
        return None
    until = time.monotonic() + settings.load_seconds
    points: list[LoadPoint] = []
    asked = 0
    concurrency = 1
    client = client.with_options(max_retries=0)
    while concurrency <= settings.load_concurrency:
        count = max(settings.load_requests, 2 * concurrency)
        chosen = spread(cases, count)
        requests = [_request(domain, chosen[number % len(chosen)], asked + number) for number in range(count)]
        asked += count
        step_until = min(until, time.monotonic() + settings.load_seconds / _STEPS_IN_TIME)
        step = _Step(client, endpoint, domain, requests, step_until, concurrency, on_progress)
        point = await step.run()
        points.append(point)
        if (saturated := saturation(points)) is not None:
            return LoadCurve(points=tuple(points), saturated_at=saturated, ended="saturated")
        if time.monotonic() >= until:
            return LoadCurve(points=tuple(points), saturated_at=None, ended="time")
        concurrency *= 2
    return LoadCurve(points=tuple(points), saturated_at=None, ended="highest concurrency")


def saturation(points: Sequence[LoadPoint]) -> int | None:
    """Returns the concurrency before the last one if the last one gained nothing over it; None if it did."""
    if len(points) < 2:
        return None
    *before, last = points
    best = max(point.requests_per_s for point in before)
    return before[-1].concurrency if last.requests_per_s < best * _SATURATED_BELOW else None


class _Step:
    """The requests of one concurrency. Each place sends at least one, so that the concurrency is reached."""

    def __init__(
        self,
        client: "AsyncOpenAI",
        endpoint: Endpoint,
        domain: Domain,
        requests: Sequence[list[Message]],
        until: float,
        concurrency: int,
        on_progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self.client = client
        self.endpoint = endpoint
        self.tools = domain.openai_tools()
        self.requests = requests
        self.waiting = iter(requests)
        self.until = until
        self.concurrency = concurrency
        self.tell = on_progress or (lambda _what, _done, _total: None)
        self.times: list[float] = []

    async def run(self) -> LoadPoint:
        begin = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.concurrency):
                    group.create_task(self.one_place())
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        seconds = time.monotonic() - begin
        return LoadPoint(
            concurrency=self.concurrency,
            requests=len(self.times),
            requests_per_s=len(self.times) / seconds,
            p50_ms=percentile(self.times, 50),
            p95_ms=percentile(self.times, 95),
        )

    async def one_place(self) -> None:
        first = True
        while first or time.monotonic() < self.until:
            first = False
            messages = next(self.waiting, None)
            if messages is None:
                return
            begin = time.monotonic()
            if await ask(self.client, self.endpoint, messages, self.tools) is None:
                raise ContextExceededError(self.endpoint)
            self.times.append((time.monotonic() - begin) * 1000)
            self.tell(f"load, {self.concurrency} at once", len(self.times), len(self.requests))


def _request(domain: Domain, case: Case, number: int) -> list[Message]:
    messages = opening_messages(domain, case)
    return [*messages[:-1], {"role": "user", "content": f"({number + 1}) {case.input}"}]
