from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from taskagent_platform.agent.state import StoredBackend
from taskagent_platform.domains.task_api import DOMAIN
from taskagent_platform.task_api.service import MAX_BODY_BYTES, OPERATIONS, create_app

NOW = datetime(2024, 1, 15, 9)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    backend = StoredBackend(DOMAIN, tmp_path / "state.json", NOW)
    with TestClient(create_app(backend), base_url="http://127.0.0.1:8220") as client:
        yield client


def test_every_tool_has_an_endpoint() -> None:
    assert sorted(operation.tool for operation in OPERATIONS) == sorted(tool.name for tool in DOMAIN.tools)


def test_the_eight_operations(client: TestClient, tmp_path: Path) -> None:
    project = client.post("/projects", json={"name": "Q1 Goals"})
    assert project.status_code == 201
    project_id = project.json()["project_id"]
    created = client.post("/tasks", json={"title": "Budget", "tags": ["q1", "money"], "project_id": project_id})
    task_id = created.json()["task_id"]
    assert client.patch(f"/tasks/{task_id}", json={"priority": "high"}).json()["changed"] == ["priority"]
    listed = client.get("/tasks", params={"tags": ["q1", "money"], "priority": "high"}).json()
    assert [task["title"] for task in listed["tasks"]] == ["Budget"]
    reminder = client.post(f"/tasks/{task_id}/reminders", json={"remind_at": "2024-01-16T09:00"})
    assert (reminder.status_code, reminder.json()["task_id"]) == (201, task_id)
    assert client.post("/tasks/budget/complete", json={}).json()["status"] == "completed"
    assert client.get("/calendar", params={"start_date": "2024-01-15"}).json()["count"] == 2
    assert client.delete(f"/tasks/{task_id}").json()["deleted"] is True
    # Another process sees what is stored.
    state = StoredBackend(DOMAIN, tmp_path / "state.json", NOW).snapshot()
    assert "Q1 Goals" in [project["name"] for project in state["projects"]]
    assert "Budget" not in [task["title"] for task in state["tasks"]]


def test_a_title_with_slashes_names_a_task(client: TestClient) -> None:
    client.post("/tasks", json={"title": "Pros/cons of plan B"})
    assert client.post("/tasks/Pros%2Fcons of plan B/complete", json={}).json()["status"] == "completed"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("DELETE", "/tasks/nothing", None, 404, "not_found"),
        ("PATCH", "/tasks/task_001", {}, 400, "invalid_argument"),
        ("PATCH", "/tasks/task_001", {"task_id": "task_002", "priority": "low"}, 400, "invalid_argument"),
        ("POST", "/tasks", {"title": "x", "color": "red"}, 400, "invalid_argument"),
        ("POST", "/tasks", {"title": "x", "due_date": "2024-02-30"}, 400, "invalid_argument"),
        ("POST", "/tasks", [1], 400, "invalid_argument"),
        ("POST", "/tasks", {"title": "x" * MAX_BODY_BYTES}, 413, "too_large"),
        ("GET", "/calendar", None, 400, "invalid_argument"),
        ("GET", "/tasks?status=lost", None, 400, "invalid_argument"),
    ],
)
def test_refusals_say_why(client: TestClient, method: str, path: str, body: object, status: int, code: str) -> None:
    answer = client.request(method, path, json=body)
    assert (answer.status_code, answer.json()["error"]) == (status, code)


def test_an_ambiguous_title_answers_with_the_candidates(client: TestClient) -> None:
    for _ in range(2):
        client.post("/tasks", json={"title": "Call Bob"})
    answer = client.delete("/tasks/call bob")
    assert answer.status_code == 409
    assert len(answer.json()["candidates"]) == 2


def test_pages_of_other_sites_cannot_use_it(client: TestClient) -> None:
    assert client.post("/tasks/task_001/complete", content=b"{}").status_code == 415
    assert client.post("/tasks", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert client.get("/tasks", headers={"host": "evil.example"}).status_code == 400


def test_a_damaged_state_is_said_and_kept(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    answer = client.get("/tasks")
    assert (answer.status_code, answer.json()["error"]) == (500, "internal_error")
    assert "state.json is damaged" in answer.json()["message"]
    assert (tmp_path / "state.json").read_text() == "{"
