"""A simulated Task API: executes every tool in memory, by the rules that the real service follows."""

import copy
import json
import re
from collections.abc import Mapping
from datetime import date, datetime
from importlib import resources
from typing import Any

from pydantic import ValidationError

from taskagent_platform.domains.base import Backend, ToolError
from taskagent_platform.domains.task_api.date_words import minute
from taskagent_platform.domains.task_api.tools import TOOLS

State = dict[str, list[dict[str, Any]]]
"""Lists of ``tasks``, ``projects``, ``events`` and ``reminders``."""

_ARGUMENTS = {tool.name: tool.arguments for tool in TOOLS}
_ARTICLES = re.compile(r"^(?:the|my|a|an|our) ")
_PUNCTUATION = re.compile(r"[-\u2010-\u2015.,:;!?'\"\u2018-\u201f()\[\]{}/\\\u2026]+")
"""What two spellings of a title may differ in; any other sign (``C#``, ``C++``, a picture) tells titles apart."""
EMPTY: State = {"tasks": [], "projects": [], "events": [], "reminders": []}


class TaskApiBackend(Backend):
    """Tasks, projects, calendar events and reminders of one user.

    Args:
        now: the service's clock.
        fixture: a named fixture of ``fixtures.json`` in this package, or ``empty``.
    """

    def __init__(self, now: datetime, fixture: str = "default") -> None:
        self.now = now
        self.reset(fixture)

    def reset(self, fixture: str = "default") -> None:
        """Puts the state back to a named fixture. Raises KeyError for an unknown name."""
        self.load(EMPTY if fixture == "empty" else _fixtures()[fixture])

    def load(self, state: State) -> None:
        """Takes over a state as :meth:`snapshot` returns it."""
        self._state: State = {name: copy.deepcopy(state.get(name, [])) for name in EMPTY}

    def snapshot(self) -> State:
        """Returns the whole state as JSON-able data."""
        return copy.deepcopy(self._state)

    def execute(self, tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Executes one call; see :class:`~taskagent_platform.domains.base.Backend`."""
        if tool not in _ARGUMENTS:
            raise ToolError(404, "unknown_tool", f"there is no tool {tool}")
        try:
            given = _ARGUMENTS[tool].model_validate(arguments).model_dump(exclude_none=True)
            for name in ("due_date", "due_before", "start_date", "end_date", "remind_at"):
                if name in given:
                    datetime.fromisoformat(given[name])
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"]))
            raise ToolError(400, "invalid_argument", f"{field}: {problem['msg']}") from error
        except ValueError as error:
            raise ToolError(400, "invalid_argument", f"{name}: {given[name]} is not a date") from error
        result: dict[str, Any] = getattr(self, f"_{tool}")(given)
        return result

    def _create_task(self, given: dict[str, Any]) -> dict[str, Any]:
        if "project_id" in given:
            given["project_id"] = self._find("projects", "project_id", "name", given["project_id"])["project_id"]
        task = {"task_id": self._new_id("tasks", "task_id", "task"), **given, "status": "open"}
        self._state["tasks"].append(task)
        return {"task_id": task["task_id"], "title": task["title"]}

    def _list_tasks(self, given: dict[str, Any]) -> dict[str, Any]:
        if "project_id" in given:
            given["project_id"] = self._find("projects", "project_id", "name", given["project_id"])["project_id"]
        found = [task for task in self._state["tasks"] if _matches(task, given)]
        shown = ("task_id", "title", "due_date")
        return {"count": len(found), "tasks": [{k: task[k] for k in shown if k in task} for task in found]}

    def _update_task(self, given: dict[str, Any]) -> dict[str, Any]:
        task = self._find("tasks", "task_id", "title", given.pop("task_id"))
        if not given:
            raise ToolError(400, "invalid_argument", "nothing to change was given")
        task.update(given)
        return {"task_id": task["task_id"], "title": task["title"], "changed": sorted(given)}

    def _complete_task(self, given: dict[str, Any]) -> dict[str, Any]:
        task = self._find("tasks", "task_id", "title", given["task_id"])
        task["status"] = "completed"
        return {"task_id": task["task_id"], "title": task["title"], "status": "completed"}

    def _delete_task(self, given: dict[str, Any]) -> dict[str, Any]:
        task = self._find("tasks", "task_id", "title", given["task_id"])
        self._state["tasks"].remove(task)
        self._state["reminders"] = [r for r in self._state["reminders"] if r["task_id"] != task["task_id"]]
        return {"task_id": task["task_id"], "title": task["title"], "deleted": True}

    def _create_project(self, given: dict[str, Any]) -> dict[str, Any]:
        project = {"project_id": self._new_id("projects", "project_id", "proj"), **given}
        self._state["projects"].append(project)
        return {"project_id": project["project_id"], "name": project["name"]}

    def _get_calendar(self, given: dict[str, Any]) -> dict[str, Any]:
        start = date.fromisoformat(given["start_date"])
        end = date.fromisoformat(given.get("end_date", given["start_date"]))
        if end < start:
            raise ToolError(400, "invalid_argument", f"end_date {end} lies before start_date {start}")
        found = [e for e in self._state["events"] if start <= datetime.fromisoformat(e["starts_at"]).date() <= end]
        return {"count": len(found), "events": sorted(found, key=lambda event: event["starts_at"])}

    def _create_reminder(self, given: dict[str, Any]) -> dict[str, Any]:
        task = self._find("tasks", "task_id", "title", given["task_id"])
        reminder = {
            "reminder_id": self._new_id("reminders", "reminder_id", "rem"),
            "task_id": task["task_id"],
            "remind_at": minute(datetime.fromisoformat(given["remind_at"])),
        }
        self._state["reminders"].append(reminder)
        return reminder

    def _find(self, kind: str, id_name: str, title_name: str, wanted: str) -> dict[str, Any]:
        """Returns the one entry that ``wanted`` means: by id, else by its title as it stands, else by one like it."""
        entries = self._state[kind]
        for entry in entries:
            if entry[id_name] == wanted:
                return entry
        same = [entry for entry in entries if entry[title_name].casefold() == wanted.casefold()]
        same = same or [entry for entry in entries if _title_key(entry[title_name]) == _title_key(wanted)]
        noun = kind.removesuffix("s")
        if not same:
            raise ToolError(404, "not_found", f"there is no {noun} {wanted}")
        if len(same) > 1:
            candidates = [{id_name: entry[id_name], title_name: entry[title_name]} for entry in same]
            raise ToolError(409, "ambiguous", f"several {kind} are called {wanted}", {"candidates": candidates})
        return same[0]

    def _new_id(self, kind: str, id_name: str, prefix: str) -> str:
        taken = {entry[id_name] for entry in self._state[kind]}
        number = len(taken) + 1
        while f"{prefix}_{number:03d}" in taken:
            number += 1
        return f"{prefix}_{number:03d}"


def _title_key(text: str) -> str:
    """Returns what two spellings of a title share: no case, punctuation, article or extra spaces."""
    words = " ".join(_PUNCTUATION.sub(" ", text.casefold()).split())
    # What is nothing but punctuation is like itself alone.
    return _ARTICLES.sub("", words) or text


def _matches(task: dict[str, Any], wanted: dict[str, Any]) -> bool:
    tags = {tag.casefold() for tag in task.get("tags", [])}
    return (
        all(task.get(name) == wanted[name] for name in ("status", "priority", "project_id") if name in wanted)
        and {tag.casefold() for tag in wanted.get("tags", [])} <= tags
        and ("due_before" not in wanted or task.get("due_date", "9999") <= wanted["due_before"])
    )


def _fixtures() -> dict[str, State]:
    text = resources.files(__package__).joinpath("fixtures.json").read_text()
    fixtures: dict[str, State] = json.loads(text)
    return fixtures
