"""Customer support: customers, their orders, tickets and the replies to them."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from taskagent_platform.domains.base import Domain, Example
from taskagent_platform.domains.customer_support import prompt
from taskagent_platform.domains.customer_support.backend import CustomerSupportBackend
from taskagent_platform.domains.customer_support.examples import SOURCES, CustomerSupportWriter
from taskagent_platform.domains.customer_support.tools import TOOLS


class CustomerSupportDomain(Domain):
    """A second, small domain; see :class:`~taskagent_platform.domains.base.Domain`."""

    name = "customer_support"
    tools = TOOLS
    agent_name = prompt.AGENT_NAME
    agent_requests = (
        ("Look up the customer with the email maria.lopez@example.com", "lookup_customer"),
        ("What has customer cust_002 ordered so far?", "get_order_history"),
        ("Open a ticket for cust_003 because the blender arrived with a cracked lid", "create_ticket"),
        ('Reply to ticket_001: "Your refund was issued this morning."', "send_response"),
    )
    sources = SOURCES
    suites = (Path(__file__).parent / "suites" / "customer_support.json",)

    def system_prompt(self, now: datetime) -> str:
        """Returns the system message."""
        return prompt.system_prompt(now)

    def backend(self, now: datetime, fixture: str = "default") -> CustomerSupportBackend:
        """Returns a fresh simulated customer-support service."""
        return CustomerSupportBackend(now, fixture)

    def generate(self, source: str, count: int, seed: int, moments: Sequence[datetime]) -> Iterator[Example]:
        """Yields training examples."""
        return CustomerSupportWriter.generate(source, count, seed, moments)


DOMAIN = CustomerSupportDomain()
