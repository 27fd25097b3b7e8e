"""One evaluation from suite to report."""

import asyncio
import inspect
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from taskagent_platform.artifacts import code_version, digest_of, file_digest
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
from taskagent_platform.evaluation.load_curve import LoadCurve, measure_load
from taskagent_platform.evaluation.metric import METRIC_OF_LIST, MetricName
from taskagent_platform.evaluation.report import (
    CaseRecord,
    EvalReport,
    FaultRecord,
    Reliability,
    categories_of,
    metrics_of,
    slices_of,
    this_hardware,
)
from taskagent_platform.evaluation.scoring import MINEFIELDS, Score, score_case
from taskagent_platform.evaluation.statistics import pass_hat_k
from taskagent_platform.evaluation.suite import DEFAULT_NOW, Case, Suite, Suites
from taskagent_platform.settings import Settings

Progress = Callable[[str, int, int], None]
"""Is told what is being done, how much of it is done, and of how much."""
SERVED_WITH = ("dtype", "speculation", "enforce_eager", "max_model_len", "max_num_seqs")
"""Settings of the server that a report is of."""
_SCORER = tuple(f"evaluation/{name}.py" for name in ("answer", "client", "scoring", "suite"))


class _Asked(NamedTuple):
    """What was measured of an endpoint."""

    runs: list[CaseRun]
    latency: Latency | None
    load: LoadCurve | None
    samples: list[list[CaseRun]]


def conditions(settings: Settings, domain: Domain, suites: Suites) -> str:
    """Returns the digest of what two reports must share to be compared, beside their suites.

    That is the prompt, the tools, the simulated backend with the fixtures that the suites name, the scorer, and the
    limits and the precision that the model was asked with.
    """
    now = datetime.fromisoformat(DEFAULT_NOW)
    fixtures = {case.fixture for suite in suites if suite is not None for case in suite.cases}
    states = {name: domain.backend(now, name).snapshot() for name in sorted(fixtures)}
    backend = inspect.getfile(type(domain.backend(now)))
    limits = [settings.evaluation.max_turns, settings.serving.max_tokens, settings.serving.dtype]
    simulated = [states, file_digest(Path(backend))]
    return digest_of([domain.system_prompt(now), domain.openai_tools(), simulated, code_version(*_SCORER), limits])


def evaluate(
    settings: Settings,
    domain: Domain,
    *,
    base_url: str,
    model_name: str,
    model_digest: str | None,
    suite: Suite,
    robustness: Suite | None = None,
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
        suite: the cases that the gates count; ``settings.evaluation.case_limit`` applies to it.
        robustness: hard cases, asked beside them and reported apart; the same limit applies.
        measure_latency: time single requests after the others, and then measure the load curve.
        api_key: for servers that want one.
        on_progress: is told of every case.

    Raises:
        PlatformError: the endpoint fails. No report is made of a part of the suite.
    """
    if suite.case_limit is None:
        suite, robustness = Suites(suite, robustness).limited(settings.evaluation.case_limit)
    endpoint = Endpoint(base_url, model_name, settings.serving.max_tokens, api_key)
    started = datetime.now(UTC)
    begin = time.monotonic()
    beside = robustness.cases if robustness is not None else ()
    asked = asyncio.run(_ask_all(settings, domain, endpoint, suite, beside, measure_latency, on_progress))
    by_id = {run.case.id: run for run in asked.runs}
    records = tuple(_record(domain, by_id[case.id]) for case in suite.cases)
    robustness_records = tuple(_record(domain, by_id[case.id]) for case in beside)
    both = records + robustness_records
    verdicts: dict[str, Counter[str]] = {}
    for record in records:
        verdicts.setdefault(record.list_name, Counter())[record.verdict] += 1
    return EvalReport(
        domain=domain.name,
        model_name=model_name,
        model_digest=model_digest,
        endpoint=base_url,
        suite_digest=suite.digest,
        suite_files=dict(suite.digests) | (dict(robustness.digests) if robustness is not None else {}),
        case_limit=suite.case_limit,
        metrics=metrics_of(records, settings.gates),
        categories=categories_of(records),
        verdicts={name: dict(counts) for name, counts in verdicts.items()},
        fault_types=dict(Counter(fault.type for record in both for fault in record.faults)),
        minefields=sum(any(fault.type in MINEFIELDS for fault in record.faults) for record in both),
        extra_reads=sum(record.extra_reads for record in both),
        latency=asked.latency,
        latency_budget_ms=settings.gates.latency_p95_ms,
        latency_target_ms=settings.gates.latency_target_ms,
        cases=records,
        settings=_settings_of(settings, domain, Suites(suite, robustness), served_here=model_digest is not None),
        hardware=this_hardware(),
        started=started,
        seconds=round(time.monotonic() - begin, 1),
        complete=True,
        slices=slices_of(both),
        robustness=robustness_records,
        robustness_digest=robustness.digest if robustness is not None else None,
        load=asked.load,
        reliability=_reliability(settings, domain, asked.samples),
    )


async def _ask_all(
    settings: Settings,
    domain: Domain,
    endpoint: Endpoint,
    suite: Suite,
    beside: Sequence[Case],
    measure_latency: bool,
    on_progress: Progress | None,
) -> _Asked:
    chosen = settings.evaluation
    split = split_cases(suite, chosen.latency_requests) if measure_latency else Split((), (), suite.cases)
    tell = on_progress or (lambda _what, _done, _total: None)
    async with open_client(endpoint) as client:
        # The first use of a tool set compiles its grammar and fills the prompt cache; one request at a time does it.
        warm_up = split.rest[: max(1, chosen.latency_warmup)]
        runs = await run_cases(client, endpoint, domain, warm_up, concurrency=1, max_turns=chosen.max_turns)
        rest = [*split.rest[len(warm_up) :], *beside]
        runs += await run_cases(
            client,
            endpoint,
            domain,
            rest,
            concurrency=chosen.concurrency,
            max_turns=chosen.max_turns,
            on_progress=lambda done, _: tell("cases", done + len(warm_up), len(warm_up) + len(rest)),
        )
        latency, timed = await time_cases(
            client, endpoint, domain, split, on_progress=lambda done, total: tell("timed requests", done, total)
        )
        load = None
        if measure_latency:
            single = [case for case in suite.cases if case.list_name in ("tool_selection", "argument_extraction")]
            load = await measure_load(client, endpoint, domain, single, chosen, on_progress=tell)
        samples = []
        sampled = suite.limited(chosen.sample_cases).cases if suite.case_limit is None else suite.cases
        for number in range(chosen.samples if chosen.samples > 1 else 0):
            warm = replace(endpoint, temperature=chosen.sample_temperature, seed=settings.seed + number)
            samples.append(
                await run_cases(
                    client,
                    warm,
                    domain,
                    sampled,
                    concurrency=chosen.concurrency,
                    max_turns=chosen.max_turns,
                    on_progress=lambda done, total, number=number: tell(f"sample {number + 1}", done, total),  # type: ignore[misc]
                )
            )
    return _Asked(runs + timed, latency, load, samples)


def _reliability(settings: Settings, domain: Domain, samples: list[list[CaseRun]]) -> Reliability | None:
    if not samples:
        return None
    right: dict[MetricName, Counter[str]] = {}
    for runs in samples:
        for run in runs:
            counts = right.setdefault(METRIC_OF_LIST[run.case.list_name], Counter())
            counts[run.case.id] += _score(domain, run).passed
    return Reliability(
        temperature=settings.evaluation.sample_temperature,
        samples=len(samples),
        cases={name: len(counts) for name, counts in right.items()},
        pass_hat_k={
            name: tuple(
                sum(pass_hat_k(count, len(samples), k) for count in counts.values()) / len(counts)
                for k in range(1, len(samples) + 1)
            )
            for name, counts in right.items()
        },
    )


def _score(domain: Domain, run: CaseRun) -> Score:
    return score_case(
        run.case,
        run.conversation,
        tool_schemas(domain),
        destructive=destructive_tools(domain),
        replay=replay_on(domain, run.case),
    )


def _record(domain: Domain, run: CaseRun) -> CaseRecord:
    case, conversation = run.case, run.conversation
    score = _score(domain, run)
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
        slice=case.slice,
    )


def _settings_of(settings: Settings, domain: Domain, suites: Suites, *, served_here: bool) -> dict[str, Any]:
    serving = settings.serving
    # How a server that is not ours was started is not known.
    started_with = {name: getattr(serving, name) for name in SERVED_WITH} if served_here else {}
    return {
        "profile": settings.profile,
        "conditions": conditions(settings, domain, suites),
        "max_tokens": serving.max_tokens,
        "temperature": 0.0,
        **started_with,
        "concurrency": settings.evaluation.concurrency,
        "max_turns": settings.evaluation.max_turns,
        "latency_requests": settings.evaluation.latency_requests,
    }
