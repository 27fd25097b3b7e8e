"""A domain that the tiny model of the smoke profile can learn in seconds: three lamps, switched on and off.

Its suite asks for a room by a name that its training data never use, so that no model answers everything.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from taskagent_platform.domains.base import Backend, Domain, Example, Message, Tool, ToolError

Room = Literal["hall", "kitchen", "garden"]
ROOMS: tuple[Room, ...] = get_args(Room)
_ON = ("switch on", "turn on", "light", "start")
_OFF = ("switch off", "turn off", "stop", "darken")
_LIST = (
    "list the lamps", "show the lamps", "which lamps are on", "show me what is on", "what is lit", "list what is on",
    "show me the lamps", "which lamps are lit",
)  # fmt: skip
_REMOVE = ("remove", "delete", "take away")
_PLACES = ("the {room} lamp", "the {room}", "{room}", "the lamp in the {room}")
_ENDS = ("", " please", " now", " for me")
_GREETINGS = ("hello", "hi", "thanks", "good morning", "good evening", "bye")
_DONE = "Done."


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SwitchOn(_Arguments):
    room: Room


class SwitchOff(_Arguments):
    room: Room


class ListLamps(_Arguments):
    pass


class RemoveLamp(_Arguments):
    room: Room


class SwitchBackend(Backend):
    def __init__(self, fixture: str = "default") -> None:
        self.reset(fixture)

    def reset(self, fixture: str = "default") -> None:
        if fixture != "default":
            raise KeyError(fixture)
        self._lamps: dict[str, bool] = {}
        for room in ROOMS:
            self._lamps[room] = False

    def snapshot(self) -> dict[str, Any]:
        return dict(self._lamps)

    def load(self, state: dict[str, Any]) -> None:
        self._lamps = dict(state)

    def execute(self, tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if tool == "list_lamps":
            return {"on": [room for room, lit in self._lamps.items() if lit]}
        if tool not in ("switch_on", "switch_off", "remove_lamp"):
            raise ToolError(404, "unknown_tool", f"there is no tool {tool}")
        room = arguments.get("room")
        if room not in self._lamps:
            raise ToolError(404, "not_found", f"there is no lamp in {room}")
        if tool == "remove_lamp":
            del self._lamps[room]
        else:
            self._lamps[room] = tool == "switch_on"
        return {"ok": True}


class SwitchDomain(Domain):
    name = "switches"
    agent_name = "Switch"
    agent_requests = (
        ("Switch on the hall lamp", "switch_on"),
        ("Show the lamps", "list_lamps"),
        ("Turn off the attic lamp", "switch_off"),
    )
    sources = ("structured_outputs", "function_calling", "multi_tool")
    suites = (Path(__file__).with_name("switch_suite.json"),)
    tools = (
        Tool("switch_on", "light", SwitchOn),
        Tool("switch_off", "darken", SwitchOff),
        Tool("list_lamps", "show", ListLamps),
        Tool("remove_lamp", "take away", RemoveLamp, destructive=True),
    )

    def system_prompt(self, now: datetime) -> str:
        return f"Lamps, {now:%Y-%m-%d}."

    def backend(self, now: datetime, fixture: str = "default") -> SwitchBackend:
        return SwitchBackend(fixture)

    def generate(self, source: str, count: int, seed: int, moments: Sequence[datetime]) -> Iterator[Example]:
        rng = random.Random(f"{seed}/{source}")
        seen: set[str] = set()
        while len(seen) < count:
            request, calls = _ask(source, rng)
            if request not in seen:
                now = moments[len(seen) % len(moments)]
                seen.add(request)
                meta = {"source": source, "pattern": source, "seed": seed, "now": f"{now:%Y-%m-%dT%H:%M}"}
                yield self._example(request, calls, now, meta)

    def _example(
        self, request: str, calls: Sequence[tuple[str, dict[str, Any]]], now: datetime, meta: dict[str, Any]
    ) -> Example:
        backend = self.backend(now)
        meta = {**meta, "state": backend.snapshot()}
        messages: list[Message] = [*self.system_messages(now), {"role": "user", "content": request}]
        if calls:
            made = [
                {
                    "id": f"call_{number}",
                    "type": "function",
                    "function": {"name": tool, "arguments": json.dumps(arguments)},
                }
                for number, (tool, arguments) in enumerate(calls)
            ]
            messages.append({"role": "assistant", "content": "", "tool_calls": made})
            for number, (tool, arguments) in enumerate(calls):
                result = json.dumps(backend.execute(tool, arguments))
                messages.append({"role": "tool", "tool_call_id": f"call_{number}", "content": result})
        messages.append({"role": "assistant", "content": _DONE if calls else "Hello!"})
        return Example(messages, meta)


def _ask(source: str, rng: random.Random) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """Draws a request and the calls that it asks for."""
    if source == "multi_tool":
        return ask_several(2, rng)
    kind = rng.choice(("on", "off", "remove", "list", "greet"))
    end = rng.choice(_ENDS)
    if kind == "greet":
        return f"{rng.choice(_GREETINGS)}{rng.choice(('', '!', ' there', ' to you'))}", []
    if kind == "list":
        return f"{rng.choice(_LIST)}{end}", [("list_lamps", {})]
    tool, verbs = {"on": ("switch_on", _ON), "off": ("switch_off", _OFF), "remove": ("remove_lamp", _REMOVE)}[kind]
    words, room = _switching(verbs, rng)
    return f"{words}{end}", [(tool, {"room": room})]


def ask_several(count: int, rng: random.Random) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """Draws a request for several calls, each of another room, and these calls."""
    rooms = rng.sample(ROOMS, count)
    calls = [(rng.choice(("switch_on", "switch_off")), {"room": room}) for room in rooms]
    asked = [
        f"{rng.choice(_ON if tool == 'switch_on' else _OFF)} {rng.choice(_PLACES).format(room=arguments['room'])}"
        for tool, arguments in calls
    ]
    return f"{', '.join(asked[:-1])} and {asked[-1]}{rng.choice(_ENDS)}", calls


def _switching(verbs: Sequence[str], rng: random.Random) -> tuple[str, str]:
    room = rng.choice(ROOMS)
    return f"{rng.choice(verbs)} {rng.choice(_PLACES).format(room=room)}", room


SWITCHES = SwitchDomain()
