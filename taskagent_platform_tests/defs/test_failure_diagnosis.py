"""The assets that look into an evaluation and add to the next run's data."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from taskagent_platform.artifacts import read_manifest
from taskagent_platform.data.source import make_source
from taskagent_platform.data.targeted import KIND as TARGETED
from taskagent_platform.data.training_dataset import make_training_dataset
from taskagent_platform.defs.failure_diagnosis import failure_diagnosis, targeted_examples
from taskagent_platform.defs.platform import Platform
from taskagent_platform.defs.training_dataset import training_dataset
from taskagent_platform.domains.task_api import TaskApiDomain
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform_tests.serving.judged_model import make_model, make_report, small_domain


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "settings.yaml").write_text("evaluation: {case_limit: null}\n")
    return load_settings()


@pytest.fixture
def domain(tmp_path: Path, settings: Settings) -> TaskApiDomain:
    """A domain whose training dataset and merged model are made."""
    made = small_domain(tmp_path)
    folder = settings.folder(made.name)
    for source in made.sources:
        make_source(settings, made, source, folder / source)
    sources = {source: folder / source for source in made.sources}
    make_training_dataset(settings, made, sources, folder / "training_dataset")
    return made


def with_expectations(report: dict[str, Any]) -> None:
    chain = ({"tool": "create_project"}, {"tool": "create_task"})
    one = ({"tool": "list_tasks"},)
    report["cases"] = tuple(
        case.model_copy(update={"expected": chain if case.list_name == "multi_tool_chains" else one})
        for case in report["cases"]
    )


def materialize(*assets: dg.AssetsDefinition) -> dict[str, Any]:
    result = dg.materialize([*assets], resources={"platform": Platform()})
    assert result.success
    made = result.get_asset_materialization_events()
    return {event.asset_key.path[1]: event.materialization.metadata for event in made if event.asset_key}


def test_what_fails_is_found_and_more_of_it_is_made_for_the_next_dataset(
    settings: Settings, domain: TaskApiDomain
) -> None:
    _, model = make_model(settings)
    make_report(settings, domain, model, failing={"multi_tool_chains": 20}, change=with_expectations)
    on_demand = failure_diagnosis(domain), targeted_examples(domain)
    made = materialize(*on_demand)
    assert "2 calls | 20/20" in made["failure_diagnosis"]["findings"].value
    new = made[TARGETED]["new"].value
    assert new > 0
    folder = settings.folder(domain.name)
    first = read_manifest(folder / TARGETED).digest
    again = materialize(*on_demand)
    assert again[TARGETED]["reused"].value is True
    assert read_manifest(folder / TARGETED).digest == first, "the same diagnosis adds nothing twice"

    before = read_manifest(folder / "training_dataset")
    materialize(training_dataset(domain))
    after = read_manifest(folder / "training_dataset")
    assert after.inputs[TARGETED] == first
    assert after.details["distribution"]["sources"][TARGETED] == new
    assert after.details["distribution"]["total"] == before.details["distribution"]["total"] + new


def test_a_model_that_passes_adds_nothing(settings: Settings, domain: TaskApiDomain) -> None:
    _, model = make_model(settings)
    make_report(settings, domain, model)
    made = materialize(failure_diagnosis(domain), targeted_examples(domain))
    assert made[TARGETED]["new"].value == 0
    assert not (settings.folder(domain.name) / TARGETED).exists()
