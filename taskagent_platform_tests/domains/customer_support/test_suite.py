import pytest

from taskagent_platform.domains.base import ToolError
from taskagent_platform.domains.customer_support import DOMAIN
from taskagent_platform.evaluation.suite import LISTS, Case, load_suite

SUITE = load_suite(DOMAIN.suites, DOMAIN)


@pytest.mark.parametrize("name", LISTS)
def test_the_suite_has_every_list_and_no_request_twice(name: str) -> None:
    inputs = [case.input.casefold() for case in SUITE.cases if case.list_name == name]
    assert len(inputs) >= 12
    assert len(inputs) == len(set(inputs))


@pytest.mark.parametrize("case", SUITE.of("multi_tool_chains"), ids=lambda case: case.id)
def test_the_right_answer_of_a_chain_runs_on_the_fixture(case: Case) -> None:
    backend = DOMAIN.backend(case.now, case.fixture)
    results: dict[str, dict[str, object]] = {}
    for call in case.calls:
        arguments = {name: value.any_of[0] for name, value in (call.arguments or {}).items() if value.any_of}
        for name, source in (call.sources or {}).items():
            assert results[source.tool][source.field] == arguments[name], f"{case.input}: {name}"
        try:
            results[call.tool] = backend.execute(call.tool, arguments)
        except ToolError as error:
            pytest.fail(f"{case.input}: {call.tool}: {error}")
