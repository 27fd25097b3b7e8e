"""The main job from the command line: what it will take, how it goes, and what came of it."""

import json
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from taskagent_platform.artifacts import read_manifest
from taskagent_platform.data.distribution import Distribution
from taskagent_platform.doctor import preflight
from taskagent_platform.domains.base import Domain
from taskagent_platform.domains.registry import find_domain
from taskagent_platform.errors import PlatformError
from taskagent_platform.estimate import estimate
from taskagent_platform.job_process import JobProcess, start_job
from taskagent_platform.run_progress import PlainView, RunProgress, TerminalView, duration
from taskagent_platform.serving.active import active_file, endpoint_url, model_name, read_active
from taskagent_platform.serving.deployments import status
from taskagent_platform.settings import Settings

if TYPE_CHECKING:  # printing the command line's help must not wait for Dagster
    from taskagent_platform.evaluation.report import EvalReport

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells count it (128 + SIGINT)."""
EXAMPLE_REQUEST = "Create a high-priority task to review the Q4 budget due Friday"


def run_demo(settings: Settings, console: Console, *, run_config: Mapping[str, Any] | None = None) -> int:
    """Runs the main job of the settings' domain and shows it.

    Args:
        settings: the settings.
        console: where everything is shown; a terminal gets a live view, anything else plain lines.
        run_config: Dagster's configuration of the run.

    Returns:
        The exit status: 0 if the model is deployed, 1 if the run failed or a gate blocks the model, 130 if it was
        interrupted.

    Raises:
        PlatformError: the run cannot start: what is wrong with this machine or the settings.
    """
    from taskagent_platform.defs.domain import stage_names
    from taskagent_platform.defs.instance import close_abandoned_runs, open_instance
    from taskagent_platform.defs.retrain import job_name

    say = _speaker(console)
    for check in preflight(settings):
        if check.status == "warning":
            say(f"Note: {check.found}: {check.remedy}.")
    domain = find_domain(settings.domain)
    begin = time.monotonic()
    with open_instance(settings) as instance:
        close_abandoned_runs(instance)
        expected = estimate(settings, domain, instance)
        say(
            f"Profile {settings.profile}, domain {domain.name}: about {duration(expected.seconds)} if everything is "
            f"made anew ({expected.basis}). What is up to date is reused."
        )
        progress = RunProgress(domain.name, stage_names(domain))
        view = TerminalView(console, progress) if console.is_terminal else PlainView(say, progress)
        try:
            with start_job(settings, instance, job_name(domain.name), run_config=run_config, say=say) as run, view:
                _follow(run, progress, view)
        except KeyboardInterrupt:
            after = duration(time.monotonic() - begin)
            say(f"Interrupted after {after}. What was finished is kept and reused next time.")
            return INTERRUPTED
    took = duration(time.monotonic() - begin)
    if not progress.succeeded:
        _show_failure(settings, domain, progress, run, say)
        return 1
    _show_success(settings, domain, progress, took, say)
    return 0


def _follow(run: JobProcess, progress: RunProgress, view: TerminalView | PlainView) -> None:
    for entry in run.events():
        if entry is not None:
            progress.apply(entry)
        else:
            view.update()


def _speaker(console: Console) -> Callable[[str], None]:
    def say(text: str) -> None:
        # Neither markup nor highlighting: the text may hold what a model said.
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    return say


def _show_failure(
    settings: Settings, domain: Domain, progress: RunProgress, run: JobProcess, say: Callable[[str], None]
) -> None:
    stopping = [check for check in progress.failed_checks if check.stops]
    gates = [check for check in stopping if check.asset == "eval_report"]
    if gates:
        say("\n" + _reports(settings, domain))
        for gate in gates:
            say(f"Gate {gate.name} blocks the model: {gate.description}")
        say(f"Nothing was deployed. {_champion(settings, domain)}")
    else:
        for check in stopping:
            say(str(check))
        for error in progress.errors or ([] if stopping else [f"The run ended early: {run.last_words()}"]):
            say(error)
    say(f"Look closer: `make ui` (run {(run.run_id or 'not started')[:8]}), {run.log}")


def _champion(settings: Settings, domain: Domain) -> str:
    found = status(settings)
    present = next((d for d in found.domains if d.domain == domain.name and d.deployments is not None), None)
    if present is None or present.deployments is None:
        return "No model of this domain is served."
    before = f"The model deployed before ({present.deployments.active.model_digest[:12]})"
    if found.gateway is None or not present.active_is_healthy:
        return f"{before} does not answer; `taskagent serve --domain {domain.name}` starts it again."
    return f"{before} stays at {found.endpoint}."


def _show_success(
    settings: Settings, domain: Domain, progress: RunProgress, took: str, say: Callable[[str], None]
) -> None:
    reused = [stage.name for stage in progress.stages.values() if stage.state == "reused"]
    if reused:
        say(f"\nUp to date and reused: {', '.join(reused)}.")
    say("\n" + _reports(settings, domain))
    for check in progress.failed_checks:
        say(f"Note: the check {check.name} of {check.asset} warns: {check.description}")
    present = read_active(active_file(settings)).domains.get(domain.name)
    if present is None:
        raise PlatformError(f"The run succeeded, but {active_file(settings)} names no deployment; run it again.")
    url = endpoint_url(settings)
    request = _write_example_request(settings, domain)
    ports = settings.ports
    say(
        f"Done in {took}. Model {present.active.model_digest[:12]} is deployed.\n"
        f"  endpoint  {url}  (model {present.active.model_name})\n"
        f"  Dagster   http://127.0.0.1:{ports.dagster}  (open it with: make ui)\n"
        f"  MLflow    http://127.0.0.1:{ports.mlflow}  (open it with: make mlflow)\n"
        "Try:\n"
        f"  curl -s {url}/chat/completions -H 'Content-Type: application/json' -d @{request}\n"
        f'  .venv/bin/taskagent ask "{EXAMPLE_REQUEST}"\n'
        "`make stop` ends the servers."
    )


def _write_example_request(settings: Settings, domain: Domain) -> Path:
    """Writes a whole request, with the prompt and the tools that the model was taught, for curl to send."""
    body = {
        "model": model_name(settings, domain.name),
        "messages": [*domain.system_messages(datetime.now()), {"role": "user", "content": EXAMPLE_REQUEST}],
        "tools": domain.openai_tools(),
        "temperature": 0,
        "max_tokens": settings.serving.max_tokens,
    }
    path = settings.folder(domain.name) / "example_request.json"
    path.write_text(json.dumps(body, ensure_ascii=False, indent=1))
    return path


def _reports(settings: Settings, domain: Domain) -> str:
    """Returns what the model learned from, and what it was measured to get right of the suites."""
    from taskagent_platform.evaluation.report import load_report, render_report
    from taskagent_platform.serving.gates import champion_of, read_champion_report

    folder = settings.folder(domain.name)
    dataset = Distribution.model_validate(read_manifest(folder / "training_dataset").details["distribution"])
    base: EvalReport | None
    try:
        base = load_report(folder / "base_eval_report")
    except PlatformError:
        base = None
    measured = load_report(folder / "eval_report")
    champion = champion_of(settings, domain, measured.model_digest or "")
    try:
        against = None if champion is None else read_champion_report(settings, domain, champion)
    except PlatformError:
        against = None  # the gate says why
    report = render_report(measured, settings.gates, base=base, champion=against)
    return f"TRAINING DATASET  {domain.name}\n{dataset.text()}\n\n{report}"
