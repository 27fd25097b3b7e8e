"""The assistant's final words once the tools have answered: one short sentence for each call."""

from collections.abc import Sequence
from typing import Any

_SHOWN = 3
"""Titles named in a sentence about a list."""


def answer(done: Sequence[tuple[str, dict[str, Any], dict[str, Any]]]) -> str:
    """Returns the answer to a turn.

    Args:
        done: tool, arguments and result of each call of the turn, in order.
    """
    return " ".join(_sentence(tool, arguments, result) for tool, arguments, result in done)


def _sentence(tool: str, arguments: dict[str, Any], result: dict[str, Any]) -> str:
    if "error" in result:
        wanted = arguments.get("task_id") or arguments.get("project_id")
        return f"I couldn't find {wanted}." if result["error"] == "not_found" else f"That failed: {result['message']}."
    if tool == "create_task":
        return f'Done, "{result["title"]}" is on your list.'
    if tool == "list_tasks":
        return _listing("task", [task["title"] for task in result["tasks"]], "No tasks there, all clear!")
    if tool == "update_task":
        return f'Updated "{result["title"]}".'
    if tool == "complete_task":
        return f'Well done! "{result["title"]}" is complete.'
    if tool == "delete_task":
        return f'Deleted "{result["title"]}".'
    if tool == "create_project":
        return f'Project "{result["name"]}" is ready.'
    if tool == "get_calendar":
        events = [f"{event['title']} at {event['starts_at'][11:]}" for event in result["events"]]
        return _listing("event", events, "Nothing on your calendar then.")
    day, _, clock = result["remind_at"].partition("T")
    return f"I'll remind you on {day} at {clock}."


def _listing(noun: str, names: Sequence[str], empty: str) -> str:
    if not names:
        return empty
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    plural = "s" if len(names) > 1 else ""
    return f"{len(names)} {noun}{plural}: {'; '.join(names[:_SHOWN])}{more}."
