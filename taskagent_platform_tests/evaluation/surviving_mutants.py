"""Compares the mutants of the scorer that survived with the list: `mutmut results | python -m ...surviving_mutants`.

`make mutants` runs it. A mutant is known by its name, which changes with the function that it is of: whoever changes
the scorer looks at the survivors again.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("surviving_mutants.json")
_LIVES = ("survived", "no tests", "suspicious", "not checked")


class Difference(NamedTuple):
    """What the list and a run do not share.

    Attributes:
        unlisted: mutants that live and have no reason in the list.
        gone: mutants of the list that do not live any more.
    """

    unlisted: list[str]
    gone: list[str]


def compare(results: Iterable[str]) -> Difference:
    """Compares the lines of `mutmut results` with the list."""
    alive = set()
    for line in results:
        name, _, state = line.strip().rpartition(": ")
        if state in _LIVES:
            alive.add(name.rpartition(".")[2])
    listed = {entry["mutant"] for entry in json.loads(FILE.read_text())["survivors"]}
    return Difference(sorted(alive - listed), sorted(listed - alive))


def main() -> None:
    """Reads results from standard input; ends with status 1 where a survivor is not listed."""
    lines = sys.stdin.readlines()
    if not lines:
        sys.exit("mutmut told no results: run `make mutants` to its end.")
    found = compare(lines)
    for name in found.gone:
        print(f"{name} does not survive any more: take it off {FILE.name}")
    for name in found.unlisted:
        print(f"{name} survives: `mutmut show` it; test what it breaks, or say in {FILE.name} why it breaks nothing")
    if found.unlisted:
        sys.exit(1)
    print("Every surviving mutant is listed with its reason.")


if __name__ == "__main__":
    main()
