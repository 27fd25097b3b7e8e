from datetime import datetime

import pytest

from taskagent_platform.domains.base import ToolError
from taskagent_platform.domains.task_api import DOMAIN

NOW = datetime(2024, 1, 15, 9)


@pytest.fixture
def backend():
    return DOMAIN.backend(NOW)


def _task(backend, task_id):
    return next(task for task in backend.snapshot()["tasks"] if task["task_id"] == task_id)


def test_a_new_task_is_listed(backend):
    made = backend.execute("create_task", {"title": "Buy ink", "tags": ["office"], "due_date": "2024-01-19"})
    listed = backend.execute("list_tasks", {"tags": ["Office"], "status": "open", "due_before": "2024-01-19"})
    assert [task["task_id"] for task in listed["tasks"]] == [made["task_id"]]


@pytest.mark.parametrize(
    "reference", ["task_001", "Review budget proposal", "the review budget proposal", "Review budget proposal!"]
)
def test_a_task_is_found_by_id_or_title(backend, reference):
    assert backend.execute("complete_task", {"task_id": reference})["task_id"] == "task_001"
    assert _task(backend, "task_001")["status"] == "completed"


def test_an_exact_id_wins_over_a_title(backend):
    backend.execute("create_task", {"title": "45"})
    assert backend.execute("delete_task", {"task_id": "45"})["title"] == "Write release notes"


def test_a_title_is_told_apart_by_its_signs_and_taken_as_it_stands_first(backend):
    """What a person approves by its title must not be another task."""
    made = {
        title: backend.execute("create_task", {"title": title})["task_id"]
        for title in ("C++", "🎉", "Plan: B", "plan b")
    }
    for other in ("C#", "C", "🔥", "...", "!!!"):
        with pytest.raises(ToolError, match=r"there is no task"):
            backend.execute("delete_task", {"task_id": other})
    for title, task_id in made.items():
        assert backend.execute("delete_task", {"task_id": title.upper()})["task_id"] == task_id


def test_an_ambiguous_title_is_refused_with_its_candidates(backend):
    backend.execute("create_task", {"title": "Water the plants"})
    before = backend.snapshot()
    with pytest.raises(ToolError) as error:
        backend.execute("delete_task", {"task_id": "water the plants"})
    assert error.value.status == 409
    assert [c["task_id"] for c in error.value.as_result()["candidates"]] == ["task_012", "task_016"]
    assert backend.snapshot() == before


@pytest.mark.parametrize(
    ("tool", "arguments", "status"),
    [
        ("complete_task", {"task_id": "task_999"}, 404),
        ("create_task", {}, 400),
        ("create_task", {"title": "x", "priority": "urgent"}, 400),
        ("create_task", {"title": "x", "due_date": "2024-02-30"}, 400),
        ("update_task", {"task_id": "task_001"}, 400),
        ("get_calendar", {"start_date": "2024-01-19", "end_date": "2024-01-18"}, 400),
        ("drop_everything", {}, 404),
    ],
)
def test_bad_calls_change_nothing(backend, tool, arguments, status):
    before = backend.snapshot()
    with pytest.raises(ToolError) as error:
        backend.execute(tool, arguments)
    assert error.value.status == status
    assert backend.snapshot() == before


def test_deleting_a_task_takes_its_reminders_along(backend):
    backend.execute("create_reminder", {"task_id": "task_003", "remind_at": "2024-01-16T08:00"})
    backend.execute("delete_task", {"task_id": "task_003"})
    assert backend.snapshot()["reminders"] == []


def test_a_task_goes_into_the_project_just_made(backend):
    project = backend.execute("create_project", {"name": "Q1 Goals"})
    task = backend.execute("create_task", {"title": "budgeting", "project_id": project["project_id"]})
    assert _task(backend, task["task_id"])["project_id"] == project["project_id"]


def test_the_calendar_shows_one_day_unless_an_end_is_given(backend):
    assert backend.execute("get_calendar", {"start_date": "2024-01-15"})["count"] == 2
    assert backend.execute("get_calendar", {"start_date": "2024-01-15", "end_date": "2024-01-21"})["count"] == 4


def test_reset_and_load_bring_a_state_back(backend):
    start = backend.snapshot()
    backend.execute("delete_task", {"task_id": "task_001"})
    changed = backend.snapshot()
    backend.reset()
    assert backend.snapshot() == start
    backend.load(changed)
    assert backend.snapshot() == changed
