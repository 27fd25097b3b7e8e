"""What is wrong with a suite, found without a model: gold answers that cannot be right, and cases that repeat others.

Every expected answer is validated, executed on the case's backend and scored as if a model had given it: what does not
pass there can be passed by nobody.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from pydantic import ValidationError

from taskagent_platform.data.training_dataset import normal
from taskagent_platform.domains.base import Domain, ToolError
from taskagent_platform.evaluation.answer import Answer, Attempt, has_type
from taskagent_platform.evaluation.client import case_backend, destructive_tools, replay_on, tool_schemas
from taskagent_platform.evaluation.scoring import Conversation, Executed, score_case
from taskagent_platform.evaluation.suite import Case, ExpectedCall, Suite

NEAR = 0.85
"""Inputs that share this much of their three-letter pieces are near-duplicates."""
_NOT_FOUND = 404

Kind = Literal["invalid", "not executable", "not passable", "repeated", "contradicted", "near-duplicate", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth a look.

    Attributes:
        case: the case's id.
        kind: machine-readable.
        sentence: the same for a reader.
        is_error: whether the case cannot stand as it is; otherwise its author should look at it.
    """

    case: str
    kind: Kind
    sentence: str
    is_error: bool = True


def lint_suite(suite: Suite, domain: Domain) -> list[Finding]:
    """Looks for wrong gold answers and for cases that repeat or contradict others.

    Args:
        suite: as :func:`~taskagent_platform.evaluation.suite.load_suite` read it, which found every fault of form.
        domain: whose tools and backend.

    Returns:
        the findings, in the order of the cases.
    """
    findings = []
    for case in suite.cases:
        invalid = list(_invalid(case, domain))
        findings += invalid or list(_unpassable(case, domain))
    return [*findings, *_repeated(suite.cases), *_near(suite.cases)]


def _invalid(case: Case, domain: Domain) -> Iterator[Finding]:
    """Yields the expected arguments that no valid call has."""
    for number, call in enumerate(case.calls):
        if call.arguments is None:
            continue
        model = domain.tool(call.tool).arguments
        schema = domain.tool(call.tool).parameters()
        sources = call.sources or {}
        for name in schema["required"]:
            wanted = call.arguments.get(name)
            if name not in sources and (wanted is None or wanted.optional):
                yield Finding(case.id, "invalid", f"{call.tool} requires {name}, and the case expects it not.")
        first = _first_arguments(call)
        for name, wanted in call.arguments.items():
            for value in wanted.any_of or ():
                problem = _problem(model, {**first, name: value}, name)
                if problem is None and not has_type(value, schema["properties"][name]):
                    problem = "it has the wrong type"
                if problem is not None:
                    yield Finding(case.id, "invalid", f"{call.tool}.{name} = {value!r}: {problem}.")
        if case.ordered:
            earlier = {before.tool for before in case.calls[:number]}
            for name, source in sources.items():
                if source.tool not in earlier:
                    sentence = f"{call.tool}.{name} comes from {source.tool}, which is not called before it."
                    yield Finding(case.id, "invalid", sentence)


def _problem(model: Any, arguments: Mapping[str, Any], name: str) -> str | None:
    """Returns what is wrong with one argument, None if nothing is."""
    try:
        model.model_validate(arguments)
    except ValidationError as error:
        return next((str(found["msg"]) for found in error.errors() if found["loc"][:1] == (name,)), None)
    return None


def _first_arguments(call: ExpectedCall) -> dict[str, Any]:
    return {name: wanted.any_of[0] for name, wanted in (call.arguments or {}).items() if wanted.any_of is not None}


def _unpassable(case: Case, domain: Domain) -> Iterator[Finding]:
    """Yields why the expected answer, given word for word, does not execute or does not pass."""
    if case.list_name not in ("argument_extraction", "multi_tool_chains"):
        return
    if any(call.arguments is None and domain.tool(call.tool).parameters()["required"] for call in case.calls):
        # The case leaves the arguments open: there is nothing to execute.
        return
    backend = case_backend(domain, case)
    executed: list[Executed] = []
    states = []
    for turn, call in enumerate(case.calls):
        arguments = _first_arguments(call)
        for name, source in (call.sources or {}).items():
            results = [done.result for done in executed if done.attempt.name == source.tool]
            if not results or source.field not in results[-1]:
                sentence = f"{source.tool} returns no {source.field}, from which {call.tool}.{name} is to come."
                yield Finding(case.id, "not executable", sentence)
                return
            arguments[name] = results[-1][source.field]
        before = backend.snapshot()
        refusal: ToolError | None = None
        try:
            result: Mapping[str, Any] = backend.execute(call.tool, arguments)
        except ToolError as error:
            result, refusal = error.as_result(), error
        single = case.list_name == "argument_extraction"
        if refusal is not None and not (single and refusal.status != 400):
            # What is named may be missing in the fixture; then the case passes, but its state proves nothing.
            missing = refusal.status == _NOT_FOUND
            sentence = f"{call.tool} is refused: {refusal}."
            yield Finding(case.id, "missing" if missing else "not executable", sentence, is_error=not missing)
            if not missing:
                return
        attempt = Attempt(call.tool, "", arguments)
        status = refusal.status if refusal is not None else None
        executed.append(
            Executed(attempt, turn, result, status is not None, status == _NOT_FOUND, backend.snapshot() != before)
        )
        states.append(backend.snapshot())
    answers = tuple(Answer((done.attempt,), "") for done in executed)
    ending = (Answer((), "Done."),) if case.list_name == "multi_tool_chains" else ()
    score = score_case(
        # One call a turn: the order of parallel calls is free.
        case,
        Conversation((*answers, *ending), tuple(executed), tuple(states)),
        tool_schemas(domain),
        destructive=destructive_tools(domain),
        replay=replay_on(domain, case),
    )
    if not score.passed:
        said = " ".join(fault.sentence for fault in score.faults)
        yield Finding(case.id, "not passable", f"The expected answer itself does not pass: {said}")


def _asked(case: Case) -> tuple[str, ...]:
    earlier = [str(message.get("content")) for message in case.messages]
    return (normal(case.input), str(case.now), case.fixture, *earlier)


def _repeated(cases: Sequence[Case]) -> Iterator[Finding]:
    groups: dict[tuple[str, ...], list[Case]] = defaultdict(list)
    for case in cases:
        groups[_asked(case)].append(case)
    for group in groups.values():
        for first, other in combinations(group, 2):
            tools = [[call.tool for call in case.calls] for case in (first, other)]
            if first.list_name == other.list_name and first.calls == other.calls:
                yield Finding(other.id, "repeated", f"It asks the same as {first.id}: {other.input!r}.")
            elif first.list_name == other.list_name or tools[0] != tools[1]:
                sentence = f"It asks the same as {first.id} and expects another answer: {other.input!r}."
                yield Finding(other.id, "contradicted", sentence)


def _near(cases: Sequence[Case]) -> Iterator[Finding]:
    for list_name in dict.fromkeys(case.list_name for case in cases):
        own = [case for case in cases if case.list_name == list_name]
        pieces = [(case, _pieces(normal(case.input))) for case in own]
        for (first, ours), (other, theirs) in combinations(pieces, 2):
            shorter, longer = sorted((len(ours), len(theirs)))
            if shorter < NEAR * longer:
                continue
            share = len(ours & theirs) / len(ours | theirs)
            if share >= NEAR and _asked(first) != _asked(other):
                sentence = f"It is nearly {first.id}: {other.input!r} and {first.input!r}."
                yield Finding(other.id, "near-duplicate", sentence, is_error=False)


def _pieces(text: str) -> frozenset[str]:
    padded = f"  {text} "
    return frozenset(padded[start : start + 3] for start in range(len(padded) - 2))
