"""A simulated customer-support service: executes every tool in memory."""

import copy
import json
from collections.abc import Mapping
from datetime import datetime
from importlib import resources
from typing import Any

from pydantic import ValidationError

from taskagent_platform.domains.base import Backend, ToolError
from taskagent_platform.domains.customer_support.tools import TOOLS

State = dict[str, list[dict[str, Any]]]
"""Lists of ``customers``, ``orders``, ``tickets`` and ``responses``."""

_ARGUMENTS = {tool.name: tool.arguments for tool in TOOLS}
EMPTY: State = {"customers": [], "orders": [], "tickets": [], "responses": []}


class CustomerSupportBackend(Backend):
    """Customers, their orders, tickets and what was answered on them.

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
            given = _ARGUMENTS[tool].model_validate(arguments).model_dump()
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"]))
            raise ToolError(400, "invalid_argument", f"{field}: {problem['msg']}") from error
        for name, value in given.items():
            if not value.strip():
                raise ToolError(400, "invalid_argument", f"{name}: is empty")
        result: dict[str, Any] = getattr(self, f"_{tool}")(given)
        return result

    def _lookup_customer(self, given: dict[str, str]) -> dict[str, Any]:
        customer = self._find("customers", "email", given["email"])
        return {"customer_id": customer["customer_id"], "name": customer["name"]}

    def _get_order_history(self, given: dict[str, str]) -> dict[str, Any]:
        customer = self._find("customers", "customer_id", given["customer_id"])
        own = [order for order in self._state["orders"] if order["customer_id"] == customer["customer_id"]]
        newest_first = sorted(own, key=lambda order: order["ordered_on"], reverse=True)
        shown = ("order_id", "item", "ordered_on", "status")
        return {"count": len(own), "orders": [{name: order[name] for name in shown} for order in newest_first]}

    def _create_ticket(self, given: dict[str, str]) -> dict[str, Any]:
        customer = self._find("customers", "customer_id", given["customer_id"])
        ticket = {
            "ticket_id": self._new_id("tickets", "ticket_id", "ticket"),
            "customer_id": customer["customer_id"],
            "issue": given["issue"],
            "opened_on": str(self.now.date()),
        }
        self._state["tickets"].append(ticket)
        return {"ticket_id": ticket["ticket_id"], "customer_id": ticket["customer_id"]}

    def _send_response(self, given: dict[str, str]) -> dict[str, Any]:
        ticket = self._find("tickets", "ticket_id", given["ticket_id"])
        self._state["responses"].append({"ticket_id": ticket["ticket_id"], "message": given["message"]})
        return {"ticket_id": ticket["ticket_id"], "sent": True}

    def _find(self, kind: str, field: str, wanted: str) -> dict[str, Any]:
        for entry in self._state[kind]:
            if entry[field].casefold() == wanted.strip().casefold():
                return entry
        raise ToolError(404, "not_found", f"there is no {kind.removesuffix('s')} {wanted}")

    def _new_id(self, kind: str, id_name: str, prefix: str) -> str:
        taken = {entry[id_name] for entry in self._state[kind]}
        number = len(taken) + 1
        while f"{prefix}_{number:03d}" in taken:
            number += 1
        return f"{prefix}_{number:03d}"


def _fixtures() -> dict[str, State]:
    text = resources.files(__package__).joinpath("fixtures.json").read_text()
    fixtures: dict[str, State] = json.loads(text)
    return fixtures
