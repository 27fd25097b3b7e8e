"""How a run of the job is going, read from Dagster's event log and shown in a terminal or as plain lines."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # printing the command line's help must not wait for Dagster
    from dagster import EventLogEntry

State = Literal["running", "done", "reused", "failed", "skipped"]
_MARKS: Mapping[State, tuple[str, str]] = {
    "running": ("▶", "cyan"),
    "done": ("✓", "green"),
    "reused": ("✓", "green"),
    "failed": ("✗", "red"),
    "skipped": ("-", "yellow"),
}
_CHECK_FAILED = "DagsterAssetCheckFailedError"
_PLAIN_EVERY_S = 15.0


def duration(seconds: float) -> str:
    """Returns a duration for people: ``8 s``, ``1 min 20 s``, ``23 min``, ``1 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 5:
        return f"{minutes} min {rest:02d} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass(frozen=True)
class FailedCheck:
    """A check that did not pass.

    Attributes:
        asset: the asset that it judged.
        name: its name.
        description: what was found.
        stops: whether it ended the run (a blocking check of severity ERROR).
    """

    asset: str
    name: str
    description: str
    stops: bool

    def __str__(self) -> str:
        return f"The check {self.name} of {self.asset} failed: {self.description}"


@dataclass
class StageProgress:
    """One stage of the run.

    Attributes:
        name: the asset.
        state: how far it is.
        started: when, in seconds since the epoch.
        ended: when, likewise.
        figures: the newest figures of the running step.
        note: the newest line that it logged.
        checks: how many of its checks passed, and of how many.
    """

    name: str
    state: State
    started: float
    ended: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    checks: tuple[int, int] = (0, 0)

    def seconds(self, now: float) -> float:
        """Returns how long it took, or has taken."""
        return (self.ended or now) - self.started

    def share(self) -> float | None:
        """Returns how much of the stage is done, from 0 to 1, where it says so."""
        for done, whole in (("step", "steps"), ("cases_done", "cases")):
            # A finished adapter says how many steps it took, and no longer at which one it is.
            if done in self.figures and self.figures.get(whole):
                share: float = float(self.figures[done]) / float(self.figures[whole])
                return min(1.0, share)
        return None

    def details(self) -> str:
        """Returns the newest figures and note in a line."""
        figures = self.figures
        parts = []
        if self.state == "running" and {"step", "steps"} <= figures.keys():
            parts.append(f"step {figures['step']}/{figures['steps']}")
            losses = [name for name in ("loss", "eval_loss") if name in figures]
            parts += [f"{name.replace('_', ' ')} {figures[name]:.4f}" for name in losses]
            if "eta_s" in figures:
                parts.append(f"{duration(figures['eta_s'])} left")
        elif self.state == "running" and {"cases_done", "cases"} <= figures.keys():
            parts.append(f"{figures['cases_done']}/{figures['cases']} cases")
            if "eta_s" in figures:
                parts.append(f"{duration(figures['eta_s'])} left")
        elif self.state == "reused":
            parts.append("up to date, reused")
        elif self.state == "running" or self.state == "failed":
            parts.append(self.note)
        passed, judged = self.checks
        if judged:
            parts.append(f"{passed} of {judged} checks passed")
        return ", ".join(part for part in parts if part)


class RunProgress:
    """What is known of a run, event by event.

    Args:
        domain: the run's domain; its name is the prefix of assets and steps.
        stages: the names of the assets that the run makes.
    """

    def __init__(self, domain: str, stages: Collection[str]) -> None:
        self.stage_names = frozenset(stages)
        self.stages: dict[str, StageProgress] = {}
        self.failed_checks: list[FailedCheck] = []
        self.errors: list[str] = []
        self.finished = False
        self.succeeded = False
        self._domain = domain

    @property
    def running(self) -> StageProgress | None:
        """The stage that is being made."""
        return next((stage for stage in self.stages.values() if stage.state == "running"), None)

    def apply(self, entry: "EventLogEntry") -> None:
        """Takes in one event."""
        event = entry.dagster_event
        if event is None:
            self._note(entry.step_key, entry.user_message)
            return
        kind = event.event_type_value
        name = self._asset_of_step(entry.step_key)
        if kind in ("PIPELINE_SUCCESS", "PIPELINE_FAILURE", "PIPELINE_CANCELED"):
            self.finished = True
            self.succeeded = kind == "PIPELINE_SUCCESS"
        elif kind == "ASSET_CHECK_EVALUATION":
            self._check(event.asset_check_evaluation_data)
        elif name is None:
            # A check that blocks fails its step, too; what it found is told already.
            if kind == "STEP_FAILURE" and event.step_failure_data.error is not None and not is_failed_check(event):
                self.errors.append(failure_reason(event))
        elif kind == "STEP_START":
            self.stages[name] = StageProgress(name, "running", entry.timestamp)
        elif kind == "STEP_SKIPPED":
            self.stages[name] = StageProgress(name, "skipped", entry.timestamp, entry.timestamp)
        elif kind in ("STEP_SUCCESS", "STEP_FAILURE") and name in self.stages:
            self._end(self.stages[name], kind, event, entry.timestamp)
        elif kind == "ASSET_OBSERVATION" and name in self.stages:
            stage, figures = self.stages[name], _plain(event.asset_observation_data.asset_observation.metadata)
            # A sweep trains and measures by turns, and an evaluation asks cases, then times requests: how far the one
            # is, and how long it still takes, is nothing that the other says.
            same_part = ("steps" in figures) == ("steps" in stage.figures)
            same_part = same_part and figures.get("what") == stage.figures.get("what")
            stage.figures = {**stage.figures, **figures} if same_part else figures
        elif kind == "ASSET_MATERIALIZATION" and name in self.stages:
            made = _plain(event.step_materialization_data.materialization.metadata)
            self.stages[name].figures = made
            if made.get("reused"):
                self.stages[name].state = "reused"

    def _end(self, stage: StageProgress, kind: str, event: Any, when: float) -> None:
        stage.ended = when
        if kind == "STEP_FAILURE":
            stage.state = "failed"
            reason = failure_reason(event)
            stage.note = reason.splitlines()[0]
            self.errors.append(f"{stage.name}: {reason}")
        elif stage.state == "running":
            stage.state = "done"

    def _check(self, evaluation: Any) -> None:
        asset = evaluation.asset_key.path[-1]
        if stage := self.stages.get(asset):
            passed, judged = stage.checks
            stage.checks = (passed + bool(evaluation.passed), judged + 1)
        if not evaluation.passed:
            stops = bool(evaluation.blocking) and evaluation.severity.value == "ERROR"
            self.failed_checks.append(FailedCheck(asset, evaluation.check_name, evaluation.description or "", stops))

    def _note(self, step_key: str | None, text: str) -> None:
        name = self._asset_of_step(step_key)
        if name in self.stages and text.strip():
            self.stages[name].note = text.strip().splitlines()[0]

    def _asset_of_step(self, step_key: str | None) -> str | None:
        name = (step_key or "").removeprefix(f"{self._domain}__")
        return name if name in self.stage_names else None


def is_failed_check(event: Any) -> bool:
    """Tells whether a step failed because a check that blocks did not pass."""
    error = event.step_failure_data.error
    return error is not None and error.cls_name == _CHECK_FAILED


def failure_reason(event: Any) -> str:
    """Returns why a step failed: the platform's own words where there are any, else the first error's."""
    data = event.step_failure_data
    if data.user_failure_data is not None and data.user_failure_data.description:
        return str(data.user_failure_data.description)
    error = data.error
    while error is not None and error.cause is not None:
        error = error.cause
    return (error.message.strip() if error is not None else "") or "no reason was recorded"


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.value for name, value in metadata.items() if isinstance(value.value, bool | int | float | str)}


class TerminalView:
    """Shows a run in a terminal: a line for each stage, a bar for the running one, the time."""

    def __init__(self, console: Console, progress: RunProgress, clock: Callable[[], float] = time.time) -> None:
        self._progress = progress
        self._clock = clock
        self._started = clock()
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=False)

    def __enter__(self) -> "TerminalView":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self) -> None:
        """Takes notice that the progress changed; the screen follows by itself."""

    def render(self) -> RenderableType:
        """Returns what the screen shows now."""
        now = self._clock()
        rows = Table.grid(padding=(0, 2))
        rows.add_column()
        rows.add_column(no_wrap=True)
        rows.add_column(justify="right", no_wrap=True)
        rows.add_column(overflow="ellipsis", no_wrap=True)
        for stage in self._progress.stages.values():
            mark, colour = _MARKS[stage.state]
            rows.add_row(Text(mark, colour), stage.name, duration(stage.seconds(now)), Text(stage.details()))
        ended = sum(stage.ended is not None for stage in self._progress.stages.values())
        foot = Text(f"{ended} of {len(self._progress.stage_names)} stages, {duration(now - self._started)}", "dim")
        running = self._progress.running
        share = running.share() if running else None
        if share is None:
            return Group(rows, foot)
        return Group(rows, ProgressBar(total=1.0, completed=share, width=60), foot)


class PlainView:
    """Shows a run as lines, for logs: when a stage starts and ends, and now and then how far it is."""

    def __init__(
        self, echo: Callable[[str], None], progress: RunProgress, clock: Callable[[], float] = time.time
    ) -> None:
        self._echo = echo
        self._progress = progress
        self._clock = clock
        self._started = clock()
        self._shown: dict[str, tuple[State, tuple[int, int]]] = {}
        self._spoke = 0.0

    def __enter__(self) -> "PlainView":
        return self

    def __exit__(self, *_: object) -> None:
        self.update()

    def update(self) -> None:
        """Prints what changed."""
        now = self._clock()
        for stage in list(self._progress.stages.values()):
            seen = (stage.state, stage.checks)
            if self._shown.get(stage.name) != seen:
                self._shown[stage.name] = seen
                self._say(now, stage)
            elif stage.state == "running" and now - self._spoke >= _PLAIN_EVERY_S and stage.details():
                self._say(now, stage)

    def _say(self, now: float, stage: StageProgress) -> None:
        self._spoke = now
        took = f" in {duration(stage.seconds(now))}" if stage.state in ("done", "failed") else ""
        details = stage.details()
        self._echo(
            f"[{duration(now - self._started)}] {stage.name}: {stage.state}{took}{f' ({details})' if details else ''}"
        )
