"""Combinations of settings, and the ranking of what they gave."""

from typing import Any

import pytest
import yaml

from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import load_settings
from taskagent_platform.sweep import MOST, Trial, grid, learning_rates, ranking_text, run_sweep, settings_of


def test_every_combination_is_tried_once() -> None:
    assert grid(["rank=8,32", "learning_rate=1e-3", "packing=none,prefix"]) == [
        {"rank": 8, "learning_rate": 0.001, "packing": "none"},
        {"rank": 8, "learning_rate": 0.001, "packing": "prefix"},
        {"rank": 32, "learning_rate": 0.001, "packing": "none"},
        {"rank": 32, "learning_rate": 0.001, "packing": "prefix"},
    ]
    assert grid([]) == []


@pytest.mark.parametrize("choices", [["rank"], ["rank="], ["=8"], ["rank=8", "rank=16"]])
def test_a_choice_that_cannot_be_read_is_refused(choices: list[str]) -> None:
    with pytest.raises(PlatformError, match="is no choice of settings; write each setting once, such as"):
        grid(choices)


def test_a_sweep_without_an_end_is_refused() -> None:
    numbers = ",".join(map(str, range(1, 10)))
    with pytest.raises(PlatformError, match=f"These are 81 trainings; a sweep takes {MOST} at most"):
        grid([f"rank={numbers}", f"alpha={numbers}"])


def test_without_a_choice_learning_rates_are_tried() -> None:
    settings = load_settings(profile="smoke", training={"learning_rate": 0.003})
    assert [one["learning_rate"] for one in learning_rates(settings)] == pytest.approx([0.001, 0.003, 0.009])


def test_one_impossible_training_stops_the_sweep_before_any_starts() -> None:
    settings = load_settings(profile="smoke")
    with pytest.raises(PlatformError, match=r"^training\.rank = 0: "):
        settings_of(settings, [{"rank": 8}, {"rank": 0}])
    with pytest.raises(PlatformError, match=r"^training\.rank = 0: "):
        run_sweep(settings, [{"rank": 8}, {"rank": 0}], lambda text: None)


def test_the_best_settings_come_first_and_can_be_kept() -> None:
    def trial(loss: float, **changes: Any) -> Trial:
        return Trial(changes, "http://127.0.0.1", False, 150, 200, loss, 0.05, 61.0, "digest")

    text = ranking_text([trial(0.3, rank=8, seed=1), trial(0.2, rank=32, seed=2), trial(0.4)])
    assert text.startswith("1. development 150 of 200 (75.0%), held-out loss 0.2000, training loss 0.0500, 61 s: ")
    assert [line.split(": ")[-1] for line in text.splitlines()[:3]] == [
        "rank=32 seed=2",
        "rank=8 seed=1",
        "the platform's settings",
    ]
    kept = yaml.safe_load(text.partition("settings.yaml:\n")[2])
    assert kept == {"training": {"rank": 32}, "seed": 2}
    assert load_settings(profile="smoke", **kept).training.rank == 32
