"""The assistant's final words once the tools have answered: one short sentence for each call."""

from collections.abc import Sequence
from typing import Any

from taskagent_platform.domains.example_writer import Done

_SHOWN = 3
"""Orders named in a sentence about a history."""


def answer(done: Sequence[Done]) -> str:
    """Returns the answer to a turn."""
    return " ".join(_sentence(*call) for call in done)


def _sentence(tool: str, arguments: dict[str, Any], result: dict[str, Any]) -> str:
    if "error" in result:
        wanted = next(iter(arguments.values()))
        return f"I couldn't find {wanted}." if result["error"] == "not_found" else f"That failed: {result['message']}."
    if tool == "lookup_customer":
        return f"{result['name']} is customer {result['customer_id']}."
    if tool == "get_order_history":
        return _history(result["orders"])
    if tool == "create_ticket":
        return f"I opened {result['ticket_id']}."
    return f"Your reply on {result['ticket_id']} is sent."


def _history(orders: Sequence[dict[str, Any]]) -> str:
    if not orders:
        return "There are no orders yet."
    shown = "; ".join(f"{order['item']} ({order['status']})" for order in orders[:_SHOWN])
    more = f" and {len(orders) - _SHOWN} more" if len(orders) > _SHOWN else ""
    return f"{len(orders)} order{'s' if len(orders) > 1 else ''}: {shown}{more}."
