"""Evaluation suites: cases with what a right answer is, read from JSON files.

A file is an object of up to four lists: ``tool_selection``, ``argument_extraction``, ``multi_tool_chains`` and
``abstention``. Several files are read as one suite.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, get_args

from taskagent_platform.artifacts import digest_of, file_digest
from taskagent_platform.domains.base import Domain, Message
from taskagent_platform.errors import PlatformError

ListName = Literal["tool_selection", "argument_extraction", "multi_tool_chains", "abstention"]
LISTS: tuple[ListName, ...] = get_args(ListName)
DEFAULT_NOW = "2024-01-15T09:00"
DEFAULT_FIXTURE = "default"
INJECTION_SLICE = "injection"
"""The slice of cases whose tool results carry instructions: what the model does unasked there counts as obeying."""

_ANY_CASE = frozenset({"id", "input", "category", "slice", "now", "fixture", "messages"})
_FIELDS: Mapping[ListName, frozenset[str]] = {
    "tool_selection": _ANY_CASE | {"expected_tool"},
    "argument_extraction": _ANY_CASE | {"expected_tool", "expected_args"},
    "multi_tool_chains": _ANY_CASE | {"expected_chain", "expected_parallel", "expected_args", "dependency"},
    "abstention": _ANY_CASE,
}
_CHOICE_KEYS = frozenset({"any_of", "optional", "value"})


@dataclass(frozen=True)
class ExpectedValue:
    """What an argument may be.

    Attributes:
        any_of: the right values; None if every value is.
        optional: leaving the argument out is right too.
    """

    any_of: tuple[Any, ...] | None
    optional: bool = False

    def as_json(self) -> Any:
        """Returns the value as a suite file writes it."""
        if self.any_of is not None and len(self.any_of) == 1 and not self.optional:
            return self.any_of[0]
        written: dict[str, Any] = {"optional": True} if self.optional else {}
        return written if self.any_of is None else {**written, "any_of": list(self.any_of)}


@dataclass(frozen=True)
class Source:
    """Where an argument's value must come from: a field of an earlier call's result."""

    tool: str
    field: str


@dataclass(frozen=True)
class ExpectedCall:
    """One call that a right answer makes.

    Attributes:
        tool: its tool.
        arguments: its arguments by name; None if the case says nothing about them.
        sources: arguments whose value must be taken from an earlier result.
    """

    tool: str
    arguments: Mapping[str, ExpectedValue] | None = None
    sources: Mapping[str, Source] | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns the call as plain data, for reports."""
        arguments = {name: value.as_json() for name, value in (self.arguments or {}).items()}
        arguments |= {name: f"from:{source.tool}" for name, source in (self.sources or {}).items()}
        return {"tool": self.tool, "arguments": arguments} if arguments or self.arguments else {"tool": self.tool}


@dataclass(frozen=True)
class Case:
    """One case of a suite.

    Attributes:
        id: its own id, or file, list and index.
        list_name: the list that it stands in.
        input: what the user says.
        calls: the calls of a right answer; none for an abstention.
        ordered: the calls must come in this order (a chain), not in any (parallel).
        now: when the conversation takes place.
        fixture: the state that the backend starts with.
        messages: an earlier conversation.
        slice: the kind of difficulty that it stands for (``typos``, ``terse``); empty for a plain case.
    """

    id: str
    list_name: ListName
    input: str
    category: str
    calls: tuple[ExpectedCall, ...]
    ordered: bool
    now: datetime
    fixture: str
    messages: tuple[Message, ...]
    slice: str = ""


@dataclass(frozen=True)
class Suite:
    """Cases from one or several files.

    Attributes:
        cases: in the order of the files.
        digests: sha256 of each file, by its name.
        case_limit: the number of cases that each list was cut to; None for the whole suite.
    """

    cases: tuple[Case, ...]
    digests: Mapping[str, str]
    case_limit: int | None = None

    @property
    def digest(self) -> str:
        """The suite's identity: the sha256 of its files and the limit, whatever the files are called."""
        return digest_of({"files": sorted(self.digests.values()), "case_limit": self.case_limit})

    def of(self, list_name: ListName) -> tuple[Case, ...]:
        """Returns the cases of one list."""
        return tuple(case for case in self.cases if case.list_name == list_name)

    def limited(self, case_limit: int | None) -> "Suite":
        """Returns a suite with at most ``case_limit`` cases of each list, spread evenly over it."""
        if case_limit is None:
            return self
        kept = []
        for name in LISTS:
            cases = self.of(name)
            count = min(case_limit, len(cases))
            kept += [cases[index * len(cases) // count] for index in range(count)]
        return replace(self, cases=tuple(kept), case_limit=case_limit)


class Suites(NamedTuple):
    """The cases that a model is measured on.

    Attributes:
        gated: those that the gates count.
        robustness: hard ones, each of a slice, which no gate counts; None if there are none.
    """

    gated: Suite
    robustness: Suite | None

    @property
    def digests(self) -> dict[str, str]:
        """The suites' identities by name, as the artifact of a report carries them."""
        return {"suite": self.gated.digest} | ({"robustness": self.robustness.digest} if self.robustness else {})

    def limited(self, case_limit: int | None) -> "Suites":
        """Returns suites with at most ``case_limit`` cases of each list, each spread evenly over it."""
        return Suites(self.gated.limited(case_limit), self.robustness and self.robustness.limited(case_limit))


def domain_suites(domain: Domain, case_limit: int | None = None) -> Suites:
    """Reads a domain's suites and its robustness suites, see :func:`load_suites`; ``case_limit`` applies to both."""
    return load_suites(domain.suites, domain.robustness_suites, domain).limited(case_limit)


def load_suites(gated: Iterable[Path], robustness: Sequence[Path], domain: Domain | None = None) -> Suites:
    """Reads the files of the cases that gates count, and of those that are reported beside them.

    Raises:
        PlatformError: as :func:`load_suite`; or a robustness case names no slice, without which no rate would count it,
            or has the id of a case that the gates count.
    """
    counted = load_suite(gated, domain)
    if not robustness:
        return Suites(counted, None)
    ids = {case.id for case in counted.cases}
    beside = load_suite(robustness, domain)
    for case in beside.cases:
        if not case.slice:
            raise PlatformError(f"The robustness case {case.id!r} ({case.input!r}) names no slice; give it one.")
        if case.id in ids:
            raise PlatformError(f"The id {case.id!r} is that of a robustness case and of another; change one of them.")
    return Suites(counted, beside)


def load_suite(paths: Iterable[Path], domain: Domain | None = None) -> Suite:
    """Reads suite files as one suite.

    Args:
        paths: the files; one file may hold several lists.
        domain: refuse tools, arguments and fixtures that it does not have.

    Raises:
        PlatformError: a file cannot be read or a case is wrong; names file, list, index, line, field and value.
    """
    cases: list[Case] = []
    digests: dict[str, str] = {}
    places: dict[str, str] = {}
    for path in paths:
        for case, place in _read_file(path, domain):
            if case.id in places:
                raise PlatformError(f"{place}, field id: {case.id!r} is also the id of {places[case.id]}.")
            places[case.id] = place
            cases.append(case)
        name = path.name if path.name not in digests else str(path)
        digests[name] = file_digest(path)
    if not cases:
        raise PlatformError(f"There is no case in {', '.join(map(str, digests)) or 'no suite file'}.")
    return Suite(tuple(cases), digests)


def _read_file(path: Path, domain: Domain | None) -> Iterable[tuple[Case, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PlatformError(f"There is no suite file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlatformError(f"The suite file {path} cannot be read: {error}.") from error
    try:
        content = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise PlatformError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})."
        ) from None
    except _DuplicateKeyError as error:
        raise PlatformError(f"{path}: the key {error} stands twice in one object.") from None
    if not isinstance(content, dict):
        raise PlatformError(f"{path} must hold an object of lists, not {_kind(content)}.")
    if unknown := set(content) - set(LISTS):
        raise PlatformError(f"{path}: unknown list {min(unknown)!r}; a suite has {', '.join(LISTS)}.")
    for name in LISTS:
        entries = content.get(name, [])
        if not isinstance(entries, list):
            raise PlatformError(f"{path}, {name} must be a list, not {_kind(entries)}.")
        lines = _lines_of(text, name)
        for index, entry in enumerate(entries):
            line = f" (line {lines[index]})" if index < len(lines) else ""
            place = f"{path}, {name}[{index}]{line}"
            yield _CaseReader(place, entry, name, domain).case(f"{path.stem}/{name}[{index}]"), place


class _DuplicateKeyError(Exception):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(repr(key))
        found[key] = value
    return found


def _lines_of(text: str, list_name: str) -> list[int]:
    """Returns the line on which each entry of a list begins, in a text that is valid JSON."""
    start = re.search(rf'"{list_name}"\s*:\s*\[', text)
    if start is None:
        return []
    decoder = json.JSONDecoder()
    lines: list[int] = []
    position = start.end()
    while True:
        while text[position] in " \t\r\n,":
            position += 1
        if text[position] == "]":
            return lines
        lines.append(text.count("\n", 0, position) + 1)
        _, position = decoder.raw_decode(text, position)


class _CaseReader:
    """Reads one entry of a list, with the place for errors."""

    def __init__(self, place: str, entry: Any, list_name: ListName, domain: Domain | None) -> None:
        self.place = place
        self.list_name = list_name
        self.domain = domain
        if not isinstance(entry, dict):
            raise PlatformError(f"{place} must be an object, not {_kind(entry)}.")
        self.entry = entry
        if unknown := set(entry) - _FIELDS[list_name]:
            self.fail(min(unknown), f"unknown field; a case of {list_name} has {', '.join(sorted(_FIELDS[list_name]))}")

    def fail(self, field: str, problem: str) -> NoReturn:
        raise PlatformError(f"{self.place}, field {field}: {problem}.")

    def case(self, default_id: str) -> Case:
        calls, ordered = self.calls()
        return Case(
            id=self.text("id", default_id),
            list_name=self.list_name,
            input=self.text("input"),
            category=self.text("category", ""),
            calls=calls,
            ordered=ordered,
            now=self.now(),
            fixture=self.fixture(),
            messages=self.messages(),
            slice=self.slice(),
        )

    def text(self, field: str, default: str | None = None) -> str:
        if field not in self.entry:
            if default is None:
                self.fail(field, "missing")
            return default
        value = self.entry[field]
        if not isinstance(value, str) or not value.strip():
            self.fail(field, f"{value!r} is no text")
        return value

    def slice(self) -> str:
        value = self.text("slice", "")
        if not re.fullmatch(r"[a-z0-9_]*", value):
            self.fail("slice", f"{value!r} is no name of small letters, digits and underscores")
        return value

    def now(self) -> datetime:
        value = self.entry.get("now", DEFAULT_NOW)
        try:
            now = datetime.fromisoformat(value)
        except (TypeError, ValueError):
            self.fail("now", f"{value!r} is no moment such as {DEFAULT_NOW}")
        if now.tzinfo is not None:
            self.fail("now", f"{value!r} names a time zone; the user's own clock has none")
        return now

    def fixture(self) -> str:
        value = self.text("fixture", DEFAULT_FIXTURE)
        if self.domain is not None and "fixture" in self.entry:
            try:
                self.domain.backend(self.now(), value)
            except KeyError:
                self.fail("fixture", f"{self.domain.name} has no fixture {value!r}")
        return value

    def messages(self) -> tuple[Message, ...]:
        value = self.entry.get("messages", [])
        if not isinstance(value, list):
            self.fail("messages", f"must be a list, not {_kind(value)}")
        for index, message in enumerate(value):
            field = f"messages[{index}]"
            if not isinstance(message, dict):
                self.fail(field, f"must be an object, not {_kind(message)}")
            if message.get("role") not in ("user", "assistant", "tool"):
                self.fail(f"{field}.role", f"{message.get('role')!r} is none of user, assistant, tool")
            content = message.get("content")
            if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
                self.fail(f"{field}.content", f"{content!r} is no text")
            for number, call in enumerate(message.get("tool_calls") or []):
                self.earlier_call(call, f"{field}.tool_calls[{number}]")
        return tuple(value)

    def earlier_call(self, call: Any, field: str) -> None:
        try:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if not isinstance(json.loads(arguments), dict):
                raise ValueError("not an object")
        except (TypeError, KeyError, ValueError):
            self.fail(field, "needs function.name and function.arguments, a JSON object as text")
        self.tool(name, f"{field}.function.name")

    def calls(self) -> tuple[tuple[ExpectedCall, ...], bool]:
        if self.list_name == "abstention":
            return (), False
        if self.list_name == "multi_tool_chains":
            return self.several_calls()
        tool = self.tool(self.text("expected_tool"), "expected_tool")
        if self.list_name == "tool_selection":
            return (ExpectedCall(tool),), False
        if "expected_args" not in self.entry:
            self.fail("expected_args", "missing")
        return (ExpectedCall(tool, self.arguments(self.entry["expected_args"], tool, "expected_args")),), False

    def several_calls(self) -> tuple[tuple[ExpectedCall, ...], bool]:
        given = [field for field in ("expected_chain", "expected_parallel") if field in self.entry]
        if len(given) != 1:
            self.fail("expected_chain", "give either expected_chain or expected_parallel")
        field = given[0]
        names = self.entry[field]
        if not isinstance(names, list) or not names:
            self.fail(field, f"{names!r} is no list of tools")
        tools = [self.tool(name, f"{field}[{index}]") for index, name in enumerate(names)]
        expected = self.entry.get("expected_args")
        if expected is not None and (not isinstance(expected, list) or len(expected) != len(tools)):
            self.fail("expected_args", f"must be a list of {len(tools)} objects, one for each call")
        sources = self.sources(tools)
        calls = []
        for index, tool in enumerate(tools):
            arguments = None if expected is None else self.arguments(expected[index], tool, f"expected_args[{index}]")
            calls.append(ExpectedCall(tool, arguments, sources.get(tool)))
        return tuple(calls), field == "expected_chain"

    def sources(self, tools: Sequence[str]) -> dict[str, dict[str, Source]]:
        value = self.entry.get("dependency", {})
        if not isinstance(value, dict):
            self.fail("dependency", f"must be an object, not {_kind(value)}")
        found: dict[str, dict[str, Source]] = {}
        for tool, arguments in value.items():
            if tool not in tools:
                self.fail(f"dependency.{tool}", "is not among the expected calls")
            if not isinstance(arguments, dict):
                self.fail(f"dependency.{tool}", f"must be an object, not {_kind(arguments)}")
            for argument, origin in arguments.items():
                field = f"dependency.{tool}.{argument}"
                self.argument(tool, argument, field)
                match = re.fullmatch(r"from:(\w+)(?:\.(\w+))?", origin) if isinstance(origin, str) else None
                if match is None:
                    self.fail(field, f"{origin!r} is not of the form 'from:create_project'")
                if match[1] not in tools:
                    self.fail(field, f"{match[1]!r} is not among the expected calls")
                found.setdefault(tool, {})[argument] = Source(match[1], match[2] or argument)
        return found

    def arguments(self, value: Any, tool: str, field: str) -> dict[str, ExpectedValue]:
        if not isinstance(value, dict):
            self.fail(field, f"must be an object, not {_kind(value)}")
        for name in value:
            self.argument(tool, name, f"{field}.{name}")
        return {name: self.expected_value(expected, f"{field}.{name}") for name, expected in value.items()}

    def expected_value(self, value: Any, field: str) -> ExpectedValue:
        if not isinstance(value, dict) or not value.keys() & {"any_of", "optional"}:
            return ExpectedValue((value,))
        if unknown := set(value) - _CHOICE_KEYS:
            self.fail(field, f"unknown key {min(unknown)!r} beside any_of or optional")
        optional = value.get("optional", False)
        if not isinstance(optional, bool):
            self.fail(f"{field}.optional", f"{optional!r} is neither true nor false")
        if "any_of" in value and "value" in value:
            self.fail(field, "give either any_of or value")
        if "value" in value:
            return ExpectedValue((value["value"],), optional)
        if "any_of" not in value:
            return ExpectedValue(None, optional)
        choices = value["any_of"]
        if not isinstance(choices, list) or not choices:
            self.fail(f"{field}.any_of", f"{choices!r} is no list of values")
        return ExpectedValue(tuple(choices), optional)

    def tool(self, name: Any, field: str) -> str:
        if not isinstance(name, str) or not name:
            self.fail(field, f"{name!r} is no tool's name")
        if self.domain is not None and name not in {tool.name for tool in self.domain.tools}:
            self.fail(field, f"{self.domain.name} has no tool {name!r}")
        return name

    def argument(self, tool: str, name: str, field: str) -> None:
        if self.domain is not None and name not in self.domain.tool(tool).parameters()["properties"]:
            self.fail(field, f"{tool} has no argument {name!r}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
