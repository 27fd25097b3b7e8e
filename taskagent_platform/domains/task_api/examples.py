"""Training examples of the Task API: phrasings filled in, executed on the backend and answered."""

import random
import re
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

from taskagent_platform.domains.example_writer import COMBINED, Done, ExampleWriter, Filled
from taskagent_platform.domains.phrasing import Slot, Template
from taskagent_platform.domains.task_api.answers import answer
from taskagent_platform.domains.task_api.backend import State, TaskApiBackend
from taskagent_platform.domains.task_api.date_words import day_words, minute, written
from taskagent_platform.domains.task_api.prompt import system_prompt
from taskagent_platform.domains.task_api.tools import TOOLS
from taskagent_platform.domains.task_api.wording import Wording

PHRASINGS = Path(__file__).parent / "phrasings"
_SAYS_PRIORITY = re.compile(
    r"urgen|critical|important|priorit|\bprio\b|\b(top|high|low)\b|minor|rush|wait|medium|normal|regular|burning"
)
_LOOKS_LIKE_AN_ID = re.compile(r"\S*\d\S*")


class TaskApiWriter(ExampleWriter):
    """Writes one example; see :class:`~taskagent_platform.domains.example_writer.ExampleWriter`."""

    phrasings = PHRASINGS
    tools = TOOLS
    mixes = {
        "structured_outputs": {
            "create_task+": 36, "update_task+": 19, "create_reminder+": 14, "list_tasks+": 16, "create_project+": 6,
            "get_calendar+": 9,
        },
        "function_calling": {
            "create_task": 20, "list_tasks": 18, "overdue": 4, "complete_task": 12, "delete_task": 10,
            "get_calendar": 11, "create_project": 6, "no_tool": 18, "missing": 11,
        },
        "multi_tool": {
            "chains": 28, "found": 12, "each": 8, "looked_up": 8, "parallel": 27, COMBINED: 23, "corrections": 6,
        },
    }  # fmt: skip
    shares_answered = {
        "single": 0.12, "list_tasks": 0.2, "parallel": 0.25, COMBINED: 0.2, "chains": 0.5, "found": 0.5, "each": 0.25,
        "looked_up": 0.3, "corrections": 0.3,
    }  # fmt: skip
    shares_missing = {"single": 0.08}

    def __init__(self, rng: random.Random, now: datetime) -> None:
        super().__init__(rng, now)
        self.wording = Wording(rng, now)

    def system_prompt(self) -> str:
        return system_prompt(self.now)

    def fill(self, slot: Slot) -> Filled:
        return self.wording.fill(slot)

    def backend(self, state: State) -> TaskApiBackend:
        backend = TaskApiBackend(self.now, "empty")
        backend.load(state)
        return backend

    def answer(self, done: Sequence[Done]) -> str:
        return answer(done)

    def argument(self, name: str, meant: str) -> str:
        """Returns the value; a date that the template writes as a word (``today``) becomes ISO."""
        return str(day_words(self.now).get(meant, meant)) if _is_date(name) else meant

    def result(self, name: str, value: Any) -> Any:
        """Returns the value; of a moment the day, where a date is asked for."""
        return value[: len("YYYY-MM-DD")] if _is_date(name) else value

    def note(self, argument: str, literal: str) -> str:
        """Returns the prompt's line for a date that the template writes as a word."""
        days = day_words(self.now)
        dated = _is_date(argument) and literal in days
        return f"{literal} {written(days[literal], self.now)}" if dated else ""

    def says(self, text: str, argument: str, literal: str) -> bool:
        """Returns whether the text has a word for a priority, or the date itself; a status is said in too many ways."""
        return bool(_SAYS_PRIORITY.search(text)) if argument == "priority" else _is_date(argument) and literal in text

    def state(self, template: Template, *, complete: bool) -> State:
        """Returns a state in which every task and project that the calls name exists, among a few others."""
        rng = self.rng
        tasks: list[dict[str, Any]] = []
        projects: list[dict[str, Any]] = []
        for call in template.calls:
            for name, value in call.arguments.items():
                if name == "task_id" and isinstance(value, tuple) and complete:
                    self._mention(tasks, "task_id", "title", "task", self.mean(value), "titles")
                elif name == "project_id" and isinstance(value, tuple):
                    self._mention(projects, "project_id", "name", "proj", self.mean(value), "names")
        # Some lists are as long as those of people who live with one, above all where nothing but the list is asked
        # for: a model that has rarely seen one answered asks for it again.
        lists = any(call.tool == "list_tasks" for call in template.calls)
        long = lists and rng.random() < (0.35 if len(template.calls) == 1 else 0.12)
        for _ in range(rng.randint(4, 14) if long else rng.choice((0, 0, 1, 1, 2))):
            title = rng.choice(self.values("titles"))
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
        today = self.now.date()
        events = [
            self._event(rng.choice(self.values("events")), today, today + timedelta(days=9))
            for _ in range(rng.choice((0, 1, 2, 3)))
        ]
        self._fit_events(template, events)
        if complete:
            self._fit(template, tasks, projects)
        return {"tasks": tasks, "projects": projects, "events": events, "reminders": []}

    def _event(self, title: str, first: date, last: date) -> dict[str, Any]:
        """Returns an event of one of these days."""
        day = first + timedelta(days=self.rng.randint(0, (last - first).days))
        start = datetime(day.year, day.month, day.day, self.rng.randint(8, 18), self.rng.choice((0, 0, 30, 30, 15, 45)))
        end = start + timedelta(minutes=self.rng.choice((30, 60)))
        return {"title": title, "starts_at": minute(start), "ends_at": minute(end)}

    def _fit_events(self, template: Template, events: list[dict[str, Any]]) -> None:
        """Lets the calendar hold the event that a later call names (``@1.events{event}``), and others."""
        named = next((value.named for call in template.calls for value in call.results if value.named), None)
        if named is None:
            return
        title = self.mean((named,))
        listing = self.arguments(next(call for call in template.calls if call.tool == "get_calendar"))
        first = date.fromisoformat(listing["start_date"])
        last = date.fromisoformat(listing.get("end_date", listing["start_date"]))
        first = min(max(first, self.now.date()), last)
        events[:] = [event for event in events if event["title"].casefold() != title.casefold()]
        others = [other for other in self.values("events") if other.casefold() != title.casefold()]
        events += [self._event(other, first, last) for other in self.rng.sample(others, self.rng.randint(0, 3))]
        events.append(self._event(title, first, last))

    def _fit(self, template: Template, tasks: list[dict[str, Any]], projects: list[dict[str, Any]]) -> None:
        """Lets some of the tasks match the filters of the first listing, so that lists are not mostly empty."""
        listing = next((call for call in template.calls if call.tool == "list_tasks"), None)
        if listing is None:
            return
        filters = self.arguments(listing)
        results = [value for call in template.calls for value in call.results]
        if found := [value for value in results if value.field.startswith("tasks.")]:
            # What is done with the task found is right for one only, if it is not for each.
            count = self.rng.choice((2, 2, 3, 3, 4)) if any(value.each for value in found) else 1
            dated = any(value.field == "tasks.due_date" for value in found)
            self._find(filters, tasks, projects, count, dated=dated)
            return
        for task in tasks[: self.rng.randint(0, max(4, len(tasks) - 2))]:
            _match(task, filters, projects)

    def _find(
        self,
        filters: dict[str, Any],
        tasks: list[dict[str, Any]],
        projects: list[dict[str, Any]],
        count: int,
        *,
        dated: bool,
    ) -> None:
        """Adds tasks that the filters match, with due dates if need be; what there is already stops matching them."""
        name, value = next(iter(filters.items()))
        for task in tasks:
            if name == "due_before":
                task["due_date"] = str(date.fromisoformat(value) + timedelta(days=self.rng.randint(1, 9)))
            elif name == "priority":
                task["priority"] = {"high": "low", "medium": "high", "low": "medium"}[value]
            elif name == "status":
                task["status"] = "completed" if value == "open" else "open"
            else:
                task.pop(name, None)
        for title in self.rng.sample(self.values("titles"), count):
            self._mention(tasks, "task_id", "title", "task", title[0].upper() + title[1:], "titles")
            tasks[-1]["status"] = "open"
            if dated or (count > 1 and self.rng.random() < 0.6):
                tasks[-1]["due_date"] = str(self.now.date() + timedelta(days=self.rng.randint(1, 30)))
            _match(tasks[-1], filters, projects)
            if count > 1 and "due_before" in filters:
                due = date.fromisoformat(filters["due_before"]) - timedelta(days=self.rng.choice((0, 0, 1, 2, 5)))
                tasks[-1]["due_date"] = str(due)
        self.rng.shuffle(tasks)

    def _mention(
        self, entries: list[dict[str, Any]], id_name: str, title_name: str, prefix: str, wanted: str, titles: str
    ) -> None:
        if any(wanted in (entry[id_name], entry[title_name]) for entry in entries):
            return
        if _LOOKS_LIKE_AN_ID.fullmatch(wanted):
            entry = {id_name: wanted, title_name: self.rng.choice(self.values(titles))}
        else:
            taken = {entry[id_name] for entry in entries}
            numbers = (f"{prefix}_{self.rng.randint(1, 400):03d}" for _ in range(100))
            entry = {id_name: next(number for number in numbers if number not in taken), title_name: wanted}
        entries.append(entry)


def _is_date(argument: str) -> bool:
    return argument.endswith(("date", "before"))


def _match(task: dict[str, Any], filters: dict[str, Any], projects: list[dict[str, Any]]) -> None:
    """Gives a task what a listing's filters look for."""
    for name, value in filters.items():
        if name == "due_before":
            task["due_date"] = value
        elif name == "project_id":
            task["project_id"] = projects[0]["project_id"]
        else:
            task[name] = value


SOURCES = tuple(TaskApiWriter.mixes)
generate = TaskApiWriter.generate
