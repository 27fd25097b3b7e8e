"""The four tools of customer support and their arguments."""

from pydantic import BaseModel, ConfigDict

from taskagent_platform.domains.base import Tool


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LookupCustomer(_Arguments):
    email: str


class GetOrderHistory(_Arguments):
    customer_id: str


class CreateTicket(_Arguments):
    customer_id: str
    issue: str


class SendResponse(_Arguments):
    ticket_id: str
    message: str


TOOLS = (
    Tool("lookup_customer", "find a customer by email, returns customer_id", LookupCustomer),
    Tool("get_order_history", "show a customer's orders", GetOrderHistory),
    Tool("create_ticket", "open a ticket, returns ticket_id", CreateTicket),
    # Destructive: what was sent to a customer cannot be taken back.
    Tool("send_response", "send a message to the customer of a ticket", SendResponse, destructive=True),
)
