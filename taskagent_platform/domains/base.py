"""What a domain is: tools, prompt, simulated backend, examples and suites.

A domain is all that the platform needs to know of a set of tools. Packages offer theirs through the entry-point
group ``taskagent.domains``; :mod:`taskagent_platform.domains.registry` finds them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from taskagent_platform.errors import PlatformError

_DEFINITIONS = "#/$defs/"

Message = dict[str, Any]
"""One message in OpenAI's chat format."""


@dataclass(frozen=True)
class Tool:
    """One tool: its name, what it does, its arguments, and whether it destroys something."""

    name: str
    description: str
    arguments: type[BaseModel]
    destructive: bool = False

    def parameters(self) -> dict[str, Any]:
        """Returns the JSON schema of the arguments, as sent to the server: no titles, nulls, extras or references.

        Raises:
            PlatformError: an argument may hold itself, so that its schema has no end.
        """
        schema = self.arguments.model_json_schema()
        definitions = schema.get("$defs", {})
        # The schema of a model that may hold itself is a reference to its own definition.
        root = schema["$ref"].removeprefix(_DEFINITIONS) if "$ref" in schema else None
        return self._object(definitions[root] if root else schema, definitions, "", (root,) if root else ())

    def _object(
        self, schema: Mapping[str, Any], definitions: Mapping[str, Any], place: str, inside: tuple[str, ...]
    ) -> dict[str, Any]:
        """Returns the schema of an object; ``inside`` are the definitions that it stands in, ``place`` its path."""
        properties = {}
        for name, described in schema.get("properties", {}).items():
            field = self._inlined(described, definitions, f"{place}{name}", inside)
            # An argument is either given or left out; `null` is never a value, so the union with it goes.
            options = [option for option in field.pop("anyOf", []) if option.get("type") != "null"]
            if len(options) == 1:
                field = {**options[0], **field}
            elif options:
                field["anyOf"] = options
            field.pop("title", None)
            field.pop("default", None)
            properties[name] = field
        return {
            "type": "object",
            "properties": properties,
            "required": schema.get("required", []),
            "additionalProperties": False,
        }

    def _inlined(self, schema: Any, definitions: Mapping[str, Any], place: str, inside: tuple[str, ...]) -> Any:
        """Returns a schema in which every reference is replaced by what it refers to: servers are sent no others."""
        if isinstance(schema, list):
            return [self._inlined(part, definitions, place, inside) for part in schema]
        if not isinstance(schema, dict):
            return schema
        if not isinstance(schema.get("$ref"), str):
            # A discriminator, OpenAPI's own word, only names definitions.
            words = {key: part for key, part in schema.items() if key != "discriminator"}
            return {key: self._inlined(part, definitions, place, inside) for key, part in words.items()}
        name = schema["$ref"].removeprefix(_DEFINITIONS)
        if name in inside:
            raise PlatformError(
                f"The argument {place} of the tool {self.name} may hold itself ({name}), so that its schema has no "
                "end: give it a fixed depth."
            )
        definition = dict(definitions[name])
        if "properties" in definition:
            found = self._object(definition, definitions, f"{place}.", (*inside, name))
        else:
            found = self._inlined(definition, definitions, place, (*inside, name))
        if "description" in definition:
            found["description"] = definition["description"]
        found.pop("title", None)
        return {**found, **{key: part for key, part in schema.items() if key != "$ref"}}

    def as_openai(self) -> dict[str, Any]:
        """Returns the tool in OpenAI's format, strict, so that the server constrains its arguments."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": self.parameters(),
                "strict": True,
            },
        }


class ToolError(Exception):
    """A tool call that the backend refuses.

    Attributes:
        status: the HTTP status that the real service answers with (400, 404, 409).
        code: a machine-readable word, for example ``not_found``.
        details: what helps the caller, for example the candidates of an ambiguous title.
    """

    def __init__(self, status: int, code: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.details = dict(details or {})

    def as_result(self) -> dict[str, Any]:
        """Returns the JSON object that the model gets as the tool's result."""
        return {"error": self.code, "message": str(self), **self.details}


class Backend(ABC):
    """A simulated service that really executes every tool, in memory."""

    @abstractmethod
    def reset(self, fixture: str = "default") -> None:
        """Puts the state back to a named fixture. Raises KeyError for an unknown name."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Takes over a state as :meth:`snapshot` returns it."""

    @abstractmethod
    def execute(self, tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Executes one call and returns its JSON-able result.

        Raises:
            ToolError: the service refuses the call; the state is unchanged.
        """

    @abstractmethod
    def snapshot(self) -> dict[str, Any]:
        """Returns the whole state as JSON-able data, comparable with ``==``."""


@dataclass(frozen=True)
class Example:
    """One training example: a conversation in OpenAI's format and where it came from.

    ``meta`` holds ``source``, ``pattern``, ``seed``, ``now`` (ISO, minutes) and ``state`` (the backend's snapshot
    before the first call).
    """

    messages: list[Message]
    meta: dict[str, Any]


class Domain(ABC):
    """A set of tools and everything that is needed to teach and judge a model for it."""

    name: str
    tools: tuple[Tool, ...]
    agent_name: str
    agent_requests: tuple[tuple[str, str], ...]
    """Requests with the tool that each must call: the smoke test of the finished agent."""
    sources: tuple[str, ...]
    """The names of the source datasets, in order: an asset for each."""
    suites: tuple[Path, ...]
    """The suite files that gate a deployment."""
    development_suites: tuple[Path, ...] = ()
    """Suite files to look at while working on the data; they never gate, and share no case with the suites."""
    robustness_suites: tuple[Path, ...] = ()
    """Suite files of hard cases, each of a slice: measured beside the suites, reported by slice, counted by no gate."""

    @abstractmethod
    def system_prompt(self, now: datetime) -> str:
        """Returns the system message: instructions first, the date block last."""

    @abstractmethod
    def backend(self, now: datetime, fixture: str = "default") -> Backend:
        """Returns a fresh simulated backend whose clock stands at ``now``."""

    @abstractmethod
    def generate(self, source: str, count: int, seed: int, moments: Sequence[datetime]) -> Iterator[Example]:
        """Yields ``count`` different examples of a source, the same ones for the same seed and moments.

        Args:
            source: one of :attr:`sources`.
            count: how many.
            seed: decides every choice.
            moments: the i-th example takes place at ``moments[i % len(moments)]``, so that examples of different
                sources share a date block.
        """

    def tool(self, name: str) -> Tool:
        """Returns a tool by name. Raises KeyError."""
        return self._by_name()[name]

    def _by_name(self) -> Mapping[str, Tool]:
        return {tool.name: tool for tool in self.tools}

    def openai_tools(self) -> list[dict[str, Any]]:
        """Returns every tool in OpenAI's format, in order."""
        return [tool.as_openai() for tool in self.tools]

    def system_messages(self, now: datetime) -> Sequence[Message]:
        """Returns the messages that every conversation starts with."""
        return [{"role": "system", "content": self.system_prompt(now)}]
