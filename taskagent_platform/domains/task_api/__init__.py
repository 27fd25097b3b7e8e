"""The Task API: tasks, projects, calendar and reminders of one user."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from taskagent_platform.domains.base import Domain, Example
from taskagent_platform.domains.task_api import examples, prompt
from taskagent_platform.domains.task_api.backend import TaskApiBackend
from taskagent_platform.domains.task_api.tools import TOOLS

_SUITES = Path(__file__).parent / "suites"
_LISTS = ("tool_selection", "argument_extraction", "multi_tool_chains", "abstention")


class TaskApiDomain(Domain):
    """The platform's first domain; see :class:`~taskagent_platform.domains.base.Domain`."""

    name = "task_api"
    tools = TOOLS
    agent_name = prompt.AGENT_NAME
    agent_requests = (
        ("Create a high-priority task to review the Q4 budget", "create_task"),
        ("What tasks do I have right now?", "list_tasks"),
        ("Mark task_001 as complete", "complete_task"),
    )
    sources = examples.SOURCES
    # The second file of arguments is by an author who saw neither the phrasings nor the first, nor what failed there.
    suites = tuple(_SUITES / f"{name}.json" for name in (*_LISTS, "argument_extraction_2"))
    development_suites = tuple(
        _SUITES / "development" / f"{name}.json"
        for name in (*_LISTS, "argument_extraction_2", "multi_tool_chains_2", "requests", "requests_2", "requests_3")
    )
    robustness_suites: tuple[Path, ...] = (_SUITES / "robustness.json",)

    def system_prompt(self, now: datetime) -> str:
        """Returns the system message."""
        return prompt.system_prompt(now)

    def backend(self, now: datetime, fixture: str = "default") -> TaskApiBackend:
        """Returns a fresh simulated Task API."""
        return TaskApiBackend(now, fixture)

    def generate(self, source: str, count: int, seed: int, moments: Sequence[datetime]) -> Iterator[Example]:
        """Yields training examples."""
        return examples.generate(source, count, seed, moments)


DOMAIN = TaskApiDomain()
