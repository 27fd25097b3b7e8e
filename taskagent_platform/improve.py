"""Rounds of diagnosis, more examples and retraining, until the gates pass or nothing improves; the best is kept."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from taskagent_platform.artifacts import MANIFEST_NAME, read_manifest
from taskagent_platform.data.targeted import KIND as TARGETED
from taskagent_platform.data.targeted import targeted_digest
from taskagent_platform.data.training_dataset import KIND as TRAINING
from taskagent_platform.domains.base import Domain
from taskagent_platform.errors import PlatformError
from taskagent_platform.serving.deployments import copy_model
from taskagent_platform.serving.gates import REPORT_KIND, judge
from taskagent_platform.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from taskagent_platform.evaluation.report import EvalReport

_KEPT = (TARGETED, TRAINING, "lora_adapter", "merged_model", REPORT_KIND, "failure_diagnosis")
_BEST = "best_round"

Ending = Literal["the gates pass", "nothing to add", "no improvement", "all rounds made"]
Job = Callable[[], bool]
"""Runs a job to its end and tells whether its assets are there; a gate that blocks the deployment is no failure."""


@dataclass(frozen=True)
class Outcome:
    """What came of the rounds.

    Attributes:
        ending: why they ended.
        rounds: rounds of retraining made.
        best_round: the round whose model was kept; 0 for the one that was there before.
        right: cases that the kept model answers right, and of how many.
    """

    ending: Ending
    rounds: int
    best_round: int
    right: tuple[int, int]


def improve(
    settings: Settings,
    domain: Domain,
    rounds: int,
    *,
    retrain: Job,
    diagnose: Job,
    say: Callable[[str], None],
) -> Outcome:
    """Diagnoses, adds examples, retrains and compares, at most ``rounds`` times.

    A round is better if its model could be deployed and the best one's could not, else if more cases are right, else if
    more gates pass: a gate on ten cases fails by one of them, and says less than many cases. What a worse round made is
    replaced by what the best one had, so that the next run starts from there.

    Args:
        settings: the settings.
        domain: the domain.
        rounds: how many at most.
        retrain: runs the main job.
        diagnose: runs the job that diagnoses the last evaluation and makes examples.
        say: is told how it goes.

    Raises:
        PlatformError: there is no evaluation even after a first run, or a job fails for another reason than its gates.
    """
    folder = settings.folder(domain.name)
    if not (folder / REPORT_KIND / MANIFEST_NAME).exists():
        say("There is no evaluation yet: making the first model.")
        _run(retrain, "main job")
    best, best_round = _report(folder), 0
    best_rank = _rank(settings, domain, folder, best)
    say(_line("Before", settings, best))
    ending: Ending = "all rounds made"
    made = 0
    for number in range(1, rounds + 1):
        if _passes(settings, domain, folder):
            ending = "the gates pass"
            break
        _keep(folder, folder / _BEST)
        before = targeted_digest(folder / TARGETED, domain)
        _run(diagnose, "diagnosis")
        if targeted_digest(folder / TARGETED, domain) == before:
            ending = "nothing to add"
            break
        _run(retrain, "main job")
        made = number
        report = _report(folder)
        say(_line(f"Round {number}", settings, report))
        rank = _rank(settings, domain, folder, report)
        if rank <= best_rank:
            _restore(folder / _BEST, folder)
            ending = "no improvement"
            break
        best, best_round, best_rank = report, number, rank
    else:
        if _passes(settings, domain, folder):
            ending = "the gates pass"
    shutil.rmtree(folder / _BEST, ignore_errors=True)
    right = sum(case.passed for case in best.cases)
    return Outcome(ending, made, best_round, (right, len(best.cases)))


def run_improvement(settings: Settings, console: "Console", rounds: int) -> Outcome:
    """Improves the settings' domain through the platform's own jobs; see :func:`improve`."""
    from taskagent_platform.defs.failure_diagnosis import diagnose_job_name
    from taskagent_platform.defs.instance import close_abandoned_runs, open_instance
    from taskagent_platform.demo import INTERRUPTED, run_demo
    from taskagent_platform.domains.registry import find_domain
    from taskagent_platform.job_process import start_job

    domain = find_domain(settings.domain)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def retrain() -> bool:
        if run_demo(settings, console) == INTERRUPTED:
            raise KeyboardInterrupt
        return is_of_present_data(settings.folder(domain.name))

    def diagnose() -> bool:
        with open_instance(settings) as instance:
            close_abandoned_runs(instance)
            with start_job(settings, instance, diagnose_job_name(domain.name), say=say) as run:
                for _ in run.events():
                    pass
            if run.process.returncode != 0:
                say(f"The diagnosis failed: {run.last_words()} ({run.log})")
            return run.process.returncode == 0

    return improve(settings, domain, rounds, retrain=retrain, diagnose=diagnose, say=say)


def is_of_present_data(folder: Path) -> bool:
    """Returns whether a domain's report is of the model that its present training dataset made.

    A run that a gate ends has made a model and its report all the same; one that ends earlier leaves those of the run
    before, which say nothing of the new data.
    """
    line = (TRAINING, "lora_adapter", "merged_model", REPORT_KIND)
    made = [read_manifest(folder / name) for name in line]
    return all(after.inputs.get(before.kind) == before.digest for before, after in pairwise(made))


def _run(job: Job, name: str) -> None:
    if not job():
        raise PlatformError(f"The {name} failed; see above. What was finished is kept.")


def _report(folder: Path) -> "EvalReport":
    from taskagent_platform.evaluation.report import load_report

    return load_report(folder / REPORT_KIND)


def _passes(settings: Settings, domain: Domain, folder: Path) -> bool:
    model = read_manifest(folder / "merged_model", kind="merged_model")
    return not judge(settings, domain, model, folder / REPORT_KIND).refusals


def _rank(settings: Settings, domain: Domain, folder: Path, report: "EvalReport") -> tuple[bool, int, int]:
    from taskagent_platform.evaluation.report import gate_results

    passed = sum(gate.passed for gate in gate_results(report, settings.gates))
    return _passes(settings, domain, folder), sum(case.passed for case in report.cases), passed


def _line(what: str, settings: Settings, report: "EvalReport") -> str:
    from taskagent_platform.evaluation.report import gate_results

    gates = gate_results(report, settings.gates)
    right = sum(case.passed for case in report.cases)
    passed = sum(gate.passed for gate in gates)
    return f"{what}: {right} of {len(report.cases)} cases right, {passed} of {len(gates)} gates pass."


def _keep(folder: Path, kept: Path) -> None:
    shutil.rmtree(kept, ignore_errors=True)
    for name in _KEPT:
        if (folder / name).is_dir():
            kept.mkdir(parents=True, exist_ok=True)
            copy_model(folder / name, kept / name)


def _restore(kept: Path, folder: Path) -> None:
    for name in _KEPT:
        # Aside first: a folder is always the old one or the new one, never a part of either.
        old = folder / f".{name}.old"
        if (folder / name).exists():
            (folder / name).rename(old)
        if (kept / name).exists():
            (kept / name).rename(folder / name)
        shutil.rmtree(old, ignore_errors=True)
