"""Several trainings with different settings, ranked by what they get right of the development suites.

Never by the suites that gate, so that these go on measuring what was not chosen by them. A domain without development
suites ranks by the loss on the part of the training dataset that no training sees.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import Settings, with_training

MOST = 64
"""Trainings of one sweep at most."""
RANKING_FILE = "ranking.txt"


class Trial(NamedTuple):
    """One training of a sweep.

    Attributes:
        changes: its settings, as far as they are not the platform's.
        run: address of its page in MLflow.
        diverged: its loss grew or was no number; nothing was measured.
        right: development cases that the served model answers right.
        cases: development cases that it was asked; 0 where the domain has none.
        held_out_loss: mean over the assistant's tokens of the held-out examples.
        training_loss: at the end of the training.
        seconds: that the training took.
        adapter: digest of the adapter.
    """

    changes: Mapping[str, Any]
    run: str
    diverged: bool = False
    right: int = 0
    cases: int = 0
    held_out_loss: float = math.inf
    training_loss: float = math.inf
    seconds: float = 0.0
    adapter: str = ""

    @property
    def development(self) -> str:
        """How many development cases are right, for people."""
        if self.diverged:
            return "diverged"
        return f"{self.right} of {self.cases} ({self.right / self.cases:.1%})" if self.cases else "-"


def grid(choices: Sequence[str]) -> list[dict[str, Any]]:
    """Returns every combination of settings, from ``name=value,value`` for each of them.

    Raises:
        PlatformError: a choice is not written so or names a setting twice, or there are too many combinations.
    """
    values: dict[str, list[Any]] = {}
    for choice in choices:
        name, _, listed = choice.partition("=")
        if not name or not listed or name in values:
            raise PlatformError(f"{choice!r} is no choice of settings; write each setting once, such as rank=8,16,32.")
        values[name] = [_value(text) for text in listed.split(",")]
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    if len(combinations) > MOST:
        raise PlatformError(
            f"These are {len(combinations)} trainings; a sweep takes {MOST} at most: name fewer values."
        )
    return combinations if choices else []


def learning_rates(settings: Settings) -> list[dict[str, Any]]:
    """Returns what is tried where nothing is named: a third, one and three times the learning rate."""
    return [{"learning_rate": float(f"{settings.training.learning_rate * factor:.3g}")} for factor in (1 / 3, 1, 3)]


def settings_of(settings: Settings, trials: Sequence[Mapping[str, Any]]) -> list[Settings]:
    """Returns the settings of each training. Raises PlatformError for the first that is impossible."""
    return [with_training(settings, changes) for changes in trials]


def ranking(trials: Sequence[Trial]) -> list[Trial]:
    """Returns the trainings, the best first: by right development cases, and where these are equal by held-out loss."""
    return sorted(trials, key=lambda trial: (-trial.right, trial.held_out_loss))


def ranking_text(trials: Sequence[Trial]) -> str:
    """Returns the ranking as lines, and the best one's settings as settings.yaml takes them."""
    ranked = ranking(trials)
    lines = [f"{place}. {_outcome(trial)}: {described(trial.changes)}" for place, trial in enumerate(ranked, 1)]
    if not ranked[0].cases:
        lines.insert(0, "The domain has no development suites: ranked by the loss on held-out examples.")
    training = {name: value for name, value in ranked[0].changes.items() if name != "seed"}
    kept = {"training": training, **{name: value for name, value in ranked[0].changes.items() if name == "seed"}}
    return "\n".join([*lines, "The best one's, for settings.yaml:", yaml.safe_dump(kept, sort_keys=False)])


def described(changes: Mapping[str, Any]) -> str:
    """Returns settings in a line, such as ``rank=8 learning_rate=0.001``."""
    return " ".join(f"{name}={value}" for name, value in changes.items()) or "the platform's settings"


def run_sweep(settings: Settings, trials: Sequence[Mapping[str, Any]], say: Callable[[str], None]) -> str:
    """Runs the sweep of the settings' domain as a job on the platform's instance; returns the ranking.

    Raises:
        PlatformError: a training's settings are impossible, or the job failed.
    """
    from taskagent_platform.defs.instance import close_abandoned_runs, open_instance
    from taskagent_platform.defs.training_sweep import KIND, sweep_job_name, sweep_stages
    from taskagent_platform.domains.registry import find_domain
    from taskagent_platform.job_process import start_job
    from taskagent_platform.run_progress import PlainView, RunProgress

    settings_of(settings, trials)
    domain = find_domain(settings.domain)
    progress = RunProgress(domain.name, sweep_stages(domain))
    view = PlainView(say, progress)
    config = {"ops": {f"{domain.name}__{KIND}": {"config": {"trials": [dict(changes) for changes in trials]}}}}
    with open_instance(settings) as instance:
        close_abandoned_runs(instance)
        with start_job(settings, instance, sweep_job_name(domain.name), run_config=config, say=say) as run, view:
            for entry in run.events():
                if entry is None:
                    view.update()
                else:
                    progress.apply(entry)
        if not progress.succeeded:
            stopping = [str(check) for check in progress.failed_checks if check.stops]
            reason = "; ".join([*stopping, *progress.errors]) or run.last_words()
            raise PlatformError(f"The sweep failed; what was trained is kept for the next one: {reason}")
    return (settings.folder(domain.name) / KIND / RANKING_FILE).read_text()


def _outcome(trial: Trial) -> str:
    if trial.diverged:
        return "diverged"
    development = f"development {trial.development}, " if trial.cases else ""
    losses = f"held-out loss {trial.held_out_loss:.4f}, training loss {trial.training_loss:.4f}"
    return f"{development}{losses}, {trial.seconds:.0f} s"


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
