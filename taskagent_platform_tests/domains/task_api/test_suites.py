"""The shipped suites: large enough to say something, and right by their own backend."""

import json
from collections import Counter

import pytest

from taskagent_platform.domains.task_api import DOMAIN
from taskagent_platform.evaluation.lint import lint_suite
from taskagent_platform.evaluation.suite import INJECTION_SLICE, Case, ListName, load_suite

PLAIN = load_suite(DOMAIN.suites, DOMAIN)
ROBUSTNESS = load_suite(DOMAIN.robustness_suites, DOMAIN)
CAPSTONE_FILE = DOMAIN.suites[0].with_name("capstone.json")
CASES_OF_A_SLICE = 12
SLICES = {
    "typos", "casing", "long_winded", "terse", "non_native", "several_requests", "month_and_year_ends", "leap_years",
    "odd_ids", INJECTION_SLICE, "three_call_chains", "four_call_chains", "later_corrections", "missing_arguments",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "at_least"),
    [("tool_selection", 300), ("argument_extraction", 300), ("multi_tool_chains", 150), ("abstention", 100)],
)
def test_each_list_has_plain_cases_enough(name: ListName, at_least: int) -> None:
    assert sum(not case.slice for case in PLAIN.of(name)) >= at_least


def test_the_capstones_own_cases_are_among_those_that_the_gates_count() -> None:
    def asked(case: Case) -> tuple[object, ...]:
        return case.list_name, case.input, case.now, [call.tool for call in case.calls], case.ordered

    gated = {asked(case)[:3]: case for case in PLAIN.cases}
    for case in load_suite([CAPSTONE_FILE], DOMAIN).cases:
        same = gated[asked(case)[:3]]
        assert asked(same) == asked(case)
        # What the capstone says of arguments and their sources is wanted; the suite may say more.
        for ours, theirs in zip(same.calls, case.calls, strict=True):
            assert ours.sources == theirs.sources
            assert theirs.arguments is None or ours.arguments == theirs.arguments


def test_each_slice_has_cases_enough() -> None:
    counts = Counter(case.slice for case in ROBUSTNESS.cases)
    assert set(counts) == SLICES
    assert min(counts.values()) >= CASES_OF_A_SLICE


def test_no_gold_answer_is_wrong_and_no_case_repeats_another() -> None:
    files = (*DOMAIN.suites, *DOMAIN.robustness_suites, *DOMAIN.development_suites)
    assert lint_suite(load_suite(files, DOMAIN), DOMAIN) == []


@pytest.mark.parametrize(
    "case", [case for case in ROBUSTNESS.cases if case.messages], ids=lambda case: getattr(case, "id", "")
)
def test_an_earlier_conversation_says_what_the_backend_returns(case: Case) -> None:
    backend = DOMAIN.backend(case.now, case.fixture)
    returned: dict[str, dict[str, object]] = {}
    for message in case.messages:
        for call in message.get("tool_calls") or []:
            function = call["function"]
            returned[call["id"]] = backend.execute(function["name"], json.loads(function["arguments"]))
        if message["role"] == "tool":
            assert json.loads(message["content"]) == returned.pop(message["tool_call_id"])
    assert not returned
