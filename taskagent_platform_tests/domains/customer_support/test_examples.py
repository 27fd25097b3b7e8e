import json
from datetime import datetime

import pytest

from taskagent_platform.data.distribution import MIN_EXAMPLES, MIN_FOR_EACH_TOOL, SINGLE_SHARE, distribution
from taskagent_platform.data.jsonl import Record
from taskagent_platform.data.training_dataset import overlap
from taskagent_platform.data.verify import verify
from taskagent_platform.domains.customer_support import DOMAIN
from taskagent_platform.domains.customer_support.examples import PHRASINGS
from taskagent_platform.domains.phrasing import read_templates
from taskagent_platform.settings import DataSettings

MOMENTS = [datetime(2024, 1, 15, 9), datetime(2025, 12, 30, 20, 45), datetime(2024, 2, 29, 7)]
_FILES = sorted(path.name for path in PHRASINGS.glob("*.txt"))


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """A dataset of the specification's sizes."""
    sizes = DataSettings()
    return [
        {"messages": example.messages, "tools": [], "meta": example.meta}
        for source in DOMAIN.sources
        for example in DOMAIN.generate(source, getattr(sizes, source), 42, MOMENTS)
    ]


@pytest.mark.parametrize("name", _FILES)
def test_every_phrasing_gives_all_arguments(name: str) -> None:
    for template in read_templates(PHRASINGS / name):
        for call in template.calls:
            assert set(call.arguments) == set(DOMAIN.tool(call.tool).arguments.model_fields), (name, template.line)


def test_every_example_does_what_it_teaches(records: list[Record]) -> None:
    for number, record in enumerate(records):
        verify(DOMAIN, record, f"example {number}")


def test_the_same_seed_gives_the_same_examples() -> None:
    for source in DOMAIN.sources:
        made = list(DOMAIN.generate(source, 40, 7, MOMENTS))
        assert made == list(DOMAIN.generate(source, 40, 7, MOMENTS))
        assert made != list(DOMAIN.generate(source, 40, 8, MOMENTS))


def test_the_dataset_is_balanced_and_shares_no_request_with_the_suite(records: list[Record]) -> None:
    found = distribution(DOMAIN, records)
    low, high = SINGLE_SHARE
    assert found.total >= MIN_EXAMPLES
    assert low <= found.single_share <= high
    assert min(found.tool_usage.values()) >= MIN_FOR_EACH_TOOL
    assert overlap(DOMAIN, records) == []


def test_arguments_are_the_users_words_or_an_earlier_result(records: list[Record]) -> None:
    for record in records:
        known = ""
        for message in record["messages"][1:]:
            for call in message.get("tool_calls") or []:
                for value in json.loads(call["function"]["arguments"]).values():
                    assert value.casefold() in known, record["messages"][1:]
            known += (message["content"] or "").casefold()


def test_a_chain_stops_where_the_customer_is_not_found(records: list[Record]) -> None:
    stopped = [
        record["messages"]
        for record in records
        if record["meta"]["pattern"] == "chains" and "not_found" in (record["messages"][3]["content"] or "")
    ]
    assert stopped
    for messages in stopped:
        assert len(messages) == 5
        assert messages[-1]["content"].startswith("I couldn't find")
