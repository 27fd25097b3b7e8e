"""Rounds of diagnosis, targeted examples and retraining, with a model that knows what its training data hold.

The stand-in for the model answers a kind of chain only if enough examples of it were trained on; everything else
(sources, dataset, served endpoint, evaluation, diagnosis, targeted examples, gates) is the platform's own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from taskagent_platform.artifacts import new_artifact, read_manifest
from taskagent_platform.data.jsonl import Record, read_jsonl
from taskagent_platform.data.pattern import Pattern, count_patterns
from taskagent_platform.data.source import make_source
from taskagent_platform.data.targeted import KIND as TARGETED
from taskagent_platform.data.targeted import make_targeted_examples, usable_targeted
from taskagent_platform.data.training_dataset import TRAIN_FILE, make_training_dataset
from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.diagnosis import diagnose, load_diagnosis, save_diagnosis
from taskagent_platform.evaluation.report import load_report, save_report
from taskagent_platform.evaluation.run import evaluate
from taskagent_platform.evaluation.suite import load_suite
from taskagent_platform.improve import Outcome, improve, is_of_present_data
from taskagent_platform.serving.gates import report_code_version
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform_tests.evaluation.light_server import LightServer
from taskagent_platform_tests.serving.fake_server import serve
from taskagent_platform_tests.starved_domain import THREE_CALLS, StarvedDomain
from taskagent_platform_tests.switch_domain import ROOMS

ENOUGH = 5


class Workshop:
    """The platform's stages without training: the model is what its dataset holds."""

    def __init__(self, settings: Settings, domain: StarvedDomain, learns: bool = True) -> None:
        self.settings = settings
        self.domain = domain
        self.folder = settings.folder(domain.name)
        self.learns = learns
        self.trained = 0
        self.forgets_a_tool = False

    def training(self) -> list[Record]:
        return list(read_jsonl(self.folder / "training_dataset" / TRAIN_FILE))

    def retrain(self) -> bool:
        self.trained += 1
        sources = {}
        for name in self.domain.sources:
            make_source(self.settings, self.domain, name, self.folder / name)
            sources[name] = self.folder / name
        if usable_targeted(self.folder / TARGETED, self.domain):
            sources[TARGETED] = self.folder / TARGETED
        make_training_dataset(self.settings, self.domain, sources, self.folder / "training_dataset")
        knows = self.learns and count_patterns(self.training()).get(THREE_CALLS, 0) >= ENOUGH
        weights = f"knows three: {knows}, {len(self.training())} examples"
        merged = self.folder / "merged_model"
        with new_artifact(merged, kind="merged_model", inputs={}, settings={}, code_version="1") as scratch:
            (scratch / "weights").write_text(weights)
        self.evaluate(knows)
        return True

    def evaluate(self, knows: bool) -> None:
        turns: dict[str, Any] = {}
        for path in self.domain.suites:
            lists = json.loads(path.read_text())
            turns |= {entry["input"]: [[("list_lamps", {})]] for entry in lists["tool_selection"]}
            if self.forgets_a_tool:
                turns[lists["tool_selection"][0]["input"]] = ["Done."]
            turns |= {entry["input"]: [[("switch_on", {"room": "hall"})]] for entry in lists["argument_extraction"]}
            for entry in lists["multi_tool_chains"]:
                calls = list(zip(entry["expected_parallel"], entry["expected_args"], strict=True))
                turns[entry["input"]] = [calls if len(calls) < 3 or knows else calls[:2], "Done."]
        suite = load_suite(self.domain.suites, self.domain)
        digest = read_manifest(self.folder / "merged_model").digest
        with serve(LightServer(turns).app) as url:
            report = evaluate(
                self.settings, self.domain, base_url=f"{url}/v1", model_name="m", model_digest=digest, suite=suite
            )
        with new_artifact(
            self.folder / "eval_report",
            kind="eval_report", inputs={"merged_model": digest}, settings={},
            code_version=report_code_version(self.domain),
        ) as scratch:  # fmt: skip
            save_report(report, scratch, self.settings.gates)

    def diagnose(self) -> bool:
        diagnosis = diagnose(load_report(self.folder / "eval_report"), self.training())
        target = self.folder / "failure_diagnosis"
        with new_artifact(target, kind="failure_diagnosis", inputs={}, settings={}, code_version="1") as scratch:
            save_diagnosis(diagnosis, scratch)
        make_targeted_examples(
            self.settings, self.domain, diagnosis.wanted, self.training(), self.folder / TARGETED,
            diagnosis=read_manifest(target).digest,
        )  # fmt: skip
        return True

    def improve(self, rounds: int) -> Outcome:
        self.told: list[str] = []
        return improve(
            self.settings, self.domain, rounds, retrain=self.retrain, diagnose=self.diagnose, say=self.told.append
        )

    def digests(self) -> dict[str, str]:
        names = ("training_dataset", "merged_model", "eval_report")
        return {name: read_manifest(self.folder / name, verify=True).digest for name in names}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path / "home"))
    return load_settings(
        profile="smoke",
        data={"structured_outputs": 60, "function_calling": 60, "multi_tool": 60},
        evaluation={"case_limit": None, "latency_requests": 1},
        gates={"tool_selection": 0, "argument_extraction": 0, "json_validity": 0, "multi_tool": 0.85},
    )


@pytest.fixture
def domain(tmp_path: Path) -> StarvedDomain:
    pairs = [(f"both {n}", 2) for n in range(20)] + [(f"all three {n}", 3) for n in range(10)]
    chains = [
        {
            "input": words, "expected_parallel": ["switch_on"] * count,
            "expected_args": [{"room": room} for room in ROOMS[:count]],
        }
        for words, count in pairs
    ]  # fmt: skip
    path = tmp_path / "suite.json"
    selections = [{"input": f"lamps {n}", "expected_tool": "list_lamps"} for n in range(5)]
    extractions = [
        {"input": f"hall {n}", "expected_tool": "switch_on", "expected_args": {"room": "hall"}} for n in range(5)
    ]
    suite = {"tool_selection": selections, "argument_extraction": extractions, "multi_tool_chains": chains}
    path.write_text(json.dumps(suite))

    class Domain(StarvedDomain):
        suites = (path,)

    return Domain()


def test_a_model_starved_of_three_call_chains_recovers_them(settings: Settings, domain: StarvedDomain) -> None:
    shop = Workshop(settings, domain)
    outcome = shop.improve(3)
    assert "Before: 30 of 40 cases right, 4 of 5 gates pass" in shop.told[1]
    assert THREE_CALLS in load_diagnosis(shop.folder / "failure_diagnosis").wanted
    assert outcome == Outcome("the gates pass", rounds=1, best_round=1, right=(40, 40))
    made = list(read_jsonl(shop.folder / TARGETED / "examples.jsonl"))
    assert len(made) >= ENOUGH
    assert all(record["meta"]["source"] == TARGETED for record in made)
    assert read_manifest(shop.folder / TARGETED).details["made"][str(THREE_CALLS)] > 0


def test_rounds_that_do_not_help_end_and_leave_the_best_in_place(settings: Settings, domain: StarvedDomain) -> None:
    shop = Workshop(settings, domain, learns=False)
    shop.retrain()
    before = shop.digests()
    outcome = shop.improve(5)
    assert (outcome.ending, outcome.rounds, outcome.best_round) == ("no improvement", 1, 0)
    assert shop.trained == 2
    assert shop.digests() == before
    assert not (shop.folder / TARGETED).exists()
    assert not (shop.folder / "best_round").exists()


def test_a_gate_that_a_few_cases_decide_does_not_overturn_many_more_right_cases(
    settings: Settings, domain: StarvedDomain
) -> None:
    settings = settings.model_copy(
        update={"gates": settings.gates.model_copy(update={"tool_selection": 0.99, "multi_tool": 1.0})}
    )
    shop = Workshop(settings, domain)
    shop.retrain()
    shop.forgets_a_tool = True
    outcome = shop.improve(1)
    assert (outcome.rounds, outcome.best_round) == (1, 1)
    assert outcome.right == (39, 40)


def test_nothing_is_retrained_where_nothing_can_be_added(settings: Settings, domain: StarvedDomain) -> None:
    shop = Workshop(settings, domain)
    shop.retrain()
    shop.diagnose = lambda: True  # type: ignore[method-assign]
    assert shop.improve(3) == Outcome("nothing to add", 0, 0, (30, 40))


def test_a_job_that_fails_ends_the_rounds(settings: Settings, domain: StarvedDomain) -> None:
    shop = Workshop(settings, domain)
    shop.retrain()
    shop.diagnose = lambda: False  # type: ignore[method-assign]
    with pytest.raises(PlatformError, match="The diagnosis failed"):
        shop.improve(3)


def test_targeted_examples_are_new_and_kept_beside_the_earlier_ones(settings: Settings, domain: StarvedDomain) -> None:
    shop = Workshop(settings, domain)
    shop.retrain()
    asked = {record["messages"][1]["content"] for record in shop.training()}

    def make(wanted: dict[Pattern, int]) -> list[str] | None:
        folder = shop.folder / TARGETED
        made = make_targeted_examples(settings, domain, wanted, shop.training(), folder, diagnosis="d")
        if made is None:
            return None
        return [record["messages"][1]["content"] for record in read_jsonl(folder / "examples.jsonl")]

    first = make({THREE_CALLS: 4, Pattern("slice", "typos"): 9})
    assert first is not None
    assert len(first) == 4
    assert not asked & set(first)
    both = make({THREE_CALLS: 3})
    assert both is not None
    assert (both[:4], len(set(both))) == (first, 7)
    assert make({Pattern("calls", "9"): 3}) is None, "no generator makes that"
    assert make({}) is None


def made_with_room_for_six(
    settings: Settings, domain: StarvedDomain, monkeypatch: pytest.MonkeyPatch, wanted: dict[Pattern, int]
) -> Mapping[Pattern, int]:
    """Counts the targeted examples that are made where six of several calls have room."""
    shop = Workshop(settings, domain)
    shop.retrain()
    monkeypatch.setattr("taskagent_platform.data.targeted._room_for_multi", lambda _: 6)
    make_targeted_examples(settings, domain, wanted, shop.training(), shop.folder / TARGETED, diagnosis="d")
    return count_patterns(read_jsonl(shop.folder / TARGETED / "examples.jsonl"))


def test_the_room_for_requests_of_several_calls_belongs_to_the_chains_that_are_wanted(
    settings: Settings, domain: StarvedDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_with_room_for_six(settings, domain, monkeypatch, {THREE_CALLS: 6, Pattern("tool", "switch_on"): 60})
    assert made[THREE_CALLS] == 6
    assert Pattern("calls", "2") not in made, "it would have taken the room of a chain"
    assert made[Pattern("calls", "1")] > 6


def test_room_for_chains_that_no_generator_makes_goes_to_the_others(
    settings: Settings, domain: StarvedDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {Pattern("calls", "9"): 30, Pattern("tool", "switch_on"): 5_000}
    made = made_with_room_for_six(settings, domain, monkeypatch, wanted)
    several = sum(count for pattern, count in made.items() if pattern.dimension == "calls" and int(pattern.value) > 1)
    assert 0 < several <= 6


def test_a_retraining_that_failed_on_the_way_is_no_round(tmp_path: Path) -> None:
    """The report of the model before is there still, and says nothing of the new data."""

    def made(kind: str, inputs: dict[str, str], text: str = "1") -> str:
        with new_artifact(tmp_path / kind, kind=kind, inputs=inputs, settings={}, code_version="1") as scratch:
            (scratch / "file").write_text(text)
        return read_manifest(tmp_path / kind).digest

    adapter = made("lora_adapter", {"training_dataset": made("training_dataset", {})})
    made("eval_report", {"merged_model": made("merged_model", {"lora_adapter": adapter})})
    assert is_of_present_data(tmp_path)
    made("training_dataset", {}, text="2")
    assert not is_of_present_data(tmp_path)
