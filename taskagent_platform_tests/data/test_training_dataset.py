import json

import pytest

from taskagent_platform.artifacts import read_manifest
from taskagent_platform.data.jsonl import read_jsonl, write_jsonl
from taskagent_platform.data.source import EXAMPLES_FILE, make_source
from taskagent_platform.data.training_dataset import (
    EVALUATION_FILE,
    TRAIN_FILE,
    asked_in,
    make_training_dataset,
    overlap,
    split,
)
from taskagent_platform.domains.task_api import DOMAIN
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import load_settings


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    settings = load_settings(
        profile="smoke", data={"structured_outputs": 200, "function_calling": 250, "multi_tool": 150}
    )
    sources = {name: tmp_path / name for name in DOMAIN.sources}
    for name, folder in sources.items():
        make_source(settings, DOMAIN, name, folder)
    return settings, sources, tmp_path / "training_dataset"


def test_the_specifications_sizes_give_a_balanced_dataset(made):
    settings, sources, folder = made
    manifest, reused = make_training_dataset(settings, DOMAIN, sources, folder)
    details = manifest.details
    assert not reused
    assert details["distribution"]["total"] >= 500
    assert 0.6 <= 1 - details["distribution"]["multi_tool"] / details["distribution"]["total"] <= 0.8
    assert min(details["distribution"]["tool_usage"].values()) >= 20
    assert details["overlap"] == []
    train, held = list(read_jsonl(folder / TRAIN_FILE)), list(read_jsonl(folder / EVALUATION_FILE))
    assert len(train) + len(held) == details["distribution"]["total"]
    assert not {r["meta"]["now"] for r in train} & {r["meta"]["now"] for r in held}
    assert 0.05 < len(held) / (len(train) + len(held)) < 0.15


def test_a_second_time_reuses_and_a_changed_source_does_not(made):
    settings, sources, folder = made
    first, _ = make_training_dataset(settings, DOMAIN, sources, folder)
    again, reused = make_training_dataset(settings, DOMAIN, sources, folder)
    assert reused
    assert again.digest == first.digest
    other = load_settings(profile="smoke", seed=1, data=settings.data.model_dump())
    make_source(other, DOMAIN, "multi_tool", sources["multi_tool"])
    changed, reused = make_training_dataset(settings, DOMAIN, sources, folder)
    assert not reused
    assert changed.digest != first.digest


def test_a_source_that_was_edited_by_hand_is_refused(made):
    settings, sources, folder = made
    with (sources["multi_tool"] / EXAMPLES_FILE).open("a") as file:
        file.write("\n")
    with pytest.raises(PlatformError, match="was changed after it was made"):
        make_training_dataset(settings, DOMAIN, sources, folder)


def test_requests_of_the_suites_are_dropped(made, tmp_path, monkeypatch):
    settings, sources, folder = made
    record = next(iter(read_jsonl(sources["structured_outputs"] / EXAMPLES_FILE)))
    stolen = json.loads(DOMAIN.suites[0].read_text())["tool_selection"][0]["input"]
    record["messages"][1]["content"] = stolen.upper() + "!"
    assert overlap(DOMAIN, [record]) == sorted(asked_in(record))
    manifest = read_manifest(sources["structured_outputs"])
    path = sources["structured_outputs"] / EXAMPLES_FILE
    records = [record, *list(read_jsonl(path))[1:]]
    write_jsonl(path, records)
    from taskagent_platform.artifacts import MANIFEST_NAME, file_digest

    files = {**manifest.files, EXAMPLES_FILE: file_digest(path)}
    (path.parent / MANIFEST_NAME).write_text(manifest.model_copy(update={"files": files}).model_dump_json())
    made_anew, _ = make_training_dataset(settings, DOMAIN, sources, folder)
    assert made_anew.details["overlaps_dropped"] >= 1
    assert stolen.casefold() not in (folder / TRAIN_FILE).read_text().casefold()


@pytest.mark.parametrize("suites", ["suites", "robustness_suites", "development_suites"])
def test_a_request_of_any_suite_counts_as_overlap(suites):
    lists = json.loads(getattr(DOMAIN, suites)[0].read_text())
    stolen = next(iter(lists.values()))[0]["input"]
    record = {"messages": [{"role": "user", "content": f"  {stolen.upper()} "}]}
    assert overlap(DOMAIN, [record]) == sorted(asked_in(record))


def test_a_split_holds_out_whole_moments():
    records = [{"meta": {"now": str(n // 5)}, "n": n} for n in range(100)]
    train, held = split(records, 0.1, 42)
    assert len(held) == 10
    assert (train, held) == split(records, 0.1, 42)
    assert not {r["meta"]["now"] for r in train} & {r["meta"]["now"] for r in held}
