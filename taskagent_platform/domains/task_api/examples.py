"""Training examples of the Task API: phrasings filled in, executed on the backend and answered."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from taskagent_platform.domains.base import Example, Message, ToolError
from taskagent_platform.domains.phrasing import (
    CallTemplate,
    Result,
    Slot,
    Template,
    Text,
    Turn,
    read_templates,
    read_values,
)
from taskagent_platform.domains.task_api.answers import answer
from taskagent_platform.domains.task_api.backend import State, TaskApiBackend
from taskagent_platform.domains.task_api.date_words import day_words, minute
from taskagent_platform.domains.task_api.prompt import system_prompt
from taskagent_platform.domains.task_api.tools import TOOLS
from taskagent_platform.domains.task_api.wording import VALUES, Filled, Wording, misspell

PHRASINGS = Path(__file__).parent / "phrasings"
_ORDER = {tool.name: list(tool.arguments.model_fields) for tool in TOOLS}
_LOOKS_LIKE_AN_ID = re.compile(r"\S*\d\S*")

# How often each kind of example is drawn within a source. A kind is a phrasing file, and for single calls whether
# it gives more than one argument.
_MIXES: dict[str, dict[str, float]] = {
    "structured_outputs": {
        "create_task+": 40, "update_task+": 23, "create_reminder+": 15, "list_tasks+": 10, "create_project+": 6,
        "get_calendar+": 6,
    },
    "function_calling": {
        "create_task": 13, "list_tasks": 20, "complete_task": 15, "delete_task": 14, "get_calendar": 13,
        "create_project": 4, "no_tool": 13, "missing": 8,
    },
    "multi_tool": {"chains": 38, "parallel": 47, "corrections": 15},
}  # fmt: skip
SOURCES = tuple(_MIXES)
_SHARE_ANSWERED = {"single": 0.2, "parallel": 0.4, "chains": 0.6, "corrections": 0.4}
"""How many examples of a kind go on from the last call to its result and the final answer."""
_SHARE_MISSING = 0.08
"""How many of those name a task that does not exist."""


@dataclass(frozen=True)
class _Style:
    """How one user types: applied to the words of the template, and its case to the values too."""

    opener: str
    closer: str
    lower: bool
    capital: bool
    bare_end: bool
    slip: bool
    quote: str


def generate(source: str, count: int, seed: int, moments: Sequence[datetime]) -> Iterator[Example]:
    """Yields ``count`` different examples of a source; the i-th takes place at ``moments[i % len(moments)]``.

    Raises:
        KeyError: there is no such source.
    """
    mix = _MIXES[source]
    chooser = random.Random(f"{seed}/{source}")
    decks = {kind: _deck(kind, chooser) for kind in mix}
    seen: set[str] = set()
    made = 0
    attempt = 0
    while made < count:
        kind = chooser.choices(tuple(mix), tuple(mix.values()))[0]
        template = next(decks[kind])
        attempt += 1
        rng = random.Random(f"{seed}/{source}/{attempt}")
        example = _Writer(rng, moments[made % len(moments)]).write(template, source, kind, seed)
        key = "\n".join(message["content"] for message in example.messages if message["role"] == "user").casefold()
        if key not in seen:
            seen.add(key)
            made += 1
            yield example


@cache
def _templates(name: str) -> tuple[Template, ...]:
    return tuple(read_templates(PHRASINGS / f"{name}.txt"))


def _deck(kind: str, rng: random.Random) -> Iterator[Template]:
    """Deals the templates of a kind in random order, all of them before any comes again."""
    name = kind.removesuffix("+")
    found = [t for t in _templates(name) if name not in _ORDER or _is_rich(t) == kind.endswith("+")]
    while True:
        yield from rng.sample(found, len(found))


def _is_rich(template: Template) -> bool:
    return len(template.calls[0].arguments) > 1


class _Writer:
    """Writes one example: fills the slots, sets up a backend that fits, executes and answers."""

    def __init__(self, rng: random.Random, now: datetime) -> None:
        self.rng = rng
        self.now = now
        self.wording = Wording(rng, now)
        self.filled: dict[str, Filled] = {}
        self.results: list[dict[str, Any]] = []
        self.style = self._style()

    def write(self, template: Template, source: str, kind: str, seed: int) -> Example:
        if kind.startswith("create_task") and self.rng.random() < 0.3:
            template = self._with_clause(template)
        for turn in template.turns:
            for slot in turn.request:
                if isinstance(slot, Slot) and slot.key not in self.filled:
                    self.filled[slot.key] = self._cased(self.wording.fill(slot))
        single = len(template.calls) <= 1 and len(template.turns) == 1
        answered = self.rng.random() < _SHARE_ANSWERED["single" if single else kind]
        backend = TaskApiBackend(self.now, "empty")
        backend.load(self._state(template, complete=not (single and self.rng.random() < _SHARE_MISSING)))
        start = backend.snapshot()
        messages: list[Message] = [{"role": "system", "content": system_prompt(self.now)}]
        for number, turn in enumerate(template.turns):
            last = number == len(template.turns) - 1
            messages += self._turn(turn, backend, first=number == 0, answered=answered or not last)
        meta = {
            "source": source,
            "pattern": kind,
            "template": f"{template.file}:{template.line}",
            "seed": seed,
            "now": minute(self.now),
            "state": start,
        }
        return Example(messages, meta)

    def _turn(self, turn: Turn, backend: TaskApiBackend, *, first: bool, answered: bool) -> Iterator[Message]:
        yield {"role": "user", "content": self._request(turn.request, dressed=first)}
        if turn.answer is not None:
            yield {"role": "assistant", "content": self._say(turn.answer)}
            return
        done: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        for number, step in enumerate(turn.steps):
            calls = [(call.tool, self._arguments(call)) for call in step]
            ids = [f"call_{len(self.results) + place}" for place in range(1, len(calls) + 1)]
            yield {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": id_, "type": "function", "function": {"name": tool, "arguments": dump(arguments)}}
                    for id_, (tool, arguments) in zip(ids, calls, strict=True)
                ],
            }
            if not answered and number == len(turn.steps) - 1:
                return
            for id_, (tool, arguments) in zip(ids, calls, strict=True):
                result = execute(backend, tool, arguments)
                self.results.append(result)
                done.append((tool, arguments, result))
                yield {"role": "tool", "tool_call_id": id_, "content": dump(result)}
        yield {"role": "assistant", "content": answer(done, self.rng)}

    def _arguments(self, call: CallTemplate) -> dict[str, Any]:
        """Returns the call's arguments in the schema's order."""
        values: dict[str, Any] = {}
        for name, value in call.arguments.items():
            if isinstance(value, Result):
                values[name] = self.results[value.call - 1][value.field]
            elif isinstance(value, list):
                values[name] = [self._mean(item) for item in value]
            else:
                meant = self._mean(value)
                values[name] = str(day_words(self.now).get(meant, meant)) if name.endswith(("date", "before")) else meant
        return {name: values[name] for name in _ORDER[call.tool] if name in values}

    def _mean(self, value: Text) -> str:
        """Returns what a text of the calls' side means: the values of its slots."""

        def piece(part: str | Slot) -> str:
            if isinstance(part, str):
                return part
            filled = self.filled[part.key]
            return filled.parts[part.part] if part.part else filled.value

        return "".join(map(piece, value))

    def _say(self, value: Text) -> str:
        """Returns what the assistant says: slots in the user's words."""
        return "".join(part if isinstance(part, str) else self.filled[part.key].text for part in value)

    def _with_clause(self, template: Template) -> Template:
        """Adds an attribute that the request for a new task does not have yet."""
        turn = template.turns[0]
        call = template.calls[0]
        used = {slot.key for slot in turn.request if isinstance(slot, Slot)}
        kinds = {slot.kind for slot in turn.request if isinstance(slot, Slot)}
        clause = self.rng.choice(_templates("clauses_create_task"))
        extra = clause.calls[0].arguments
        slots = [slot for slot in clause.turns[0].request if isinstance(slot, Slot)]
        end = turn.request[-1]
        ends_a_sentence = isinstance(end, str) and end.rstrip()[-1:] in "?!.:"
        if (
            ends_a_sentence
            or set(extra) & set(call.arguments)
            or used & {slot.key for slot in slots}
            or (kinds & {"date", "when", "onday", "at"} and "due_date" in extra)
        ):
            return template
        request = turn.request + clause.turns[0].request
        merged = replace(call, arguments={**call.arguments, **extra})
        return replace(template, turns=(replace(turn, request=request, steps=((merged,),)),))

    def _style(self) -> _Style:
        rng = self.rng
        return _Style(
            opener=rng.choice(_wordings("openers")) if rng.random() < 0.16 else "",
            closer=rng.choice(_wordings("closers")) if rng.random() < 0.12 else "",
            lower=rng.random() < 0.16,
            capital=rng.random() < 0.7,
            bare_end=rng.random() < 0.35,
            slip=rng.random() < 0.1,
            quote=rng.choice(('"', '"', "'", "“")),
        )

    def _cased(self, filled: Filled) -> Filled:
        if not self.style.lower:
            return filled
        # Values that are not the user's words (dates, priorities) have no capitals but the T of a moment.
        copied = filled.value.casefold() in filled.text.casefold()
        return Filled(filled.text.lower(), filled.value.lower() if copied else filled.value, filled.parts)

    def _request(self, request: Text, *, dressed: bool) -> str:
        style = self.style
        slip_at = self.rng.randrange(len(request)) if style.slip else -1
        pieces = []
        for number, part in enumerate(request):
            if isinstance(part, Slot):
                pieces.append(self.filled[part.key].text)
            else:
                pieces.append(misspell(part, self.rng) if number == slip_at else part)
        written = "".join(pieces).replace(".m..", ".m.")
        if style.quote != '"':
            closing = "”" if style.quote == "“" else style.quote
            if style.quote == "“" or "'" not in written:
                written = re.sub(r'"([^"]*)"', lambda match: style.quote + match[1] + closing, written)
        if dressed and style.opener and written[:1] not in "\"'“#":
            first_word = written.split(" ", 1)[0]
            keep = first_word.startswith("I") and first_word in ("I", "I'm", "I'd", "I've", "I'll")
            lowered = written if keep or not isinstance(request[0], str) else written[:1].lower() + written[1:]
            written = style.opener + (lowered if not style.opener.rstrip().endswith((".", "!", "?")) else written)
        elif style.capital and not style.lower and isinstance(request[0], str):
            written = written[:1].upper() + written[1:]
        if style.bare_end:
            written = written.rstrip(".")
        elif isinstance(request[-1], Slot) and written[-1:].isalnum() and self.rng.random() < 0.2:
            written += "."
        if dressed and style.closer:
            ended = written[-1:] in "?!"
            written = written.rstrip(".") + (" " + style.closer.lstrip(", ") if ended else style.closer)
        return written.lower() if style.lower else written

    def _state(self, template: Template, *, complete: bool) -> State:
        """Returns a state in which every task and project that the calls name exists, among a few others."""
        rng = self.rng
        tasks: list[dict[str, Any]] = []
        projects: list[dict[str, Any]] = []
        for call in template.calls:
            for name, value in call.arguments.items():
                if name == "task_id" and isinstance(value, tuple) and complete:
                    self._mention(tasks, "task_id", "title", "task", self._mean(value), "titles")
                elif name == "project_id" and isinstance(value, tuple):
                    self._mention(projects, "project_id", "name", "proj", self._mean(value), "names")
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            title = rng.choice(_wordings("titles"))
            self._mention(tasks, "task_id", "title", "task", title[0].upper() + title[1:], "titles")
        for task in tasks:
            task["status"] = "open" if rng.random() < 0.8 else "completed"
            if rng.random() < 0.6:
                task["due_date"] = str(self.now.date() + timedelta(days=rng.randint(-5, 14)))
            if rng.random() < 0.5:
                task["priority"] = rng.choice(("low", "medium", "high"))
        if not complete:
            tasks = []
        rng.shuffle(tasks)
        events = []
        for _ in range(rng.choice((0, 1, 2, 3))):
            start = self.now.replace(hour=rng.randint(8, 18), minute=rng.choice((0, 30)))
            start += timedelta(days=rng.randint(0, 9))
            end = start + timedelta(minutes=rng.choice((30, 60)))
            events.append(
                {"title": rng.choice(_wordings("events")), "starts_at": minute(start), "ends_at": minute(end)}
            )
        if complete:
            self._fit(template, tasks, projects)
        return {"tasks": tasks, "projects": projects, "events": events, "reminders": []}

    def _fit(self, template: Template, tasks: list[dict[str, Any]], projects: list[dict[str, Any]]) -> None:
        """Lets some of the tasks match the filters of the first listing, so that lists are not mostly empty."""
        listing = next((call for call in template.calls if call.tool == "list_tasks"), None)
        if listing is None:
            return
        for task in tasks[: self.rng.randint(0, 4)]:
            for name, value in self._arguments(listing).items():
                if name == "due_before":
                    task["due_date"] = value
                elif name == "project_id":
                    task["project_id"] = projects[0]["project_id"]
                else:
                    task[name] = value

    def _mention(
        self, entries: list[dict[str, Any]], id_name: str, title_name: str, prefix: str, wanted: str, titles: str
    ) -> None:
        if any(wanted in (entry[id_name], entry[title_name]) for entry in entries):
            return
        if _LOOKS_LIKE_AN_ID.fullmatch(wanted):
            entry = {id_name: wanted, title_name: self.rng.choice(_wordings(titles))}
        else:
            taken = {entry[id_name] for entry in entries}
            numbers = (f"{prefix}_{self.rng.randint(1, 400):03d}" for _ in range(100))
            entry = {id_name: next(number for number in numbers if number not in taken), title_name: wanted}
        entries.append(entry)


def execute(backend: TaskApiBackend, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Executes a call and returns its result, an error included, as the model sees it."""
    try:
        return backend.execute(tool, arguments)
    except ToolError as error:
        return error.as_result()


def dump(value: dict[str, Any]) -> str:
    """Returns JSON as calls and results carry it."""
    return json.dumps(value, ensure_ascii=False)


@cache
def _wordings(name: str) -> tuple[str, ...]:
    return tuple(read_values(VALUES / f"{name}.txt"))
