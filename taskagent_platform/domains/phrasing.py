"""Request templates: one a line, with slots, and the calls that answer them.

A line reads ``request => calls``, for instance::

    add {title} to my list, due {date} => create_task(title={title}, due_date={date})

Calls are joined by ``&`` (made in the same turn) or ``;`` (made after the earlier results). A value is a slot, a
bare or quoted literal, a list, or the result of an earlier call of the same line: ``@1.project_id``,
``@1.tasks.task_id`` of the only entry of a list, ``@1.events{event}.starts_at`` of the entry that a slot's value
names, or ``@1.tasks*.task_id`` for a call that is made for every entry; no later call of the line refers to a result.
``"text"`` instead of calls is an answer without a tool. ``||`` separates the turns of a longer conversation.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskagent_platform.errors import PlatformError

_SLOT = re.compile(r"\{([A-Za-z]+)(\d?)((?:\.[a-z]+)?)\}")
_CALL = re.compile(r"([a-z_]+)\((.*)\)", re.DOTALL)
_RESULT = re.compile(r"@(\d)\.([a-z_]+)(?:(\*|\{[A-Za-z]+\d?\})?\.([a-z_]+))?")


@dataclass(frozen=True)
class Slot:
    """A place in a request that a value fills: its kind, which draw of it, and the part of the value meant."""

    kind: str
    draw: str = ""
    part: str = ""

    @property
    def key(self) -> str:
        """What identifies the draw: slots with the same key hold the same value."""
        return self.kind + self.draw


@dataclass(frozen=True)
class Result:
    """The value of a field in the result of an earlier call, counted from 1 over the whole conversation.

    ``tasks.task_id`` is the field ``task_id`` of one entry of the list ``tasks``: of the first, or of the one that
    the value of the slot ``named`` stands in. With ``each`` the call is made once for every entry.
    """

    call: int
    field: str
    each: bool = False
    named: Slot | None = None

    def entries(self, results: Sequence[dict[str, Any]]) -> int:
        """Returns how many entries the list has.

        Raises:
            LookupError: there is no such list, or nothing in it.
        """
        name = self.field.partition(".")[0]
        if count := len(results[self.call - 1][name]):
            return count
        raise LookupError(f"{name} is empty")

    def of(self, results: Sequence[dict[str, Any]], entry: int = 0, named: str | None = None) -> Any:
        """Returns the value, of the given entry or of the one in which ``named`` stands.

        Raises:
            LookupError: there is no such field or entry.
        """
        value: Any = results[self.call - 1]
        for name in self.field.split("."):
            if isinstance(value, list):
                found = value if named is None else [one for one in value if named in one.values()]
                value = found[entry]
            value = value[name]
        return value


Piece = str | Slot
Text = tuple[Piece, ...]
"""Literal text and slots, in order."""
Value = Text | Result | list[Text]
"""What an argument is made from; a list of texts stands for a JSON list."""


@dataclass(frozen=True)
class CallTemplate:
    """A call with its arguments."""

    tool: str
    arguments: dict[str, Value]

    @property
    def results(self) -> list[Result]:
        """The arguments that are taken from results."""
        return [value for value in self.arguments.values() if isinstance(value, Result)]

    @property
    def each(self) -> Result | None:
        """The list for whose every entry the call is made; None for a call made once."""
        return next((value for value in self.results if value.each), None)


@dataclass(frozen=True)
class Turn:
    """One user turn: the request, and either steps of parallel calls or an answer in words."""

    request: Text
    steps: tuple[tuple[CallTemplate, ...], ...] = ()
    answer: Text | None = None


@dataclass(frozen=True)
class Template:
    """A conversation of one or more turns, and the file and line it was written in."""

    turns: tuple[Turn, ...]
    file: str
    line: int

    @property
    def calls(self) -> tuple[CallTemplate, ...]:
        """All calls in order."""
        return tuple(call for turn in self.turns for step in turn.steps for call in step)


def read_templates(path: Path) -> list[Template]:
    """Reads a phrasing file.

    Raises:
        PlatformError: a line cannot be read; names file, line and what is wrong.
    """
    return list(_read(path))


def _read(path: Path) -> Iterator[Template]:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            turns = tuple(_turn(part) for part in line.split(" || "))
        except ValueError as error:
            raise PlatformError(f"{path.name}, line {number}: {error}: {line}") from None
        known = {slot.key for turn in turns for slot in turn.request if isinstance(slot, Slot)}
        for slot in (s for turn in turns for s in _slots(turn)):
            if slot.key not in known:
                raise PlatformError(f"{path.name}, line {number}: {{{slot.key}}} is not in the request: {line}")
        yield Template(turns, path.name, number)


def read_values(path: Path) -> list[str]:
    """Reads a file of values, one a line; empty lines and lines that start with ``#`` do not count."""
    return [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]


def text(source: str) -> Text:
    """Splits literal text from slots."""
    pieces: list[Piece] = []
    end = 0
    for match in _SLOT.finditer(source):
        if match.start() > end:
            pieces.append(source[end : match.start()])
        pieces.append(Slot(match[1], match[2], match[3].removeprefix(".")))
        end = match.end()
    if end < len(source):
        pieces.append(source[end:])
    return tuple(pieces)


def _turn(source: str) -> Turn:
    request, arrow, answer = source.partition(" => ")
    if not arrow:
        raise ValueError("there is no ` => `")
    answer = answer.strip()
    if answer.startswith('"'):
        return Turn(text(request.rstrip()), answer=text(answer[1:].removesuffix('"')))
    steps = tuple(tuple(_call(call) for call in _split(step, "&")) for step in _split(answer, ";"))
    return Turn(text(request.rstrip()), steps)


def _call(source: str) -> CallTemplate:
    match = _CALL.fullmatch(source)
    if match is None:
        raise ValueError(f"not a call: {source!r}")
    arguments = {}
    for part in _split(match[2], ","):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"not an argument: {part!r}")
        arguments[name.strip()] = _value(value.strip())
    return CallTemplate(match[1], arguments)


def _value(source: str) -> Value:
    if source.startswith("["):
        return [text(item.strip('"')) for item in _split(source[1:-1], ",")]
    if match := _RESULT.fullmatch(source):
        call, outer, which, inner = match.groups()
        named = next((piece for piece in text(which or "") if isinstance(piece, Slot)), None)
        return Result(int(call), f"{outer}.{inner}" if inner else outer, which == "*", named)
    if source.startswith("@"):
        forms = "@1.field, @1.list.field, @1.list*.field or @1.list{slot}.field"
        raise ValueError(f"not a result: {source!r}; write {forms}")
    return text(source[1:-1] if source[:1] == source[-1:] == '"' else source)


def _split(source: str, separator: str) -> list[str]:
    """Splits at a separator outside quotes and brackets."""
    parts, depth, quoted = [""], 0, False
    for char in source:
        quoted ^= char == '"'
        depth += 0 if quoted else (char in "([{") - (char in ")]}")
        if char == separator and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _slots(turn: Turn) -> Iterator[Slot]:
    for call in (call for step in turn.steps for call in step):
        for value in call.arguments.values():
            if isinstance(value, Result):
                yield from [value.named] if value.named else []
                continue
            texts = value if isinstance(value, list) else [value]
            yield from (piece for part in texts for piece in part if isinstance(piece, Slot))
    yield from (piece for piece in turn.answer or () if isinstance(piece, Slot))
