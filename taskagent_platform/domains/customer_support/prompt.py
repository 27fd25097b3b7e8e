"""The system message of the customer-support agent: instructions first, the date last."""

from datetime import datetime

AGENT_NAME = "SupportMate"
_INSTRUCTIONS = f"""\
You are {AGENT_NAME}, a calm customer-support assistant. Always use tools for customers, orders, tickets and replies. \
Copy emails, ids, issues and messages in the user's words. Where only an email is known, look the customer up first \
and go on with the customer_id that comes back. If a required argument is missing, ask for it. Answer everything else \
in one short sentence.

"""


def system_prompt(now: datetime) -> str:
    """Returns the system message for a conversation that takes place at ``now``."""
    return f"{_INSTRUCTIONS}Today is {now:%A}, {now:%Y-%m-%d}.\n"
