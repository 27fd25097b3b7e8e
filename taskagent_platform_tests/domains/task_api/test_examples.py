import json
import re
from datetime import datetime

import pytest

from taskagent_platform.data.verify import verify
from taskagent_platform.domains.phrasing import Slot, read_templates
from taskagent_platform.domains.task_api import DOMAIN
from taskagent_platform.domains.task_api.date_words import MONTHS, day_words, month_years
from taskagent_platform.domains.task_api.examples import PHRASINGS, generate
from taskagent_platform.domains.task_api.wording import Wording
from taskagent_platform.errors import PlatformError

MOMENTS = [datetime(2024, 1, 15, 9), datetime(2025, 12, 30, 20, 45), datetime(2024, 2, 29, 7)]
_FILES = sorted(path.name for path in PHRASINGS.glob("*.txt"))


@pytest.mark.parametrize("name", _FILES)
def test_every_phrasing_gives_legal_arguments(name):
    fields = {tool.name: tool.arguments.model_fields for tool in DOMAIN.tools}
    for template in read_templates(PHRASINGS / name):
        for call in template.calls:
            assert set(call.arguments) <= set(fields[call.tool]), (name, template.line)
            required = {key for key, field in fields[call.tool].items() if field.is_required()}
            assert name.startswith("clauses") or required <= set(call.arguments), (name, template.line)


@pytest.mark.parametrize("source", DOMAIN.sources)
def test_examples_hold_and_are_the_same_for_the_same_seed(source):
    made = list(generate(source, 150, 7, MOMENTS))
    tools = DOMAIN.openai_tools()
    for number, example in enumerate(made):
        verify(DOMAIN, {"messages": example.messages, "tools": tools, "meta": example.meta}, f"example {number}")
    assert made == list(generate(source, 150, 7, MOMENTS))
    assert made != list(generate(source, 150, 8, MOMENTS))
    assert {example.meta["now"] for example in made} == {moment.isoformat(timespec="minutes") for moment in MOMENTS}


def test_verify_refuses_a_result_that_the_backend_does_not_give():
    example = next(e for e in generate("multi_tool", 50, 7, MOMENTS) if e.messages[-2]["role"] == "tool")
    record = json.loads(json.dumps({"messages": example.messages, "tools": [], "meta": example.meta}))
    record["messages"][-2]["content"] = "{}"
    with pytest.raises(PlatformError, match="example 3, messages"):
        verify(DOMAIN, record, "example 3")


def test_values_are_the_users_words():
    for example in generate("structured_outputs", 200, 3, MOMENTS):
        asked = example.messages[1]["content"].casefold()
        for call in example.messages[2]["tool_calls"]:
            arguments = json.loads(call["function"]["arguments"])
            for name in ("title", "name", "description"):
                if name in arguments:
                    assert arguments[name].casefold() in asked, (asked, arguments)


@pytest.mark.parametrize("now", MOMENTS)
def test_dates_mean_what_they_say(now):
    import random

    wording = Wording(random.Random(1), now)
    words = day_words(now)
    years = month_years(now)
    checked = 0
    for _ in range(400):
        filled = wording.fill(Slot("date"))
        day = datetime.fromisoformat(filled.value)
        if filled.text in words:
            assert day.date() == words[filled.text]
            checked += 1
        month = next((name for name in years if filled.text.startswith(name)), None)
        if month:
            assert (day.year, day.strftime("%B")) == (years[month], month)
            checked += 1
    assert checked > 150


def test_every_noted_date_is_a_line_of_the_prompt_or_follows_from_one():
    noted = 0
    for example in generate("structured_outputs", 300, 5, MOMENTS):
        asked = example.messages[2]
        if not asked["content"]:
            continue
        lines = example.messages[0]["content"].splitlines()
        hours = next(line for line in lines if line.startswith("hours: "))
        arguments = json.loads(asked["tool_calls"][0]["function"]["arguments"])
        for note in asked["content"].split(", "):
            if note in arguments:
                continue
            word, _, meaning = note.rpartition(" ")
            clock = re.fullmatch(r"[0-9:]+[ap]m", word) or f"{note.removesuffix(':00')}," in f"{hours},"
            month = any(word.startswith(name) for name in MONTHS)
            soon = any(note.startswith(f"{line} ") for line in lines if line.startswith("in "))
            assert note in lines or month or clock or soon or "today" in asked["content"], note
            noted += any(meaning in str(value) for value in arguments.values())
    assert noted > 80


def test_the_plan_names_what_was_mentioned_in_the_order_of_the_request():
    orders = set()
    for example in generate("structured_outputs", 500, 5, MOMENTS):
        request, asked = example.messages[1:3]
        given = json.loads(asked["tool_calls"][0]["function"]["arguments"])
        plan = (asked["content"] or "").split(", ")
        if {"project_id", "tags"} <= set(given):
            places = {name: request["content"].casefold().find(_said(given[name])) for name in ("project_id", "tags")}
            assert plan.index("project_id") < plan.index("tags") or places["tags"] < places["project_id"]
            assert plan.index("tags") < plan.index("project_id") or places["project_id"] < places["tags"]
            orders.add(plan.index("tags") < plan.index("project_id"))
        optional = {"priority", "tags", "project_id", "status", "description"} & set(given)
        assert optional <= set(plan)
    assert orders == {True, False}


_FIELDS = {name for tool in DOMAIN.tools for name in tool.arguments.model_fields}


def _said(value):
    return (value[0] if isinstance(value, list) else value).casefold()


def test_the_plan_of_several_calls_names_their_tools():
    seen = 0
    for example in generate("multi_tool", 120, 5, MOMENTS):
        for message in example.messages:
            calls = message.get("tool_calls", [])
            if len(calls) < 2:
                continue
            plans = message["content"].split("; ")
            assert [plan.split(" ")[0] for plan in plans] == [call["function"]["name"] for call in calls]
            for plan, call in zip(plans, calls, strict=True):
                given = json.loads(call["function"]["arguments"])
                named = [word for word in plan.split(" ", 1)[-1].split(", ") if word in _FIELDS]
                assert set(named) <= set(given)
            seen += 1
    assert seen > 40
