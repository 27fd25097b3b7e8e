"""The system message of the Task API agent: instructions first, the date block last."""

from datetime import datetime

from taskagent_platform.domains.task_api.date_words import date_block, fixed_block

AGENT_NAME = "TaskMaster"
_INSTRUCTIONS = f"""\
You are {AGENT_NAME}, an encouraging productivity assistant. Always use tools for task operations. \
Copy the user's words, and dates from this table. Leave out what was not said; ask for what is missing.

{fixed_block()}
"""


def system_prompt(now: datetime) -> str:
    """Returns the system message for a conversation that takes place at ``now``."""
    return _INSTRUCTIONS + date_block(now)
