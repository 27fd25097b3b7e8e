"""Training examples of customer support: phrasings filled in, executed on the backend and answered."""

import random
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from taskagent_platform.domains.customer_support.answers import answer
from taskagent_platform.domains.customer_support.backend import CustomerSupportBackend, State
from taskagent_platform.domains.customer_support.prompt import system_prompt
from taskagent_platform.domains.customer_support.tools import TOOLS
from taskagent_platform.domains.example_writer import Done, ExampleWriter, Filled
from taskagent_platform.domains.phrasing import Slot, Template

PHRASINGS = Path(__file__).parent / "phrasings"
_STATUSES = ("delivered", "delivered", "shipped", "processing", "returned")


class CustomerSupportWriter(ExampleWriter):
    """Writes one example; see :class:`~taskagent_platform.domains.example_writer.ExampleWriter`."""

    phrasings = PHRASINGS
    tools = TOOLS
    mixes = {
        "structured_outputs": {"create_ticket+": 55, "send_response+": 45},
        "function_calling": {"lookup_customer": 38, "get_order_history": 38, "no_tool": 12, "missing": 12},
        "multi_tool": {"chains": 63, "parallel": 27, "conversations": 10},
    }
    shares_answered = {"single": 0.2, "parallel": 0.4, "chains": 0.6, "conversations": 0.4}
    # In a chain too: a customer who is not found ends it.
    shares_missing = {"single": 0.08, "chains": 0.05}

    def __init__(self, rng: random.Random, now: datetime) -> None:
        super().__init__(rng, now)
        self._people: dict[str, tuple[str, str]] = {}
        self._owners: dict[str, tuple[str, str]] = {}
        self._drawn: set[str] = set()

    def system_prompt(self) -> str:
        return system_prompt(self.now)

    def backend(self, state: State) -> CustomerSupportBackend:
        backend = CustomerSupportBackend(self.now, "empty")
        backend.load(state)
        return backend

    def answer(self, done: Sequence[Done]) -> str:
        return answer(done)

    def fill(self, slot: Slot) -> Filled:
        makers: dict[str, Callable[[], Filled]] = {
            "name": lambda: _as_it_is(" ".join(self._person(slot.draw))),
            "email": lambda: self._email(slot.draw),
            "cust": lambda: self._id("customer", ("cust_{:03d}", "C-{}")),
            "ticket": lambda: self._id("ticket", ("ticket_{:03d}", "TK-{}")),
            "issue": self._issue,
            "trouble": self._trouble,
            "message": lambda: self._fresh("messages"),
            "say": lambda: self._fresh("sayings"),
        }
        return makers[slot.kind]()

    def state(self, template: Template, *, complete: bool) -> State:
        """Returns a state in which every customer and ticket that the calls name exists, among a few others."""
        named = [
            (name, self.mean(value))
            for call in template.calls
            for name, value in call.arguments.items()
            if isinstance(value, tuple)
        ]
        state: State = {"customers": [], "orders": [], "tickets": [], "responses": []}
        if complete:
            for name, value in named:
                if name in ("email", "customer_id"):
                    self._add_customer(state, name, value)
                elif name == "ticket_id" and all(ticket["ticket_id"] != value for ticket in state["tickets"]):
                    state["tickets"].append(self._ticket(value, self._new_customer_id(state)))
        for _ in range(self.rng.choice((0, 1, 1, 2))):
            self._add_customer(state, "customer_id", self._new_customer_id(state))
        self.rng.shuffle(state["customers"])
        return state

    def _add_customer(self, state: State, field: str, value: str) -> None:
        if any(customer[field] == value for customer in state["customers"]):
            return
        first, last = self._owners.get(value) or self._draw_person()
        address = f"{first}.{last}@{self.rng.choice(self.values('mail_domains'))}".lower()
        customer = {"customer_id": self._new_customer_id(state), "name": f"{first} {last}", "email": address}
        customer[field] = value
        state["customers"].append(customer)
        for _ in range(self.rng.choice((0, 1, 2, 2, 3, 4))):
            order = {
                "order_id": f"order_{self.rng.randint(1000, 9999)}",
                "customer_id": customer["customer_id"],
                "item": self.rng.choice(self.values("items")),
                "ordered_on": str(self.now.date() - timedelta(days=self.rng.randint(0, 200))),
                "status": self.rng.choice(_STATUSES),
            }
            state["orders"].append(order)

    def _ticket(self, ticket_id: str, customer_id: str) -> dict[str, Any]:
        opened = self.now.date() - timedelta(days=self.rng.randint(0, 20))
        issue = self.rng.choice(self.values("complaints"))
        return {"ticket_id": ticket_id, "customer_id": customer_id, "issue": issue, "opened_on": str(opened)}

    def _new_customer_id(self, state: State) -> str:
        taken = {customer["customer_id"] for customer in state["customers"]}
        numbers = (f"cust_{self.rng.randint(1, 400):03d}" for _ in range(100))
        return next(number for number in numbers if number not in taken)

    def _draw_person(self) -> tuple[str, str]:
        return self.rng.choice(self.values("first_names")), self.rng.choice(self.values("last_names"))

    def _person(self, draw: str) -> tuple[str, str]:
        return self._people.setdefault(draw, self._draw_person())

    def _email(self, draw: str) -> Filled:
        first, last = self._person(draw)
        number = self.rng.choice(("", "", "", str(self.rng.randint(1, 99))))
        forms = ("{f}.{l}", "{f}.{l}", "{f}{l}", "{i}.{l}", "{f}_{l}", "{l}.{f}", "{f}", "{i}{l}")
        local = self.rng.choice(forms).format(f=first, l=last, i=first[0]).lower() + number
        address = f"{local}@{self.rng.choice(self.values('mail_domains'))}"
        self._owners[address] = (first, last)
        return _as_it_is(address)

    def _id(self, noun: str, forms: Sequence[str]) -> Filled:
        """Draws an id: written as the system writes it, or as a number with its noun."""
        number = self.rng.choice((self.rng.randint(1, 400), self.rng.randint(1000, 9999)))
        if self.rng.random() < 0.55:
            value = self.rng.choice((forms[0], *forms)).format(number)
            return Filled(value if self.rng.random() < 0.6 else f"{noun} {value}", value)
        wordings = ("{noun} {n}", "{noun} {n}", "{noun} #{n}", "{noun} number {n}", "{noun} no. {n}", "#{n}")
        # A bare number is taken for a ticket; a customer is called one.
        wording = self.rng.choice(wordings if noun == "ticket" else wordings[:-1])
        return Filled(wording.format(noun=noun, n=number), str(number))

    def _issue(self) -> Filled:
        if self.rng.random() < 0.4:
            return self._fresh("complaints")
        article = self.rng.choice(("the", "the", "their"))
        return _as_it_is(f"{article} {self._fresh('items').value} {self._fresh('faults').value}")

    def _trouble(self) -> Filled:
        trouble = self._fresh("troubles").value
        return _as_it_is(trouble.format(item=self._fresh("items").value) if "{item}" in trouble else trouble)

    def _fresh(self, name: str) -> Filled:
        """Draws a value that this request does not hold yet."""
        value = self.rng.choice([value for value in self.values(name) if value not in self._drawn])
        self._drawn.add(value)
        return _as_it_is(value)


def _as_it_is(text: str) -> Filled:
    return Filled(text, text)


SOURCES = tuple(CustomerSupportWriter.mixes)
