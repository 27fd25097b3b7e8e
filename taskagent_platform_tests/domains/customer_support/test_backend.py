from datetime import datetime

import pytest

from taskagent_platform.domains.base import ToolError
from taskagent_platform.domains.customer_support import DOMAIN
from taskagent_platform.domains.customer_support.backend import CustomerSupportBackend

NOW = datetime(2024, 1, 15, 9)


@pytest.fixture
def backend() -> CustomerSupportBackend:
    return DOMAIN.backend(NOW)


def test_the_tools_are_those_of_the_design() -> None:
    required = {tool.name: tool.parameters()["required"] for tool in DOMAIN.tools}
    assert required == {
        "lookup_customer": ["email"],
        "get_order_history": ["customer_id"],
        "create_ticket": ["customer_id", "issue"],
        "send_response": ["ticket_id", "message"],
    }
    assert all(set(tool.parameters()["properties"]) == set(required[tool.name]) for tool in DOMAIN.tools)
    assert [tool.name for tool in DOMAIN.tools if tool.destructive] == ["send_response"]


def test_a_whole_case_from_email_to_reply(backend: CustomerSupportBackend) -> None:
    customer = backend.execute("lookup_customer", {"email": "Maria.Lopez@example.com"})
    assert customer == {"customer_id": "cust_001", "name": "Maria Lopez"}
    history = backend.execute("get_order_history", {"customer_id": customer["customer_id"]})
    assert [order["order_id"] for order in history["orders"]] == ["order_5002", "order_5001"], "newest first"
    ticket = backend.execute("create_ticket", {"customer_id": "cust_001", "issue": "the cups are chipped"})
    backend.execute("send_response", {"ticket_id": ticket["ticket_id"], "message": "Sorry!"})
    state = backend.snapshot()
    assert state["tickets"][-1] == {
        "ticket_id": ticket["ticket_id"],
        "customer_id": "cust_001",
        "issue": "the cups are chipped",
        "opened_on": "2024-01-15",
    }
    assert state["responses"] == [{"ticket_id": ticket["ticket_id"], "message": "Sorry!"}]


@pytest.mark.parametrize(
    ("tool", "arguments", "status"),
    [
        ("lookup_customer", {"email": "nobody@example.com"}, 404),
        ("get_order_history", {"customer_id": "cust_999"}, 404),
        ("create_ticket", {"customer_id": "cust_999", "issue": "lost"}, 404),
        ("send_response", {"ticket_id": "ticket_999", "message": "Hello"}, 404),
        ("send_response", {"ticket_id": "ticket_001", "message": " "}, 400),
        ("create_ticket", {"customer_id": "cust_001"}, 400),
        ("lookup_customer", {"email": "a@example.com", "phone": "1"}, 400),
        ("issue_refund", {}, 404),
    ],
)
def test_a_refused_call_changes_nothing(
    backend: CustomerSupportBackend, tool: str, arguments: dict[str, str], status: int
) -> None:
    before = backend.snapshot()
    with pytest.raises(ToolError) as refused:
        backend.execute(tool, arguments)
    assert refused.value.status == status
    assert backend.snapshot() == before


def test_a_snapshot_brings_a_backend_back_and_is_its_own(backend: CustomerSupportBackend) -> None:
    start = backend.snapshot()
    backend.execute("create_ticket", {"customer_id": "cust_001", "issue": "late"})
    assert backend.snapshot() != start
    backend.load(start)
    start["tickets"].clear()
    assert backend.snapshot() == DOMAIN.backend(NOW).snapshot()
    with pytest.raises(KeyError):
        backend.reset("no such fixture")
