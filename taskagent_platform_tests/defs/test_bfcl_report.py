"""The asset that shows base and fine-tuned model on BFCL."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from taskagent_platform.artifacts import Manifest, new_artifact, read_manifest
from taskagent_platform.defs import bfcl_report as module
from taskagent_platform.defs.bfcl_report import bfcl_report
from taskagent_platform.defs.platform import Platform, Stage
from taskagent_platform.domains.task_api import TaskApiDomain
from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.bfcl import BfclCase
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform_tests.evaluation.light_server import LightServer
from taskagent_platform_tests.evaluation.test_bfcl import FakeBfcl, case
from taskagent_platform_tests.serving.fake_server import serve
from taskagent_platform_tests.serving.judged_model import make_model

CASES = [case(n) for n in range(4)] + [case(n, "irrelevance") for n in range(2)]
RIGHT: dict[str, Any] = {f"simple_python {n}": [[("geo_area", {})]] for n in range(4)}


class SmallBfcl(FakeBfcl):
    def cases(self, categories: Any = (), sample: int | None = None) -> list[BfclCase]:
        assert sample == 2
        return CASES


class Servers:
    """Serves the base model, which calls where it should, and a tuned one, which always calls `list_tasks`."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.tuned: Any = {one.messages[0]["content"]: [[("list_tasks", {"status": "<b>open"})] * 2] for one in CASES}

    @contextmanager
    def __call__(self, stage: Stage, folder: Path, model: Manifest) -> Iterator[Any]:
        self.started.append(folder.name)
        assert read_manifest(folder).digest == model.digest
        light = LightServer(RIGHT if folder.name == "base_model" else self.tuned)
        with serve(light.app) as url:
            yield SimpleNamespace(base_url=f"{url}/v1", name="task_api")


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Servers:
    made = Servers()
    monkeypatch.setattr(module, "model_server", made)
    monkeypatch.setattr(module, "install_bfcl", lambda settings: SmallBfcl())
    return made


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")
    made = load_settings()
    folder = made.folder("task_api") / "base_model"
    with new_artifact(folder, kind="base_model", inputs={}, settings={}, code_version="1") as scratch:
        (scratch / "config.json").write_text("{}")
    make_model(made)
    return made


def materialize() -> dict[str, Any]:
    result = dg.materialize([bfcl_report(TaskApiDomain())], resources={"platform": Platform()})
    assert result.success
    [event] = result.get_asset_materialization_events()
    return dict(event.materialization.metadata)


def test_base_and_tuned_are_shown_side_by_side(settings: Settings, servers: Servers) -> None:
    made = materialize()
    assert servers.started == ["base_model", "merged_model"]
    rows = made["categories"].value.splitlines()
    assert rows[2].startswith("| simple_python | 4 | 100.0% | 0.0% | -100.0 points |")
    assert rows[3].startswith("| irrelevance | 2 | 100.0% | 0.0% |")
    assert made["difference_points"].value == -100.0
    assert "fine-tuned | 6 | 0 | 0" in made["unreadable_answers"].value
    text = (settings.folder("task_api") / "bfcl_report" / "report.txt").read_text()
    assert "simple_python" in text


def test_only_a_model_that_changed_is_asked_again(settings: Settings, servers: Servers) -> None:
    materialize()
    servers.started.clear()
    assert materialize()["reused"].value is True
    assert servers.started == []
    make_model(settings, "other weights")
    servers.tuned = RIGHT
    again = materialize()
    assert servers.started == ["merged_model"]
    assert again["difference_points"].value == 0.0
    assert again["reused"].value is False


def test_a_server_that_fails_leaves_no_result(settings: Settings, servers: Servers, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise PlatformError("the server is gone")

    monkeypatch.setattr(module, "ask_bfcl", fail)
    result = dg.materialize([bfcl_report(TaskApiDomain())], resources={"platform": Platform()}, raise_on_error=False)
    assert not result.success
    assert list((settings.folder("task_api") / "bfcl_results").iterdir()) == []
    assert not (settings.folder("task_api") / "bfcl_report").exists()
