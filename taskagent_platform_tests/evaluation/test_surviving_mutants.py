"""The list of the scorer's surviving mutants, and how a run is compared with it."""

import json

from taskagent_platform_tests.evaluation.surviving_mutants import FILE, compare

LISTED = json.loads(FILE.read_text())
NAMES = [entry["mutant"] for entry in LISTED["survivors"]]


def results(*names: str) -> list[str]:
    return [f"    taskagent_platform.evaluation.scoring.{name}: survived\n" for name in names]


def test_every_survivor_has_a_reason() -> None:
    assert {entry["reason"] for entry in LISTED["survivors"]} == set(LISTED["reasons"])
    assert len(set(NAMES)) == len(NAMES)


def test_the_listed_survivors_are_fine() -> None:
    assert compare(results(*NAMES)) == ([], [])


def test_another_survivor_is_named() -> None:
    killed = "    taskagent_platform.evaluation.scoring.x_same_value__mutmut_1: killed\n"
    assert compare([*results(*NAMES[1:], "x_new__mutmut_1"), killed]) == (["x_new__mutmut_1"], [NAMES[0]])
