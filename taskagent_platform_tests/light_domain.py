"""A domain of three tools, for tests that must not depend on a real one."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from taskagent_platform.domains.base import Backend, Domain, Example, Tool, ToolError


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SetLight(_Arguments):
    room: str
    level: int
    color: Literal["white", "red"] | None = None
    until: str | None = Field(None, pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}$")
    tags: list[str] | None = None


class ListLights(_Arguments):
    room: str | None = None


class AddLamp(_Arguments):
    room: str
    name: str | None = None


class AddTimer(_Arguments):
    lamp_id: str
    at: str


class RemoveLamp(_Arguments):
    lamp_id: str


class LightBackend(Backend):
    def __init__(self, fixture: str = "default") -> None:
        self.reset(fixture)

    def reset(self, fixture: str = "default") -> None:
        self._state: dict[str, Any] = copy.deepcopy(
            {"default": {"lamps": {"lamp_1": "kitchen"}, "levels": {}}}[fixture]
        )

    def snapshot(self) -> dict[str, Any]:
        return copy.deepcopy(self._state)

    def load(self, state: Mapping[str, Any]) -> None:
        self._state = copy.deepcopy(dict(state))

    def execute(self, tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        lamps = self._state["lamps"]
        if tool == "list_lights":
            return {"lamps": sorted(lamps)}
        if tool == "set_light":
            self._state["levels"][arguments["room"]] = arguments["level"]
            return {"room": arguments["room"], "level": arguments["level"]}
        if tool == "add_lamp":
            lamp_id = f"lamp_{len(lamps) + 1}"
            lamps[lamp_id] = arguments["room"]
            return {"lamp_id": lamp_id}
        if tool not in ("add_timer", "remove_lamp"):
            raise ToolError(404, "unknown_tool", f"there is no tool {tool}")
        if arguments["lamp_id"] not in lamps:
            raise ToolError(404, "not_found", f"there is no lamp {arguments['lamp_id']}")
        if tool == "remove_lamp":
            del lamps[arguments["lamp_id"]]
            return {"removed": arguments["lamp_id"]}
        if not arguments["at"]:
            raise ToolError(400, "invalid_argument", "at: empty")
        self._state.setdefault("timers", []).append(dict(arguments))
        return {"at": arguments["at"]}


class LightDomain(Domain):
    name = "lights"
    agent_name = "Lamp"
    agent_requests = (("List the lights", "list_lights"),)
    sources = ()
    suites: tuple[Path, ...] = ()
    development_suites: tuple[Path, ...] = ()
    tools = (
        Tool("set_light", "set a room's light", SetLight),
        Tool("list_lights", "show lamps", ListLights),
        Tool("add_lamp", "add a lamp, returns lamp_id", AddLamp),
        Tool("add_timer", "set a timer", AddTimer),
        Tool("remove_lamp", "remove a lamp", RemoveLamp, destructive=True),
    )

    def system_prompt(self, now: datetime) -> str:
        return f"You control lamps. It is {now:%Y-%m-%dT%H:%M}."

    def backend(self, now: datetime, fixture: str = "default") -> LightBackend:
        return LightBackend(fixture)

    def generate(self, source: str, count: int, seed: int, moments: Sequence[datetime]) -> Iterator[Example]:
        return iter(())


LIGHTS = LightDomain()
