"""Our scorer agrees with BFCL's own checker, but for what is listed with its reason.

Installs BFCL into an environment of its own (`make bfcl` runs this alone).
"""

import json
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from taskagent_platform.evaluation.bfcl import CATEGORIES, PACKAGE, Bfcl, ask_bfcl, install_bfcl
from taskagent_platform.evaluation.client import Endpoint
from taskagent_platform.settings import load_settings
from taskagent_platform.training.template import chat_template, prepare_messages
from taskagent_platform_tests.evaluation import bfcl_agreement
from taskagent_platform_tests.evaluation.light_server import LightServer
from taskagent_platform_tests.serving.fake_server import serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def bfcl() -> Bfcl:
    return install_bfcl(load_settings())


@pytest.fixture(scope="module")
def listed() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(bfcl_agreement.FILE.read_text())
    return content


def test_every_disagreement_is_listed_and_explained(bfcl: Bfcl, listed: dict[str, Any]) -> None:
    assert listed["package"] == PACKAGE
    answers, found = bfcl_agreement.compare(bfcl)
    assert answers == listed["answers"]
    assert bfcl_agreement.grouped(found) == {
        (entry["mutation"], entry["ours"], entry["bfcl"]): entry["cases"] for entry in listed["disagreements"]
    }
    assert {entry["reason"] for entry in listed["disagreements"]} == set(listed["reasons"])
    assert all(len(reason) > 40 for reason in listed["reasons"].values())


def test_on_right_answers_they_differ_only_where_these_break_their_own_schema(listed: dict[str, Any]) -> None:
    right = [entry for entry in listed["disagreements"] if entry["mutation"].startswith("right")]
    assert {entry["reason"] for entry in right} == {"type_of_the_right_answer"}
    assert len({case for entry in right for case in entry["cases"]}) <= 4


def test_a_server_that_answers_rightly_is_right_in_every_category(bfcl: Bfcl) -> None:
    cases = bfcl.cases(sample=3)
    assert {case.category for case in cases} == set(CATEGORIES)
    turns: dict[str, Any] = {}
    for case in cases:
        task = bfcl_agreement.task_of(case)
        calls = next(bfcl_agreement.variants(task)).calls if task.calls else ()
        if case.category == "live_relevance":
            calls = ((case.tools[0]["function"]["name"], "{}"),)
        if calls:
            turns[case.messages[-1]["content"]] = [[(name, json.loads(arguments)) for name, arguments in calls]]
    with serve(LightServer(turns).app) as url:
        result = ask_bfcl(bfcl, Endpoint(f"{url}/v1", "m", 64), cases, concurrency=4)
    # Values in the syntax of Java and JavaScript are listed as what they mean, not as they are to be written.
    wrong = {case.category for case in result.cases if not case.passed} - {"simple_java", "simple_javascript"}
    assert wrong == set()


def test_the_chat_template_renders_every_case(bfcl: Bfcl) -> None:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps
    template = environment.from_string(chat_template())
    for case in bfcl.cases():
        text = template.render(
            messages=prepare_messages(case.messages), tools=list(case.tools) or None, add_generation_prompt=True
        )
        for tool in case.tools:
            assert f"{tool['function']['name']}(" in text
