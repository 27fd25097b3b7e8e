"""Our scorer beside BFCL's own checker, on the benchmark's right answers and on mutations of them.

After a change of the scorer or of BFCL's version, `python -m taskagent_platform_tests.evaluation.bfcl_agreement`
rewrites the list of disagreements; a new kind of disagreement is left without a reason there, which the test refuses.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from taskagent_platform.evaluation.answer import Answer, Attempt, ToolSchemas, read_answer
from taskagent_platform.evaluation.bfcl import PACKAGE, Bfcl, BfclAnswer, BfclCase, install_bfcl
from taskagent_platform.evaluation.scoring import Conversation, Executed, Score, score_case
from taskagent_platform.evaluation.suite import Case, ExpectedCall, ExpectedValue
from taskagent_platform.settings import load_settings

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple")
FILE = Path(__file__).with_name("bfcl_disagreements.json")

Call = tuple[str, dict[str, Any]]


class Task(NamedTuple):
    """A case of BFCL in our terms: its expected calls and the schemas of its tools."""

    case: BfclCase
    calls: tuple[ExpectedCall, ...]
    tools: ToolSchemas


class Variant(NamedTuple):
    """An answer to a task: the right one or a mutation of it, with arguments as text."""

    mutation: str
    task: Task
    calls: tuple[tuple[str, str], ...]


class Disagreement(NamedTuple):
    """An answer that one scorer takes for right and the other does not."""

    mutation: str
    ours: str
    bfcl: str
    case: str


def task_of(case: BfclCase) -> Task:
    """Translates a case: several acceptable values, `""` for an argument that may be left out, dots as underscores.

    As in BFCL's checker, an argument that the schema requires may not be left out whatever the answer says, and one
    that it does not declare may not be given.
    """
    tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in case.tools}
    calls = []
    for answer in case.right:
        [(name, arguments)] = answer.items()
        tool = re.sub(r"\.", "_", name)
        properties, required = tools[tool]["properties"], tools[tool].get("required", [])
        expected = {
            key: _expected(values, properties[key], required=key in required)
            for key, values in arguments.items()
            if key in properties
        }
        calls.append(ExpectedCall(tool, expected))
    return Task(case, tuple(calls), tools)


def _expected(values: Sequence[Any], schema: Mapping[str, Any], *, required: bool) -> ExpectedValue:
    given = [value for value in values if value != ""]
    choices = [choice for value in given for choice in _choices(value)]
    if "" in values and (schema.get("type") == "string" or not given):
        choices.append("")  # BFCL takes the empty text itself, too
    return ExpectedValue(tuple(choices), optional="" in values and not required)


def _choices(value: Any) -> Iterator[Any]:
    """Yields the values that one acceptable value of BFCL stands for: it lists alternatives for each key of objects."""
    if isinstance(value, dict):
        options = []
        for key, alternatives in value.items():
            options.append(
                [(key, item) for item in alternatives] if isinstance(alternatives, list) else [(key, alternatives)]
            )
        for chosen in product(*options):
            yield {key: item for key, item in chosen if item != ""}
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for items in product(*(list(_choices(item)) for item in value)):
            yield list(items)
    else:
        yield value


def score(task: Task, calls: Iterable[tuple[str, str]]) -> Score:
    """Scores an answer with our scorer; several calls as parallel ones, each of which leaves its mark in the state."""
    given = [{"function": {"name": name, "arguments": text}} for name, text in calls]
    answer = read_answer({"content": "" if given else "I cannot do that.", "tool_calls": given}, task.tools)
    single = not task.case.category.startswith("parallel")
    case = Case(
        task.case.id, "argument_extraction" if single else "multi_tool_chains", "do it", "", task.calls, False,
        datetime(2024, 1, 15, 9), "default", (),
    )  # fmt: skip
    if single:
        return score_case(case, Conversation((answer,)), task.tools)
    if answer.is_malformed or not answer.calls:
        return score_case(case, Conversation((answer,)), task.tools, replay=_journal)
    executed = tuple(Executed(call, 0, {"done": True}, changed=True) for call in answer.calls)
    conversation = Conversation((answer, Answer((), "Done.")), executed, tuple(_journal([answer.calls])))
    return score_case(case, conversation, task.tools, replay=_journal)


def _journal(turns: Sequence[Sequence[Attempt]]) -> list[Mapping[str, Any]]:
    """Executes calls on a backend whose state is the list of them."""
    calls: list[Any] = []
    states: list[Mapping[str, Any]] = []
    for turn in turns:
        calls += [(call.name, call.arguments) for call in turn]
        states.append({"calls": list(calls)})
    return states


def variants(task: Task) -> Iterator[Variant]:
    """Yields the right answers of a task and every mutation that it allows."""
    right = [(call.tool, _arguments(call, first=True, optionals=False)) for call in task.calls]
    yield _variant("right", task, right)
    yield _variant("right_with_optionals", task, [(c.tool, _arguments(c, first=True)) for c in task.calls])
    yield _variant("right_other_values", task, [(c.tool, _arguments(c, first=False)) for c in task.calls])
    for name, mutate in MUTATIONS.items():
        changed = mutate(copy.deepcopy(right), task)
        if changed is not None:
            yield _variant(name, task, changed)
    [*others, (name, arguments)] = _variant("", task, right).calls
    yield Variant("cut_arguments", task, (*others, (name, arguments[:-1])))
    yield Variant("arguments_no_object", task, (*others, (name, f"[{arguments}]")))


def _variant(mutation: str, task: Task, calls: Iterable[Call]) -> Variant:
    return Variant(mutation, task, tuple((name, json.dumps(arguments)) for name, arguments in calls))


def _arguments(call: ExpectedCall, *, first: bool, optionals: bool = True) -> dict[str, Any]:
    chosen = {}
    for name, wanted in (call.arguments or {}).items():
        given = [value for value in wanted.any_of or () if value != ""]
        if given and (optionals or not wanted.optional):
            chosen[name] = given[0 if first else -1]
    return chosen


Mutation = Callable[[list[Call], Task], list[Call] | None]


def _on_value(applies: Callable[[Any], bool], change: Callable[[Any], Any], *, unlike_right: bool = False) -> Mutation:
    """Changes the first argument that a condition holds for.

    Args:
        applies: the condition.
        change: returns the new value.
        unlike_right: change again until the value is none of the acceptable ones.
    """

    def mutate(calls: list[Call], task: Task) -> list[Call] | None:
        for expected, (_, arguments) in zip(task.calls, calls, strict=True):
            for name, value in arguments.items():
                if applies(value):
                    right = (expected.arguments or {})[name].any_of or ()
                    changed = change(value)
                    while unlike_right and changed in right:
                        changed = change(changed)
                    arguments[name] = changed
                    return calls
        return None

    return mutate


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and any(character.isalpha() for character in value)


def _has_space(value: Any) -> bool:
    return isinstance(value, str) and " " in value.strip()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def _rename_tool(calls: list[Call], task: Task) -> list[Call]:
    return [(calls[0][0] + "_now", calls[0][1]), *calls[1:]]


def _other_tool(calls: list[Call], task: Task) -> list[Call] | None:
    others = [name for name in task.tools if name != calls[0][0]]
    return [(others[0], calls[0][1]), *calls[1:]] if others else None


def _drop_required(calls: list[Call], task: Task) -> list[Call] | None:
    for tool, arguments in calls:
        for name in task.tools[tool].get("required", []):
            if name in arguments:
                del arguments[name]
                return calls
    return None


def _drop_last_expected(calls: list[Call], task: Task) -> list[Call] | None:
    for tool, arguments in calls:
        for name in [name for name in arguments if name not in task.tools[tool].get("required", [])]:
            del arguments[name]
            return calls
    return None


def _add_undeclared(calls: list[Call], task: Task) -> list[Call]:
    calls[0][1]["colour_of_the_moon"] = "green"
    return calls


def _add_declared(calls: list[Call], task: Task) -> list[Call] | None:
    for expected, (tool, arguments) in zip(task.calls, calls, strict=True):
        for name, schema in task.tools[tool]["properties"].items():
            if name not in (expected.arguments or {}):
                arguments[name] = {"integer": 77, "number": 77.5, "boolean": True, "array": []}.get(
                    schema["type"], "quite another"
                )
                return calls
    return None


def _rename_argument(calls: list[Call], task: Task) -> list[Call] | None:
    for _, arguments in calls:
        for name in arguments:
            arguments[name + "s"] = arguments.pop(name)
            return calls
    return None


def _empty_optional(calls: list[Call], task: Task) -> list[Call] | None:
    for expected, (tool, arguments) in zip(task.calls, calls, strict=True):
        for name, wanted in (expected.arguments or {}).items():
            if wanted.optional and task.tools[tool]["properties"].get(name, {}).get("type") == "string":
                arguments[name] = ""
                return calls
    return None


def _null_optional(calls: list[Call], task: Task) -> list[Call] | None:
    for expected, (_, arguments) in zip(task.calls, calls, strict=True):
        for name, wanted in (expected.arguments or {}).items():
            if wanted.optional:
                arguments[name] = None
                return calls
    return None


def _other_case_of_choice(calls: list[Call], task: Task) -> list[Call] | None:
    for tool, arguments in calls:
        for name, value in arguments.items():
            if isinstance(value, str) and "enum" in task.tools[tool]["properties"].get(name, {}):
                arguments[name] = value.swapcase()
                return calls
    return None


MUTATIONS: dict[str, Mutation] = {
    "renamed_tool": _rename_tool,
    "other_tool": _other_tool,
    "no_call": lambda calls, task: [],
    "doubled_call": lambda calls, task: [*calls, calls[-1]],
    "missing_call": lambda calls, task: calls[:-1] if len(calls) > 1 else None,
    "reversed_calls": lambda calls, task: calls[::-1] if len(calls) > 1 else None,
    "missing_required": _drop_required,
    "missing_expected": _drop_last_expected,
    "undeclared_argument": _add_undeclared,
    "invented_argument": _add_declared,
    "renamed_argument": _rename_argument,
    "empty_optional": _empty_optional,
    "null_optional": _null_optional,
    "null_argument": _on_value(lambda value: True, lambda value: None),
    "other_text": _on_value(_is_text, lambda value: value + " zebra"),
    "part_of_text": _on_value(_has_space, lambda value: value.split()[0]),
    "text_in_capitals": _on_value(_is_text, str.upper),
    "text_in_spaces": _on_value(_is_text, lambda value: f"  {value} "),
    "text_with_point": _on_value(_is_text, lambda value: value + "."),
    "text_with_question_mark": _on_value(_is_text, lambda value: value + "?"),
    "text_with_hyphens": _on_value(_has_space, lambda value: value.replace(" ", "-")),
    "text_run_together": _on_value(_has_space, lambda value: value.replace(" ", "")),
    "text_in_list": _on_value(_is_text, lambda value: [value]),
    "text_as_number": _on_value(_is_text, lambda value: 7),
    "other_case_of_choice": _other_case_of_choice,
    "other_number": _on_value(_is_number, lambda value: value + 1, unlike_right=True),
    "negative_number": _on_value(lambda value: _is_number(value) and value != 0, lambda value: -value),
    "number_as_text": _on_value(_is_number, str),
    "whole_as_decimal": _on_value(lambda value: _is_number(value) and isinstance(value, int), float),
    "decimal_as_whole": _on_value(lambda value: isinstance(value, float) and value % 1 == 0, int),
    "other_truth": _on_value(lambda value: isinstance(value, bool), lambda value: not value),
    "truth_as_text": _on_value(lambda value: isinstance(value, bool), lambda value: str(value).lower()),
    "truth_as_number": _on_value(lambda value: isinstance(value, bool), int),
    "reversed_list": _on_value(lambda value: _is_list(value) and value != value[::-1], lambda value: value[::-1]),
    "shortened_list": _on_value(_is_list, lambda value: value[:-1]),
    "repeated_item": _on_value(_is_list, lambda value: [*value, value[0]]),
    "other_item": _on_value(_is_list, lambda value: [*value[:-1], "zebra" if isinstance(value[-1], str) else 987]),
    "list_as_text": _on_value(_is_list, json.dumps),
    "object_without_key": _on_value(_is_object, lambda value: dict(list(value.items())[1:])),
    "object_with_key": _on_value(_is_object, lambda value: {**value, "zebra": 1}),
    "object_other_value": _on_value(_is_object, lambda value: {**value, next(iter(value)): "zebra"}),
    "object_as_text": _on_value(_is_object, json.dumps),
}  # fmt: skip


def compare(bfcl: Bfcl, *, every: int = 1) -> tuple[int, list[Disagreement]]:
    """Returns how many answers both scorers judged, and where they differ.

    Args:
        bfcl: BFCL's checker.
        every: take only every n-th case.
    """
    tasks = [task_of(case) for case in bfcl.cases(CATEGORIES)[::every]]
    answers = [variant for task in tasks for variant in variants(task)]
    theirs = bfcl.check(
        BfclAnswer(id=one.task.case.id, category=one.task.case.category, calls=one.calls) for one in answers
    )
    found = []
    for variant, verdict in zip(answers, theirs, strict=True):
        ours = score(variant.task, variant.calls)
        if ours.passed != verdict.valid:
            faults = "+".join(sorted({fault.type for fault in ours.faults})) or "right"
            found.append(Disagreement(variant.mutation, faults, verdict.error_type or "valid", variant.task.case.id))
    return len(answers), found


def grouped(found: Iterable[Disagreement]) -> dict[tuple[str, str, str], list[str]]:
    """Returns the cases of each kind of disagreement."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for one in found:
        groups.setdefault((one.mutation, one.ours, one.bfcl), []).append(one.case)
    return groups


def main() -> None:
    """Rewrites the list, keeping the reasons of the kinds that it has already."""
    kept = json.loads(FILE.read_text()) if FILE.exists() else {"reasons": {}, "disagreements": []}
    reasons = {(e["mutation"], e["ours"], e["bfcl"]): e["reason"] for e in kept["disagreements"]}
    answers, found = compare(install_bfcl(load_settings()))
    entries = [
        {
            "mutation": key[0], "ours": key[1], "bfcl": key[2], "reason": reasons.get(key, ""), "cases": cases,
        }
        for key, cases in grouped(found).items()
    ]  # fmt: skip
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    reasons_text = json.dumps(kept["reasons"], indent=1)
    head = f'{{"package": "{PACKAGE}", "answers": {answers},\n"reasons": {reasons_text},\n'
    FILE.write_text(f'{head}"disagreements": [\n{lines}\n]}}\n')
    print(f"{len(found)} disagreements of {len(entries)} kinds in {answers} answers")


if __name__ == "__main__":
    main()
