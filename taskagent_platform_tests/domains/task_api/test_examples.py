import json
import random
import re
from collections import Counter
from datetime import datetime
from itertools import groupby
from operator import itemgetter

import pytest

from taskagent_platform.data.verify import verify
from taskagent_platform.domains.base import Message
from taskagent_platform.domains.phrasing import Result, Slot, read_templates
from taskagent_platform.domains.task_api import DOMAIN
from taskagent_platform.domains.task_api.date_words import MONTHS, day_words, month_years
from taskagent_platform.domains.task_api.examples import PHRASINGS, TaskApiWriter, generate
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


_SPOKEN = re.compile(
    r"(?:a )?(?:(?P<minutes>five|ten|quarter|twenty|twenty-five|half) (?P<side>past|to) )?(?P<hour>\w+)"
    r" in the (?P<part>morning|afternoon|evening)"
)
_MINUTES = {"five": 5, "ten": 10, "quarter": 15, "twenty": 20, "twenty-five": 25, "half": 30}
_HOURS = ["twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]


def test_times_in_words_mean_what_they_say():
    checked = 0
    for seed in range(1500):
        filled = Wording(random.Random(seed), MOMENTS[0]).fill(Slot("time"))
        said = _SPOKEN.fullmatch(filled.text)
        if not said:
            continue
        hour = said["hour"]
        minutes = (int(hour) % 12 if hour.isdigit() else _HOURS.index(hour)) * 60
        minutes += _MINUTES[said["minutes"]] * (1 if said["side"] == "past" else -1) if said["minutes"] else 0
        # The half of the day decides; twelve at noon is in the afternoon, and a quarter to it in the morning.
        minutes = minutes % 720 + (0 if said["part"] == "morning" else 720)
        assert filled.value == f"{minutes // 60:02d}:{minutes % 60:02d}", filled.text
        assert filled.note.endswith(f" {filled.value}")
        checked += 1
    assert checked > 80


def test_a_task_that_is_looked_up_is_the_only_one_found():
    found = 0
    for example in generate("multi_tool", 400, 5, MOMENTS):
        if example.meta["pattern"] != "found":
            continue
        (looked_up,) = example.messages[2]["tool_calls"]
        (listed,) = json.loads(example.messages[3]["content"])["tasks"]
        assert looked_up["function"]["name"] == "list_tasks"
        for call in example.messages[4]["tool_calls"]:
            assert json.loads(call["function"]["arguments"])["task_id"] == listed["task_id"]
        found += 1
    assert found > 25


def test_what_is_found_is_acted_on_every_one_of_it():
    acted = 0
    for example in generate("multi_tool", 400, 5, MOMENTS):
        if example.meta["pattern"] != "each":
            continue
        listed = json.loads(example.messages[3]["content"])["tasks"]
        calls = example.messages[4]["tool_calls"]
        assert "each " in example.messages[2]["content"]
        assert [json.loads(call["function"]["arguments"])["task_id"] for call in calls] == [
            task["task_id"] for task in listed
        ]
        acted += len(calls) > 1
    assert acted > 20


def test_a_date_that_is_looked_up_is_that_of_the_event_or_task_that_was_named():
    found = 0
    for example in generate("multi_tool", 400, 5, MOMENTS):
        if example.meta["pattern"] != "looked_up":
            continue
        request = example.messages[1]["content"].casefold()
        result = json.loads(example.messages[3]["content"])
        dates = {
            name: value
            for call in example.messages[4]["tool_calls"]
            for name, value in json.loads(call["function"]["arguments"]).items()
            if name in ("due_date", "remind_at", "start_date")
        }
        if "tasks" in result:
            (wanted,) = (task["due_date"] for task in result["tasks"])
        else:
            wanted = max(
                (event for event in result["events"] if event["title"].casefold() in request),
                key=lambda event: len(event["title"]),
            )["starts_at"]
        for name, value in dates.items():
            assert value == (wanted if name == "remind_at" else wanted[:10]), example.messages
        found += len(dates)
    assert found > 20


def test_a_second_priority_of_a_request_is_another_one():
    for seed in range(20):
        wording = Wording(random.Random(seed), MOMENTS[0])
        levels = [wording.fill(Slot(kind, draw)).value for kind, draw in (("priority", ""), ("prio", "2"))]
        assert levels[0] != levels[1]


def test_listings_that_nothing_follows_are_often_answered_and_often_long():
    answered: Counter[tuple[str, bool]] = Counter()
    long = 0
    for example in generate("function_calling", 900, 5, MOMENTS):
        calls = [call for message in example.messages for call in message.get("tool_calls", ())]
        if len(calls) != 1 or sum(message["role"] == "user" for message in example.messages) > 1:
            continue
        has_answer = example.messages[-1]["role"] == "assistant" and not example.messages[-1].get("tool_calls")
        tool = calls[0]["function"]["name"]
        answered["list" if tool == "list_tasks" else "other", has_answer] += 1
        if tool == "list_tasks" and has_answer:
            long += len(json.loads(example.messages[-2]["content"])["tasks"]) > 3
    shares = {kind: answered[kind, True] / (answered[kind, True] + answered[kind, False]) for kind in ("list", "other")}
    assert shares["list"] > 1.2 * shares["other"]
    assert long >= 5


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
            month = any(word.removeprefix("end of ").startswith(name) for name in MONTHS)
            soon = any(note.startswith(f"{line} ") for line in lines if line.startswith("in "))
            two_digits = word.isdigit() and meaning == f"{int(word):02d}"
            assert note in lines or month or clock or soon or two_digits or "today" in asked["content"], note
            noted += any(meaning in str(value) for value in arguments.values())
    assert noted > 80


def test_the_day_of_the_month_is_noted_in_two_digits_before_its_date():
    found = 0
    for example in generate("structured_outputs", 300, 5, MOMENTS):
        for day, written, month, noted in re.findall(
            r"(\d+) (\d+), ([A-Z][a-z]+) (?:\d{4}-)?(\d\d-\d\d)", example.messages[2]["content"] or ""
        ):
            assert (written, noted) == (f"{int(day):02d}", f"{MONTHS.index(month) + 1:02d}-{written}")
            found += 1
    assert found > 20


def test_every_noted_month_is_a_line_of_the_prompt_and_its_date_goes_on_from_it():
    found = 0
    for example in generate("structured_outputs", 300, 5, MOMENTS):
        lines = example.messages[0]["content"].splitlines()
        for month, date in re.findall(r"\b([A-Z][a-z]+) ([\d-]+)-\d\d\b", example.messages[2]["content"] or ""):
            if month in MONTHS:
                assert f"{month} {date}" in lines
                found += 1
    assert found > 20


def test_some_titles_are_put_together_from_words_that_nobody_put_together():
    listed = set(TaskApiWriter.values("titles")) | set(TaskApiWriter.values("nouns"))
    titles = [
        json.loads(call["function"]["arguments"])["title"].casefold()
        for example in generate("structured_outputs", 300, 5, MOMENTS)
        for call in example.messages[2].get("tool_calls") or []
        if call["function"]["name"] == "create_task"
    ]
    new = [title for title in titles if title not in {one.casefold() for one in listed}]
    assert len(titles) > 80
    assert 0.2 < len(new) / len(titles) < 0.8


def test_the_plan_names_what_was_mentioned_in_the_order_of_the_request():
    orders = set()
    for example in generate("structured_outputs", 500, 5, MOMENTS):
        request, asked = example.messages[1:3]
        given = json.loads(asked["tool_calls"][0]["function"]["arguments"])
        plan = (asked["content"] or "").split(", ")
        said = request["content"].casefold()
        # A short tag may stand in the title, too.
        if {"project_id", "tags"} <= set(given) and said.count(_said(given["tags"])) == 1:
            places = {name: said.find(_said(given[name])) for name in ("project_id", "tags")}
            assert plan.index("project_id") < plan.index("tags") or places["tags"] < places["project_id"]
            assert plan.index("tags") < plan.index("project_id") or places["project_id"] < places["tags"]
            orders.add(plan.index("tags") < plan.index("project_id"))
        optional = {"priority", "tags", "project_id", "status", "description"} & set(given)
        assert optional <= set(plan)
    assert orders == {True, False}


_FIELDS = {name for tool in DOMAIN.tools for name in tool.arguments.model_fields}


def _said(value):
    return (value[0] if isinstance(value, list) else value).casefold()


def test_the_plan_of_a_turn_names_the_tools_of_its_calls_in_order():
    seen = 0
    for example in generate("multi_tool", 120, 5, MOMENTS):
        turns: list[list[Message]] = [[]]
        for message in example.messages[1:]:
            if message["role"] == "user":
                turns.append([])
            elif message.get("tool_calls"):
                turns[-1].append(message)
        for steps in turns:
            calls = [call["function"] for message in steps for call in message["tool_calls"]]
            assert not any(message["content"] for message in steps[1:])
            # A chain that was broken off, or whose last step was left unsaid, was planned to its end.
            plans = re.split("; | then ", steps[0]["content"] or "") if steps else []
            if len(calls) < 2:
                continue
            if any(plan.startswith("each ") for plan in plans):
                # How many there are is not known yet.
                plans = [plan.removeprefix("each ") for plan in plans]
                calls = [next(same) for _, same in groupby(calls, key=itemgetter("name"))]
            assert [plan.split(" ")[0] for plan in plans][: len(calls)] == [call["name"] for call in calls]
            for plan, call in zip(plans, calls, strict=False):
                named = {word for word in plan.split(" ", 1)[-1].split(", ") if word in _FIELDS}
                assert named <= set(json.loads(call["arguments"]))
            seen += 1
    assert seen > 60


def test_clauses_add_attributes_that_the_request_says():
    added: Counter[str] = Counter()
    rng = random.Random(4)
    for tool in ("create_task", "list_tasks", "update_task", "create_project"):
        for template in TaskApiWriter.templates(tool):
            extended = TaskApiWriter.with_clauses(template, rng)
            before, after = template.calls[0].arguments, extended.calls[0].arguments
            assert before.items() <= after.items()
            added[tool] += len(after) > len(before)
            slots = {piece.key for piece in extended.turns[0].request if isinstance(piece, Slot)}
            for value in after.values():
                texts = [] if isinstance(value, Result) else value if isinstance(value, list) else [value]
                assert {piece.key for text in texts for piece in text if isinstance(piece, Slot)} <= slots
    assert min(added.values()) > 10


def test_no_clause_is_glued_to_the_request_before_it():
    for tool in ("create_task", "list_tasks", "update_task", "create_project"):
        for clause in TaskApiWriter.templates(f"clauses_{tool}"):
            first = clause.turns[0].request[0]
            assert isinstance(first, str), (tool, clause.line)
            assert not first[0].isalnum(), (tool, clause.line)
