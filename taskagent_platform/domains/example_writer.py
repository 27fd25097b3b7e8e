"""Writes training examples: phrasings filled in, executed on the domain's backend and answered."""

import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from taskagent_platform.domains.base import Backend, Example, Message, Tool, ToolError
from taskagent_platform.domains.phrasing import (
    CallTemplate,
    Result,
    Slot,
    Template,
    Text,
    Turn,
    Value,
    read_templates,
    read_values,
)

Done = tuple[str, dict[str, Any], dict[str, Any]]
"""A call that was executed: tool, arguments, result."""
_LETTERS = re.compile(r"[a-z]{5,}")
COMBINED = "combined"
"""The kind of example that asks for several unrelated things: short requests for one call each, joined."""
_SHORT = 6
"""Words of a request that is joined with others, its slots counted as one."""
_JOINTS = (" and ", " and ", ", and ", " and also ", ", then ", "; ", ". ", ". Also, ", ", plus ", ", also ")
_SHARES_OF_CLAUSES = (0.6, 0.28, 0.12)
"""How many requests get no, one or two more attributes."""
_SHARES_OF_JOINED = (0.45, 0.38, 0.17)
"""How many joined requests ask for two, three or four calls."""
_DATED = frozenset({"date", "when", "onday", "at", "day", "range"})
_JOINTS_OF_SENTENCES = (" ", " Also, ", " And ", " Then ")


@dataclass(frozen=True)
class Filled:
    """A filled slot.

    Attributes:
        text: what the user writes.
        value: what it means.
        parts: the parts of what it means, for example of a span.
        note: what the assistant notes down before the call that needs it: the prompt's line that gives the value. A
            small model copies far better than it looks up, and the note makes looking up a copy: once it has written
            the user's word, the prompt shows what follows.
    """

    text: str
    value: str
    parts: dict[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class _Style:
    """How one user types: applied to the words of the template, and its case to the values too."""

    opener: str
    closer: str
    lower: bool
    upper: bool
    capital: bool
    bare_end: bool
    slip: bool
    quote: str


class ExampleWriter(ABC):
    """Writes one example: fills the slots, sets up a backend that fits, executes and answers.

    A domain subclasses it and says what fills a slot, what the backend holds and how a result is answered.

    Attributes:
        phrasings: the folder of the domain's phrasing files; their values (openers, closers and the domain's own)
            are in its folder ``values``.
        tools: the domain's tools.
        mixes: for each source, how often each kind of example is drawn. A kind is a phrasing file; the file of a
            tool is two kinds, its calls with one argument (or none), and with ``+`` those with more. The kind
            ``COMBINED`` joins short requests of the tools' files.
        shares_answered: for each kind, how many examples go on from the last call to its result and the final
            answer; ``single`` stands for every example of one turn and at most one call, unless the call's tool has
            a share of its own.
        shares_missing: for each kind, how many examples name something that does not exist.
        rng: the source of all choices.
        now: when the conversation takes place.
    """

    phrasings: ClassVar[Path]
    tools: ClassVar[tuple[Tool, ...]]
    mixes: ClassVar[Mapping[str, Mapping[str, float]]]
    shares_answered: ClassVar[Mapping[str, float]]
    shares_missing: ClassVar[Mapping[str, float]] = {}

    def __init__(self, rng: random.Random, now: datetime) -> None:
        self.rng = rng
        self.now = now
        self.filled: dict[str, Filled] = {}
        self.results: list[dict[str, Any]] = []
        self._style = self._draw_style()

    @classmethod
    def generate(cls, source: str, count: int, seed: int, moments: Sequence[datetime]) -> Iterator[Example]:
        """Yields ``count`` different examples of a source; the i-th takes place at ``moments[i % len(moments)]``.

        Raises:
            KeyError: there is no such source.
        """
        mix = cls.mixes[source]
        chooser = random.Random(f"{seed}/{source}")
        decks = {kind: cls._deck(kind, chooser) for kind in mix}
        seen: set[str] = set()
        made = 0
        attempt = 0
        while made < count:
            kind = chooser.choices(tuple(mix), tuple(mix.values()))[0]
            template = next(decks[kind])
            attempt += 1
            rng = random.Random(f"{seed}/{source}/{attempt}")
            example = cls(rng, moments[made % len(moments)])._write(template, source, kind, seed)
            key = "\n".join(message["content"] for message in example.messages if message["role"] == "user").casefold()
            if key not in seen:
                seen.add(key)
                made += 1
                yield example

    @classmethod
    def templates(cls, name: str) -> tuple[Template, ...]:
        """Returns the templates of one phrasing file."""
        return _templates(cls.phrasings / f"{name}.txt")

    @classmethod
    def values(cls, name: str) -> tuple[str, ...]:
        """Returns the values of one file of the folder ``values``."""
        return values(cls.phrasings / "values" / f"{name}.txt")

    @classmethod
    def _deck(cls, kind: str, rng: random.Random) -> Iterator[Template]:
        """Deals the templates of a kind in random order; the shorter half twice before any other comes again.

        People mostly ask in few words, and whoever writes phrasings down looks for unusual ones.
        """
        if kind == COMBINED:
            yield from cls._combinations(rng)
        name = kind.removesuffix("+")
        found = [
            template
            for template in cls.templates(name)
            if all(tool.name != name for tool in cls.tools) or _is_rich(template) == kind.endswith("+")
        ]
        found.sort(key=_words)
        dealt = [*found, *found[: len(found) // 2]]
        while True:
            yield from rng.sample(dealt, len(dealt))

    @classmethod
    def _combinations(cls, rng: random.Random) -> Iterator[Template]:
        """Joins two to four short requests for one call each into one for all of them."""
        short = {
            tool.name: [template for template in cls.templates(tool.name) if _words(template) <= _SHORT]
            for tool in cls.tools
        }
        names = [name for name, found in short.items() if found]
        while True:
            count = rng.choices((2, 3, 4), _SHARES_OF_JOINED)[0]
            parts = [cls.with_clauses(rng.choice(short[rng.choice(names)]), rng) for _ in range(count)]
            # Of two that ask for the same without any value, one would be the other's echo.
            echoes = [part.calls[0].tool for part in parts if not any(map(_is_slot, part.turns[0].request))]
            if len(set(echoes)) == len(echoes):
                yield _join(parts, rng)

    @classmethod
    def with_clauses(cls, template: Template, rng: random.Random) -> Template:
        """Returns a request for one call, sometimes with one or two more attributes from its tool's clauses."""
        calls = template.calls
        clauses = f"clauses_{calls[0].tool}" if len(calls) == 1 and len(template.turns) == 1 else ""
        if not clauses or not (cls.phrasings / f"{clauses}.txt").exists():
            return template
        for letter in "xy"[: rng.choices((0, 1, 2), _SHARES_OF_CLAUSES)[0]]:
            template = _with_clause(template, rng.choice(cls.templates(clauses)), letter)
        return template

    @abstractmethod
    def system_prompt(self) -> str:
        """Returns the system message."""

    @abstractmethod
    def fill(self, slot: Slot) -> Filled:
        """Draws a filling for a slot. Raises KeyError for a kind that nobody defined."""

    @abstractmethod
    def state(self, template: Template, *, complete: bool) -> dict[str, Any]:
        """Returns the state of a backend before the conversation; the slots are filled.

        Args:
            template: what will be asked.
            complete: all that the calls name exists; otherwise what they name first does not.
        """

    @abstractmethod
    def backend(self, state: dict[str, Any]) -> Backend:
        """Returns a backend in that state."""

    @abstractmethod
    def answer(self, done: Sequence[Done]) -> str:
        """Returns the assistant's last words in a turn, after its calls."""

    def argument(self, name: str, meant: str) -> str:
        """Returns an argument's value from what the template says of it."""
        return meant

    def result(self, name: str, value: Any) -> Any:
        """Returns an argument's value from the value of an earlier result."""
        return value

    def arguments(self, call: CallTemplate, entry: int = 0) -> dict[str, Any]:
        """Returns the call's arguments in the schema's order, for one entry of what an earlier call listed."""
        written: dict[str, Any] = {}
        for name, value in call.arguments.items():
            if isinstance(value, Result):
                named = self.mean((value.named,)) if value.named else None
                written[name] = self.result(name, value.of(self.results, entry if value.each else 0, named))
            elif isinstance(value, list):
                written[name] = [self.mean(item) for item in value]
            else:
                written[name] = self.argument(name, self.mean(value))
        tool = next(tool for tool in self.tools if tool.name == call.tool)
        return {name: written[name] for name in tool.arguments.model_fields if name in written}

    def _times(self, call: CallTemplate) -> int:
        """Returns how often a call is made: once, or for each entry of what an earlier call listed."""
        return call.each.entries(self.results) if call.each else 1

    def mean(self, value: Text) -> str:
        """Returns what a text of the calls' side means: the values of its slots."""

        def piece(part: str | Slot) -> str:
            if isinstance(part, str):
                return part
            filled = self.filled[part.key]
            return filled.parts[part.part] if part.part else filled.value

        return "".join(map(piece, value))

    def _write(self, template: Template, source: str, kind: str, seed: int) -> Example:
        if kind != COMBINED:
            template = self.with_clauses(template, self.rng)
        for turn in template.turns:
            for slot in turn.request:
                if isinstance(slot, Slot) and slot.key not in self.filled:
                    self.filled[slot.key] = self._cased(self.fill(slot))
        form = "single" if len(template.calls) <= 1 and len(template.turns) == 1 else kind
        shares = self.shares_answered
        own = template.calls[0].tool if form == "single" and template.calls else form
        answered = self.rng.random() < shares.get(own, shares[form])
        missing = form in self.shares_missing and self.rng.random() < self.shares_missing[form]
        backend = self.backend(self.state(template, complete=not missing))
        start = backend.snapshot()
        messages: list[Message] = [{"role": "system", "content": self.system_prompt()}]
        for number, turn in enumerate(template.turns):
            last = number == len(template.turns) - 1
            messages += self._turn(turn, backend, first=number == 0, answered=answered or not last)
        meta = {
            "source": source,
            "pattern": kind,
            "template": f"{template.file}:{template.line}",
            "seed": seed,
            "now": self.now.isoformat(timespec="minutes"),
            "state": start,
        }
        return Example(messages, meta)

    def _turn(self, turn: Turn, backend: Backend, *, first: bool, answered: bool) -> Iterator[Message]:
        yield {"role": "user", "content": self._request(turn.request, dressed=first)}
        if turn.answer is not None:
            yield {"role": "assistant", "content": self._say(turn.answer)}
            return
        done: list[Done] = []
        for number, step in enumerate(turn.steps):
            calls = [(call.tool, self.arguments(call, entry)) for call in step for entry in range(self._times(call))]
            ids = [f"call_{len(self.results) + place}" for place in range(1, len(calls) + 1)]
            yield {
                "role": "assistant",
                # Later steps copy from the plan of the turn.
                "content": (self._plan(turn) or None) if number == 0 else None,
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
            if any("error" in result for _, _, result in done):
                break  # what was to follow needs what was not found
        yield {"role": "assistant", "content": self.answer(done)}

    def note(self, argument: str, literal: str) -> str:
        """Returns the note for an argument that the template writes as a bare word."""
        return ""

    def says(self, text: str, argument: str, literal: str) -> bool:
        """Returns whether a piece of a request means the argument that the template writes as a bare word."""
        return False

    def _plan(self, turn: Turn) -> str:
        """Returns what the assistant notes down before the first call of a turn.

        For each call, the optional arguments that were mentioned, in the order of the request, each by what has to be
        looked up for it or by its name, those from earlier results first; several calls are told apart by their tools,
        steps by ``then``, and a call for every entry of a list has ``each`` before it. Deciding what a call needs while
        reading the request is easier for a small model than remembering it at each argument.
        """
        if len(turn.steps) == 1 and len(turn.steps[0]) == 1:
            return self._mentions(turn.steps[0][0], turn.request)
        return " then ".join(
            "; ".join(
                f"{'each ' * bool(call.each)}{call.tool} {self._mentions(call, turn.request)}".rstrip() for call in step
            )
            for step in turn.steps
        )

    def _mentions(self, call: CallTemplate, request: Text) -> str:
        fields = next(tool for tool in self.tools if tool.name == call.tool).arguments.model_fields
        found: list[tuple[int, str]] = []
        for name in (name for name in fields if name in call.arguments):
            value = call.arguments[name]
            texts = [] if isinstance(value, Result) else value if isinstance(value, list) else [value]
            pieces = [piece for text in texts for piece in text]
            notes = [
                self.note(name, piece) if isinstance(piece, str) else self.filled[piece.key].note for piece in pieces
            ]
            said = ", ".join(dict.fromkeys(note for note in notes if note))
            if said or not fields[name].is_required():
                found.append((self._place(name, pieces, request), said or name))
        return ", ".join(dict.fromkeys(text for _, text in sorted(found, key=lambda one: one[0])))

    def _place(self, argument: str, pieces: Sequence[str | Slot], request: Text) -> int:
        """Returns which part of the request first says an argument's value; -1 if none is known to."""
        keys = {piece.key for piece in pieces if isinstance(piece, Slot)}
        words = [piece for piece in pieces if isinstance(piece, str)]
        for at, part in enumerate(request):
            if part.key in keys if isinstance(part, Slot) else any(self.says(part, argument, word) for word in words):
                return at
        return -1

    def _say(self, value: Text) -> str:
        """Returns what the assistant says: slots in the user's words."""
        return "".join(part if isinstance(part, str) else self.filled[part.key].text for part in value)

    def _draw_style(self) -> _Style:
        rng = self.rng
        case = rng.random()
        return _Style(
            opener=rng.choice(self.values("openers")) if rng.random() < 0.2 else "",
            closer=rng.choice(self.values("closers")) if rng.random() < 0.13 else "",
            lower=case < 0.16,
            upper=case > 0.98,
            capital=rng.random() < 0.7,
            bare_end=rng.random() < 0.35,
            slip=rng.random() < 0.1,
            quote=rng.choice(('"', '"', "'", "“")),
        )

    def _cased(self, filled: Filled) -> Filled:
        if not (self._style.lower or self._style.upper):
            return filled
        # Values that are not the user's words (dates, priorities) have no capitals but the T of a moment.
        copied = filled.value.casefold() in filled.text.casefold()
        # Who writes everything in capitals means T-19 still, but no title in capitals.
        kept = not copied or (self._style.upper and any(map(str.isdigit, filled.value)))
        return replace(filled, text=filled.text.lower(), value=filled.value if kept else filled.value.lower())

    def _request(self, request: Text, *, dressed: bool) -> str:
        style = self._style
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
        return written.lower() if style.lower else written.upper() if style.upper else written


def execute(backend: Backend, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Executes a call and returns its result, an error included, as the model sees it."""
    try:
        return backend.execute(tool, arguments)
    except ToolError as error:
        return error.as_result()


def dump(value: dict[str, Any]) -> str:
    """Returns JSON as calls and results carry it."""
    return json.dumps(value, ensure_ascii=False)


def misspell(text: str, rng: random.Random) -> str:
    """Returns the text with one typing slip in a lower-case word of five or more letters, if it has one."""
    words = list(_LETTERS.finditer(text))
    if not words:
        return text
    word = rng.choice(words)
    at = rng.randrange(word.start() + 1, word.end() - 1)
    slip = rng.random()
    if slip < 0.4:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    if slip < 0.7:
        return text[:at] + text[at + 1 :]
    return text[:at] + text[at] + text[at:]


@cache
def values(path: Path) -> tuple[str, ...]:
    """Returns the values of a file, one a line."""
    return tuple(read_values(path))


@cache
def _templates(path: Path) -> tuple[Template, ...]:
    return tuple(read_templates(path))


def _words(template: Template) -> int:
    """Returns the words of a template's requests, a slot counted as one."""
    return sum(
        len("".join("slot" if isinstance(piece, Slot) else piece for piece in turn.request).split())
        for turn in template.turns
    )


def _join(parts: Sequence[Template], rng: random.Random) -> Template:
    """Joins requests for one call each into one request for all the calls, made in the same turn."""
    request: list[str | Slot] = []
    calls = []
    for number, part in enumerate(parts):
        letter = "abcd"[number]
        pieces = [_lettered(piece, letter) for piece in part.turns[0].request]
        if number:
            end = request[-1]
            if isinstance(end, str) and end.endswith((".", ":")):
                request[-1] = end = end[:-1]
            whole = isinstance(end, str) and end.endswith(("?", "!"))
            last = number == len(parts) - 1
            joint = rng.choice(_JOINTS_OF_SENTENCES) if whole else rng.choice(_JOINTS) if last else ", "
            request.append(joint)
            if isinstance(pieces[0], str) and not joint.rstrip().endswith(".") and not pieces[0].startswith("I"):
                pieces[0] = pieces[0][:1].lower() + pieces[0][1:]
        request += pieces
        call = part.calls[0]
        arguments = {name: _lettered_value(value, letter) for name, value in call.arguments.items()}
        calls.append(CallTemplate(call.tool, arguments))
    joined = Turn(tuple(request), (tuple(calls),))
    return Template((joined,), "+".join(f"{part.file}:{part.line}" for part in parts), 0)


def _with_clause(template: Template, clause: Template, letter: str) -> Template:
    """Adds a clause's attributes to a request for one call; the same template if it has them, or has no room."""
    turn, call = template.turns[0], template.calls[0]
    extra = clause.calls[0].arguments
    pieces = [_lettered(piece, letter) for piece in clause.turns[0].request]
    request = list(turn.request)
    kinds = {piece.kind for piece in request if isinstance(piece, Slot)}
    end = request[-1]
    mark = end[-1] if isinstance(end, str) and end[-1:] in "?!." else ""
    new_sentence = isinstance(pieces[0], str) and pieces[0].startswith((".", "?"))
    if (
        set(extra) & set(call.arguments)
        or (kinds & _DATED and any(isinstance(piece, Slot) and piece.kind in _DATED for piece in pieces))
        or (mark and new_sentence)
        or (isinstance(end, str) and end.rstrip().endswith(":"))
    ):
        return template
    if mark:
        request[-1] = str(end)[:-1]
        pieces.append(mark)
    arguments = {**call.arguments, **{name: _lettered_value(value, letter) for name, value in extra.items()}}
    joined = replace(turn, request=(*request, *pieces), steps=((replace(call, arguments=arguments),),))
    return replace(template, turns=(joined,))


def _is_slot(piece: str | Slot) -> bool:
    return isinstance(piece, Slot)


def _lettered(piece: str | Slot, letter: str) -> str | Slot:
    """Returns the piece; a slot as a draw of its own."""
    return piece if isinstance(piece, str) else replace(piece, draw=letter + piece.draw)


def _lettered_value(value: Value, letter: str) -> Value:
    """Returns an argument's value with its slots as draws of their own."""
    if isinstance(value, list):
        return [tuple(_lettered(piece, letter) for piece in item) for item in value]
    return value if isinstance(value, Result) else tuple(_lettered(piece, letter) for piece in value)


def _is_rich(template: Template) -> bool:
    return len(template.calls[0].arguments) > 1
