"""One evaluation from suite to report."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from taskagent_platform.domains.base import Domain
from taskagent_platform.evaluation.client import (
    CaseRun,
    Endpoint,
    destructive_tools,
    open_client,
    replay_on,
    run_cases,
    tool_schemas,
)
from taskagent_platform.evaluation.latency import Latency, Split, split_cases, time_cases
from taskagent_platform.evaluation.report import (
    CaseRecord,
    EvalReport,
    FaultRecord,
    categories_of,
    metrics_of,
    this_hardware,
)
from taskagent_platform.evaluation.scoring import score_case
from taskagent_platform.evaluation.suite import Suite
from taskagent_platform.settings import Settings

Progress = Callable[[str, int, int], None]
"""Is told what is being done, how much of it is done, and of how much."""


def evaluate(
    settings: Settings,
    domain: Domain,
    *,
    base_url: str,
    model_name: str,
    model_digest: str | None,
    suite: Suite,
    measure_latency: bool = True,
    api_key: str = "none",
    on_progress: Progress | None = None,
) -> EvalReport:
    """Measures the model behind an OpenAI-compatible endpoint on a suite.

    Args:
        settings: concurrency, turns, sample sizes and gates.
        domain: whose tools, prompt and backend.
        base_url: the endpoint, with ``/v1``.
        model_name: the name to ask for.
        model_digest: digest of the model folder; None where it is not known.
        suite: the cases; ``settings.evaluation.case_limit`` applies to it.
        measure_latency: time single requests after the others.
        api_key: for servers that want one.
        on_progress: is told of every case.

    Raises:
        PlatformError: the endpoint fails. No report is made of a part of the suite.
    """
    suite = suite.limited(settings.evaluation.case_limit) if suite.case_limit is None else suite
    endpoint = Endpoint(base_url, model_name, settings.serving.max_tokens, api_key)
    started = datetime.now(UTC)
    begin = time.monotonic()
    runs, latency = asyncio.run(_ask_all(settings, domain, endpoint, suite, measure_latency, on_progress))
    by_id = {run.case.id: run for run in runs}
    records = tuple(_record(domain, by_id[case.id]) for case in suite.cases)
    verdicts: dict[str, Counter[str]] = {}
    for record in records:
        verdicts.setdefault(record.list_name, Counter())[record.verdict] += 1
    return EvalReport(
        domain=domain.name,
        model_name=model_name,
        model_digest=model_digest,
        endpoint=base_url,
        suite_digest=suite.digest,
        suite_files=dict(suite.digests),
        case_limit=suite.case_limit,
        metrics=metrics_of(records, settings.gates),
        categories=categories_of(records),
        verdicts={name: dict(counts) for name, counts in verdicts.items()},
        fault_types=dict(Counter(fault.type for record in records for fault in record.faults)),
        minefields=sum(any(f.type == "unrequested_destruction" for f in record.faults) for record in records),
        extra_reads=sum(record.extra_reads for record in records),
        latency=latency,
        latency_budget_ms=settings.gates.latency_p95_ms,
        latency_target_ms=settings.gates.latency_target_ms,
        cases=records,
        settings=_settings_of(settings),
        hardware=this_hardware(),
        started=started,
        seconds=round(time.monotonic() - begin, 1),
        complete=True,
    )


async def _ask_all(
    settings: Settings,
    domain: Domain,
    endpoint: Endpoint,
    suite: Suite,
    measure_latency: bool,
    on_progress: Progress | None,
) -> tuple[list[CaseRun], Latency | None]:
    chosen = settings.evaluation
    split = split_cases(suite, chosen.latency_requests) if measure_latency else Split((), (), suite.cases)
    tell = on_progress or (lambda _what, _done, _total: None)
    async with open_client(endpoint) as client:
        # The first use of a tool set compiles its grammar and fills the prompt cache; one request at a time does it.
        warm_up = split.rest[: max(1, chosen.latency_warmup)]
        runs = await run_cases(client, endpoint, domain, warm_up, concurrency=1, max_turns=chosen.max_turns)
        rest = split.rest[len(warm_up) :]
        runs += await run_cases(
            client,
            endpoint,
            domain,
            rest,
            concurrency=chosen.concurrency,
            max_turns=chosen.max_turns,
            on_progress=lambda done, _: tell("cases", done + len(warm_up), len(split.rest)),
        )
        latency, timed = await time_cases(
            client, endpoint, domain, split, on_progress=lambda done, total: tell("timed requests", done, total)
        )
    return runs + timed, latency


def _record(domain: Domain, run: CaseRun) -> CaseRecord:
    case, conversation = run.case, run.conversation
    score = score_case(
        case,
        conversation,
        tool_schemas(domain),
        destructive=destructive_tools(domain),
        replay=replay_on(domain, case),
    )
    return CaseRecord(
        id=case.id,
        list_name=case.list_name,
        category=case.category,
        input=case.input,
        now=case.now.isoformat(timespec="minutes"),
        verdict=score.verdict,
        passed=score.passed,
        faults=tuple(
            FaultRecord(type=fault.type, sentence=fault.sentence, tool=fault.tool, argument=fault.argument)
            for fault in score.faults
        ),
        expected=tuple(call.as_json() for call in case.calls),
        got=tuple(attempt.as_json() for answer in conversation.answers for attempt in answer.attempts),
        text=conversation.answers[-1].text,
        attempted=score.attempted,
        valid=score.valid,
        extra_reads=score.extra_reads,
        turns=len(conversation.answers),
        messages=() if score.passed else run.messages,
    )


def _settings_of(settings: Settings) -> dict[str, Any]:
    serving = settings.serving
    return {
        "profile": settings.profile,
        "max_tokens": serving.max_tokens,
        "temperature": 0.0,
        "dtype": serving.dtype,
        "speculation": serving.speculation,
        "enforce_eager": serving.enforce_eager,
        "concurrency": settings.evaluation.concurrency,
        "max_turns": settings.evaluation.max_turns,
        "latency_requests": settings.evaluation.latency_requests,
    }
