"""What requests have in common: the tools they need, the arguments they give, and how many calls they take."""

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, NamedTuple

from taskagent_platform.data.jsonl import Record

Dimension = Literal["tool", "argument", "calls", "slice"]


class Pattern(NamedTuple):
    """One thing that requests can have in common.

    Attributes:
        dimension: a tool, an argument of a tool, a number of calls, or a slice of the suites.
        value: ``create_task``, ``create_task.due_date``, ``3``, ``typos``.
    """

    dimension: Dimension
    value: str

    def __str__(self) -> str:
        """Returns what a reader calls it."""
        if self.dimension == "calls":
            return {"0": "no call", "1": "one call"}.get(self.value, f"{self.value} calls")
        return f"{self.dimension} {self.value}"


def patterns_of_calls(calls: Sequence[tuple[str, Collection[str]]]) -> set[Pattern]:
    """Returns the patterns of one request: of the calls that it takes, each a tool and the names of its arguments."""
    found = {Pattern("calls", str(len(calls)))}
    for tool, arguments in calls:
        found.add(Pattern("tool", tool))
        found |= {Pattern("argument", f"{tool}.{name}") for name in arguments}
    return found


def patterns_of(record: Record) -> set[Pattern]:
    """Returns the patterns of a training example, of all its user's turns together."""
    found: set[Pattern] = set()
    calls: list[tuple[str, Collection[str]]] = []
    turns = 0
    for message in record["messages"]:
        if message["role"] == "user":
            found |= patterns_of_calls(calls) if turns else set()
            calls, turns = [], turns + 1
        for call in message.get("tool_calls") or []:
            calls.append((call["function"]["name"], list(json.loads(call["function"]["arguments"]))))
    return found | patterns_of_calls(calls)


def count_patterns(records: Iterable[Record]) -> dict[Pattern, int]:
    """Counts the examples of each pattern."""
    counts: dict[Pattern, int] = {}
    for record in records:
        for pattern in patterns_of(record):
            counts[pattern] = counts.get(pattern, 0) + 1
    return counts
