"""The domain of lamps, whose generators make requests of three calls too, but not at the settings' own seed.

Its first training data hold none of them; whoever asks for more examples with another seed gets some.
"""

import random
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from taskagent_platform.data.pattern import Pattern
from taskagent_platform.domains.base import Example
from taskagent_platform_tests.switch_domain import SwitchDomain, ask_several

STARVED_SEED = 42
THREE_CALLS = Pattern("calls", "3")


class StarvedDomain(SwitchDomain):
    suites = (Path(__file__).with_name("starved_suite.json"),)

    def generate(self, source: str, count: int, seed: int, moments: Sequence[datetime]) -> Iterator[Example]:
        rng = random.Random(f"three {seed}")
        for number, example in enumerate(super().generate(source, count, seed, moments)):
            if source == "multi_tool" and seed != STARVED_SEED and number % 2:
                request, calls = ask_several(3, rng)
                meta = {key: example.meta[key] for key in ("source", "pattern", "seed", "now")}
                yield self._example(request, calls, datetime.fromisoformat(example.meta["now"]), meta)
            else:
                yield example


STARVED = StarvedDomain()
