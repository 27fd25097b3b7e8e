"""Reading suites: the fixed format, and errors that say where."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.suite import ExpectedValue, Source, Suite, load_suite, load_suites
from taskagent_platform_tests.light_domain import LIGHTS

FULL: dict[str, Any] = {
    "tool_selection": [{"input": "light up", "expected_tool": "set_light", "category": "set"}],
    "argument_extraction": [
        {
            "input": "kitchen to 5",
            "expected_tool": "set_light",
            "expected_args": {"room": {"any_of": ["kitchen", "the kitchen"]}, "level": 5, "color": {"optional": True}},
        }
    ],
    "multi_tool_chains": [
        {
            "input": "add a lamp and time it",
            "expected_chain": ["add_lamp", "add_timer"],
            "expected_args": [{"room": "hall"}, {"at": {"optional": True, "any_of": ["8", "08:00"]}}],
            "dependency": {"add_timer": {"lamp_id": "from:add_lamp"}},
        },
        {"input": "both", "expected_parallel": ["list_lights", "list_lights"], "id": "both", "now": "2024-02-29T23:59"},
    ],
    "abstention": [{"input": "hi", "category": "small_talk", "messages": [{"role": "user", "content": "yo"}]}],
}


def write(folder: Path, content: Any, name: str = "suite.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    return path


def load(folder: Path, content: Any) -> Suite:
    return load_suite([write(folder, content)], LIGHTS)


def test_every_kind_of_case_is_read(tmp_path: Path) -> None:
    suite = load(tmp_path, FULL)
    tool, argument, chain, parallel, abstention = suite.cases
    assert (tool.calls[0].tool, tool.calls[0].arguments, tool.category) == ("set_light", None, "set")
    assert tool.now == datetime(2024, 1, 15, 9)
    assert tool.id == "suite/tool_selection[0]"
    assert argument.calls[0].arguments == {
        "room": ExpectedValue(("kitchen", "the kitchen")),
        "level": ExpectedValue((5,)),
        "color": ExpectedValue(None, optional=True),
    }
    assert chain.ordered
    assert chain.calls[0].sources is None
    assert chain.calls[1].sources == {"lamp_id": Source("add_lamp", "lamp_id")}
    assert chain.calls[1].arguments == {"at": ExpectedValue(("8", "08:00"), optional=True)}
    assert (parallel.id, parallel.ordered, parallel.now) == ("both", False, datetime(2024, 2, 29, 23, 59))
    assert abstention.calls == ()
    assert abstention.messages == ({"role": "user", "content": "yo"},)


def test_a_plain_object_is_a_plain_value(tmp_path: Path) -> None:
    case = {"input": "x", "expected_tool": "set_light", "expected_args": {"room": {"floor": 1}}}
    suite = load(tmp_path, {"argument_extraction": [case]})
    assert suite.cases[0].calls[0].arguments == {"room": ExpectedValue(({"floor": 1},))}


def test_several_files_are_one_suite(tmp_path: Path) -> None:
    one = write(tmp_path, {"abstention": [{"input": "hi"}]}, "one.json")
    two = write(tmp_path, {"abstention": [{"input": "ho"}]}, "two.json")
    suite = load_suite([one, two])
    assert [case.input for case in suite.cases] == ["hi", "ho"]
    assert set(suite.digests) == {"one.json", "two.json"}


def test_the_digest_follows_content_not_names(tmp_path: Path) -> None:
    first = load_suite([write(tmp_path, {"abstention": [{"input": "hi"}]}, "a.json")])
    renamed = load_suite([write(tmp_path, {"abstention": [{"input": "hi"}]}, "b.json")])
    other = load_suite([write(tmp_path, {"abstention": [{"input": "ho"}]}, "c.json")])
    assert first.digest == renamed.digest != other.digest
    assert first.limited(1).digest != first.digest


def test_limited_spreads_over_each_list(tmp_path: Path) -> None:
    content = {"abstention": [{"input": str(n)} for n in range(10)], "tool_selection": FULL["tool_selection"]}
    suite = load(tmp_path, content).limited(3)
    assert [case.input for case in suite.of("abstention")] == ["0", "3", "6"]
    assert len(suite.of("tool_selection")) == 1
    assert suite.case_limit == 3


def bad(list_name: str, **changes: Any) -> dict[str, Any]:
    case = {**FULL[list_name][0], **changes}
    return {list_name: [{k: v for k, v in case.items() if v is not ...}]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"abstention": [\n{"input": "hi"},\n{"input": }]}', "line 3, column 11: not valid JSON"),
        ("[]", "must hold an object of lists, not a list"),
        ('{"abstention": [{"input": "a", "input": "b"}]}', "the key 'input' stands twice"),
        ({"tools": []}, "unknown list 'tools'"),
        ({"abstention": {}}, "abstention must be a list, not an object"),
        ({}, "There is no case in"),
        ({"abstention": [3]}, "abstention[0] (line 3) must be an object, not a number"),
        (bad("tool_selection", input=...), "field input: missing"),
        (bad("tool_selection", input=" "), "field input: ' ' is no text"),
        (bad("tool_selection", input=7), "field input: 7 is no text"),
        (bad("tool_selection", expected_tool=...), "field expected_tool: missing"),
        (bad("tool_selection", expected_tool="fly"), "field expected_tool: lights has no tool 'fly'"),
        (bad("tool_selection", expected_args={}), "field expected_args: unknown field"),
        (bad("tool_selection", now="yesterday"), "field now: 'yesterday' is no moment"),
        (bad("tool_selection", now="2024-01-15T09:00+01:00"), "names a time zone"),
        (bad("tool_selection", now=5), "field now: 5 is no moment"),
        (bad("tool_selection", fixture="moon"), "field fixture: lights has no fixture 'moon'"),
        (bad("argument_extraction", expected_args=...), "field expected_args: missing"),
        (bad("argument_extraction", expected_args=[]), "field expected_args: must be an object, not a list"),
        (bad("argument_extraction", expected_args={"size": 1}), "field expected_args.size: set_light has no argument"),
        (
            bad("argument_extraction", expected_args={"room": {"any_of": []}}),
            "expected_args.room.any_of: [] is no list",
        ),
        (bad("argument_extraction", expected_args={"room": {"any_of": ["a"], "x": 1}}), "unknown key 'x'"),
        (bad("argument_extraction", expected_args={"room": {"optional": 1}}), "1 is neither true nor false"),
        (bad("multi_tool_chains", expected_chain=...), "give either expected_chain or expected_parallel"),
        (bad("multi_tool_chains", expected_parallel=["add_lamp"]), "give either expected_chain or expected_parallel"),
        (bad("multi_tool_chains", expected_chain=[]), "field expected_chain: [] is no list of tools"),
        (bad("multi_tool_chains", expected_chain=["add_lamp", "fly"]), "field expected_chain[1]: lights has no tool"),
        (bad("multi_tool_chains", expected_args=[{}]), "must be a list of 2 objects"),
        (bad("multi_tool_chains", dependency={"set_light": {}}), "dependency.set_light: is not among the expected"),
        (bad("multi_tool_chains", dependency={"add_timer": {"lamp_id": "add_lamp"}}), "is not of the form"),
        (bad("multi_tool_chains", dependency={"add_timer": {"lamp_id": "from:list_lights"}}), "'list_lights' is not"),
        (bad("multi_tool_chains", dependency={"add_timer": {"x": "from:add_lamp"}}), "add_timer has no argument 'x'"),
        (bad("abstention", expected_tool="add_lamp"), "field expected_tool: unknown field"),
        (bad("abstention", messages=[{"role": "system", "content": "x"}]), "messages[0].role: 'system' is none of"),
        (bad("abstention", messages=[{"role": "user"}]), "messages[0].content: None is no text"),
        (bad("abstention", messages=[{"role": "assistant", "tool_calls": [{}]}]), "messages[0].tool_calls[0]: needs"),
    ],
)
def test_errors_say_where_and_what(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(PlatformError) as error:
        load(tmp_path, content)
    assert said in str(error.value)
    assert "suite.json" in str(error.value)


def test_an_error_names_list_index_and_line(tmp_path: Path) -> None:
    text = '{"tool_selection": [\n {"input": "a", "expected_tool": "set_light"},\n\n {"input": "b"}\n]}'
    with pytest.raises(
        PlatformError, match=r"suite\.json, tool_selection\[1\] \(line 4\), field expected_tool: missing"
    ):
        load(tmp_path, text)


def test_robustness_cases_are_kept_apart_and_limited_alike(tmp_path: Path) -> None:
    plain = write(tmp_path, {"abstention": [{"input": str(n)} for n in range(4)]}, "plain.json")
    cases = [{"input": f"h{n}", "slice": "typos"} for n in range(4)]
    hard = write(tmp_path, {"abstention": cases}, "hard.json")
    suites = load_suites([plain], [hard])
    assert suites.robustness is not None
    assert suites.gated.digest == load_suite([plain]).digest
    assert suites.digests == {"suite": suites.gated.digest, "robustness": load_suite([hard]).digest}
    limited = suites.limited(2)
    assert limited.robustness is not None
    assert [case.input for case in limited.gated.cases] == ["0", "2"]
    assert [case.input for case in limited.robustness.cases] == ["h0", "h2"]
    assert limited.digests.keys() == suites.digests.keys()
    assert not set(limited.digests.values()) & set(suites.digests.values())
    assert load_suites([plain], []).limited(1).robustness is None


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ({"input": "teh list"}, "'hard/abstention[0]' ('teh list') names no slice"),
        ({"input": "teh list", "slice": "typos", "id": "x"}, "The id 'x' is that of a robustness case and of another"),
    ],
)
def test_a_robustness_case_has_a_slice_and_an_id_of_its_own(tmp_path: Path, case: dict[str, Any], said: str) -> None:
    plain = write(tmp_path, {"abstention": [{"input": "hi", "id": "x"}]}, "plain.json")
    with pytest.raises(PlatformError) as error:
        load_suites([plain], [write(tmp_path, {"abstention": [case]}, "hard.json")])
    assert said in str(error.value)


def test_ids_are_unique_over_all_files(tmp_path: Path) -> None:
    one = write(tmp_path, {"abstention": [{"input": "hi", "id": "x"}]}, "one.json")
    two = write(tmp_path, {"abstention": [{"input": "ho", "id": "x"}]}, "two.json")
    with pytest.raises(PlatformError, match=r"two\.json.*'x' is also the id of .*one\.json"):
        load_suite([one, two])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match=r"There is no suite file .*none\.json"):
        load_suite([tmp_path / "none.json"])


def test_without_a_domain_any_tool_is_taken(tmp_path: Path) -> None:
    path = write(tmp_path, {"tool_selection": [{"input": "a", "expected_tool": "fly", "fixture": "moon"}]})
    assert load_suite([path]).cases[0].calls[0].tool == "fly"
