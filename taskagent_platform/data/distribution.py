"""What a dataset consists of: the specification's distribution report and its balance rules."""

from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel

from taskagent_platform.data.jsonl import Record
from taskagent_platform.domains.base import Domain

MIN_EXAMPLES = 500
MIN_FOR_EACH_TOOL = 20
SINGLE_SHARE = (0.60, 0.80)


class Distribution(BaseModel):
    """Counts over a dataset.

    Attributes:
        total: examples.
        multi_tool: examples that make two calls or more; all others count as single.
        no_tool: examples among the single ones that make no call.
        average_turns: messages for each example, the system message left out.
        tool_usage: calls of each tool.
        sources: examples of each source.
    """

    total: int
    multi_tool: int
    no_tool: int
    average_turns: float
    tool_usage: dict[str, int]
    sources: dict[str, int]

    @property
    def single_share(self) -> float:
        """The share of examples with one call or none, from 0 to 1."""
        return 1 - self.multi_tool / self.total if self.total else 0.0

    def rows(self) -> list[tuple[str, str]]:
        """Returns the report line by line: what is counted, and the count."""
        single = self.total - self.multi_tool
        return [
            ("examples", str(self.total)),
            ("single-tool (none included)", f"{single} ({self.single_share:.1%})"),
            ("multi-tool", f"{self.multi_tool} ({1 - self.single_share:.1%})"),
            ("without a tool", str(self.no_tool)),
            ("average turns", f"{self.average_turns:.1f}"),
            *((f"source {name}", str(count)) for name, count in self.sources.items()),
            *((f"calls of {name}", str(count)) for name, count in self.tool_usage.items()),
        ]

    def table(self) -> str:
        """Returns the report as Markdown."""
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in self.rows())])

    def text(self) -> str:
        """Returns the report for a terminal."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {value:>14}" for name, value in rows)


def distribution(domain: Domain, records: Sequence[Record]) -> Distribution:
    """Counts what the records consist of; every tool of the domain is listed, used or not."""
    usage = Counter({tool.name: 0 for tool in domain.tools})
    sources: Counter[str] = Counter()
    turns = multi = none = 0
    for record in records:
        calls = [call["function"]["name"] for message in record["messages"] for call in message.get("tool_calls") or []]
        usage.update(calls)
        multi += len(calls) > 1
        none += not calls
        turns += sum(message["role"] != "system" for message in record["messages"])
        sources[record["meta"].get("source", "unknown")] += 1
    return Distribution(
        total=len(records),
        multi_tool=multi,
        no_tool=none,
        average_turns=turns / len(records) if records else 0.0,
        tool_usage=dict(usage),
        sources=dict(sources),
    )
