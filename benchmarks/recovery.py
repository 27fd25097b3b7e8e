"""Does `taskagent improve` find out by itself what a model was never taught, and teach it? Really trained.

    .venv/bin/python benchmarks/recovery.py --home /somewhere/empty

The domain is that of customer support with one difference: its first training data hold no request of three calls or
more. Whoever generates with another seed gets some, as in any domain that is asked for more. The main job trains and
evaluates a first model on `recovery_suite.json`; then `taskagent improve` diagnoses, adds, retrains and compares. The
table counts right cases by the number of calls, before and after, and says what the exact McNemar test makes of it.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from taskagent_platform.domains.base import Example
from taskagent_platform.domains.customer_support import CustomerSupportDomain
from taskagent_platform.evaluation.comparison import compare
from taskagent_platform.evaluation.diagnosis import TEXT_FILE
from taskagent_platform.evaluation.report import EvalReport, load_report
from taskagent_platform.improve import run_improvement
from taskagent_platform.serving.deployments import stop_all
from taskagent_platform.serving.gates import REPORT_KIND
from taskagent_platform.settings import load_settings

STARVED_SEED = 42
FEWEST_CALLS = 3
"""Requests of so many calls are missing from what is made with that seed."""


class StarvedSupport(CustomerSupportDomain):
    """Customer support whose first training data hold no request of three calls or more."""

    name = "starved_support"
    suites = (Path(__file__).with_name("recovery_suite.json"),)

    def generate(self, source: str, count: int, seed: int, moments: Sequence[datetime]) -> Iterator[Example]:
        """Yields training examples."""
        if seed != STARVED_SEED:
            yield from super().generate(source, count, seed, moments)
            return
        made = super().generate(source, 4 * count, seed, moments)
        yield from itertools.islice((example for example in made if most_calls(example) < FEWEST_CALLS), count)


def most_calls(example: Example) -> int:
    """Returns how many calls the longest of an example's requests takes."""
    most = calls = 0
    for message in example.messages:
        calls = 0 if message["role"] == "user" else calls + len(message.get("tool_calls") or [])
        most = max(most, calls)
    return most


DOMAIN = StarvedSupport()


def main() -> None:
    """Trains, improves and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--home",
        type=Path,
        required=True,
        help="folder for all that is made; a first training that was interrupted goes on",
    )
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of improvement at most")
    parser.add_argument(
        "--examples", type=int, nargs=3, default=(500, 540, 540), metavar="N",
        help="structured outputs, function calling, multi-tool",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    environment = environment_of(arguments.home.resolve(), arguments.profile, arguments.examples)
    os.environ.update(environment)
    sys.path.insert(0, environment["PYTHONPATH"].split(os.pathsep)[0])
    settings, console = load_settings(), Console()
    folder = settings.folder(DOMAIN.name)
    if (folder / "failure_diagnosis").exists():
        sys.exit(f"In {arguments.home} a model was improved already; name an empty folder.")
    run_improvement(settings, console, 0)
    before = load_report(folder / REPORT_KIND)
    try:
        outcome = run_improvement(settings, console, arguments.rounds)
    finally:
        stop_all(settings)
    console.print(f"Ended because: {outcome.ending}; kept is the model of round {outcome.best_round}.")
    figures = compare_by_calls(before, load_report(folder / REPORT_KIND))
    show(figures, folder, console)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


def environment_of(home: Path, profile: str, examples: Sequence[int]) -> dict[str, str]:
    """Returns the variables of a home in which the starved domain is offered as another package would offer it."""
    package = home / "site" / "starved_support-0.1.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: starved-support\nVersion: 0.1\n")
    module = Path(__file__).stem
    (package / "entry_points.txt").write_text(f"[taskagent.domains]\n{DOMAIN.name} = {module}:DOMAIN\n")
    sizes = dict(zip(("STRUCTURED_OUTPUTS", "FUNCTION_CALLING", "MULTI_TOOL"), map(str, examples), strict=True))
    return {
        "PYTHONPATH": os.pathsep.join([str(package.parent), str(Path(__file__).resolve().parent)]),
        "TASKAGENT_HOME": str(home),
        "TASKAGENT_PROFILE": profile,
        "TASKAGENT_DOMAIN": DOMAIN.name,
        "TASKAGENT_SEED": str(STARVED_SEED),
        **{f"TASKAGENT_DATA__{name}": size for name, size in sizes.items()},
    }


def compare_by_calls(before: EvalReport, after: EvalReport) -> dict[str, dict[str, float]]:
    """Counts right cases by the number of calls."""
    figures = {}
    for calls in sorted({len(case.expected) for case in before.cases}):
        first, second = (
            report.model_copy(update={"cases": tuple(case for case in report.cases if len(case.expected) == calls)})
            for report in (before, after)
        )
        paired = next(one for one in compare(second, first) if one.name == "all")
        figures[str(calls)] = {
            "cases": paired.n,
            "before": sum(case.passed for case in first.cases),
            "after": sum(case.passed for case in second.cases),
            "p_value": paired.p_value,
        }
    return figures


def show(figures: dict[str, dict[str, float]], folder: Path, console: Console) -> None:
    """Prints the table."""
    shown = Table(title="Right cases of a model starved of three calls, before and after the rounds")
    for column in ("calls", "cases", "before", "after", "p (McNemar, exact)"):
        shown.add_column(column, justify="right")
    for calls, one in figures.items():
        shown.add_row(calls, str(one["cases"]), str(one["before"]), str(one["after"]), f"{one['p_value']:.2g}")
    console.print(shown)
    diagnosis = folder / "failure_diagnosis" / TEXT_FILE
    if diagnosis.exists():
        console.print(diagnosis.read_text(), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
