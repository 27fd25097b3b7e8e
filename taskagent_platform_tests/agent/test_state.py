import json
import multiprocessing
from datetime import datetime
from pathlib import Path

import pytest

from taskagent_platform.agent.state import StoredBackend
from taskagent_platform.domains.base import ToolError
from taskagent_platform.domains.task_api import DOMAIN
from taskagent_platform.errors import PlatformError

NOW = datetime(2024, 1, 15, 9)


def test_it_behaves_like_the_backend_in_memory_and_keeps_what_it_did(tmp_path: Path) -> None:
    stored, memory = StoredBackend(DOMAIN, tmp_path / "state.json", NOW), DOMAIN.backend(NOW)
    for tool, arguments in (("create_task", {"title": "a"}), ("complete_task", {"task_id": "a"}), ("list_tasks", {})):
        assert stored.execute(tool, arguments) == memory.execute(tool, arguments)
    assert StoredBackend(DOMAIN, tmp_path / "state.json", NOW).snapshot() == memory.snapshot()
    stored.reset("empty")
    assert stored.snapshot()["tasks"] == []
    stored.load(memory.snapshot())
    assert stored.snapshot() == memory.snapshot()


def test_a_refused_call_and_a_read_leave_the_file_alone(tmp_path: Path) -> None:
    stored = StoredBackend(DOMAIN, tmp_path / "state.json", NOW)
    stored.execute("list_tasks", {})
    with pytest.raises(ToolError):
        stored.execute("delete_task", {"task_id": "nothing"})
    assert not (tmp_path / "state.json").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"domain": "task_api"}', '{"domain": "other", "state": {}}'])
def test_a_damaged_or_foreign_file_is_named_and_left_alone(tmp_path: Path, content: str) -> None:
    file = tmp_path / "state.json"
    file.write_text(content)
    with pytest.raises(PlatformError, match=r"state\.json"):
        StoredBackend(DOMAIN, file, NOW).execute("create_task", {"title": "a"})
    assert file.read_text() == content


def _create_many(path: Path) -> None:
    backend = StoredBackend(DOMAIN, path, NOW)
    for _ in range(10):
        backend.execute("create_task", {"title": "same"})


def test_processes_that_work_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    workers = [multiprocessing.get_context("fork").Process(target=_create_many, args=(path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    tasks = json.loads(path.read_text())["state"]["tasks"]
    assert len([task for task in tasks if task["title"] == "same"]) == 30
    assert len({task["task_id"] for task in tasks}) == len(tasks)
