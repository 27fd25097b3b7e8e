"""The command line: `taskagent`. Every command imports what it needs when it runs, so that help comes at once."""

import json
import os
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from taskagent_platform.errors import PlatformError

if TYPE_CHECKING:
    from taskagent_platform.domains.base import Domain
    from taskagent_platform.serving.gateway import ApiKeys
    from taskagent_platform.settings import Settings

app = typer.Typer(
    help="Turns a description of some tools into a fine-tuned, evaluated, gated and served tool-calling model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
domain_app = typer.Typer(help="What models are taught.", no_args_is_help=True)
suite_app = typer.Typer(help="What models are judged by.", no_args_is_help=True)
audit_app = typer.Typer(help="The record of every tool call, deployment and override.", no_args_is_help=True)
app.add_typer(domain_app, name="domain")
app.add_typer(suite_app, name="suite")
key_app = typer.Typer(help="Who may use the endpoint; without any key, whoever reaches it.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")
app.add_typer(key_app, name="key")

DomainOption = Annotated[str | None, typer.Option("--domain", help="The domain; the settings' own if not given.")]
NowOption = Annotated[
    str | None,
    typer.Option("--now", help="The moment it takes place, YYYY-MM-DDTHH:MM; else the clock's."),
]
_DIGEST_SHOWN = 12
_PAGES = "pages"
"""Folder of the home that names the process of every page that was opened."""
_PAGE_PATIENCE_S = 20


def main() -> None:
    """Runs the command line; a PlatformError becomes one sentence on standard error and exit status 1."""
    try:
        app()
    except PlatformError as error:
        sys.exit(f"taskagent: {error}")


@app.command()
def demo() -> None:
    """Run the main job: train, merge, evaluate, gate and deploy; reuse what is up to date."""
    from rich.console import Console

    from taskagent_platform.demo import INTERRUPTED, run_demo

    try:
        code = run_demo(_settings(), Console())
    except KeyboardInterrupt:
        code = INTERRUPTED
    raise typer.Exit(code)


@app.command()
def improve(
    rounds: Annotated[int, typer.Option(help="How often to retrain at most.", min=1)] = 3,
) -> None:
    """Diagnose, add examples, retrain and compare until the gates pass or nothing improves; keep the best."""
    from rich.console import Console

    from taskagent_platform.demo import INTERRUPTED
    from taskagent_platform.improve import run_improvement

    try:
        outcome = run_improvement(_settings(), Console(), rounds)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    right, cases = outcome.right
    kept = "the model from before" if outcome.best_round == 0 else f"the model of round {outcome.best_round}"
    typer.echo(f"{outcome.rounds} rounds; ended because: {outcome.ending}. Kept is {kept}: {right} of {cases} right.")
    if outcome.ending != "the gates pass":
        raise typer.Exit(1)


@app.command()
def sweep(
    choices: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE,VALUE]...", help="Training settings, such as rank=8,32 learning_rate=1e-3,3e-3."
        ),
    ] = None,
) -> None:
    """Train with every combination of settings and rank them on the development suites; no other suite is read."""
    from taskagent_platform.demo import INTERRUPTED
    from taskagent_platform.sweep import grid, run_sweep

    try:
        typer.echo(run_sweep(_settings(), grid(choices or []), typer.echo), nl=False)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def ask(
    text: Annotated[str, typer.Argument(help="The request, in quotes.")],
    yes: Annotated[bool, typer.Option("--yes", help="Approve destructive calls without asking.")] = False,
    now: NowOption = None,
    endpoint: Annotated[str | None, typer.Option(help="Another endpoint than the platform's, with /v1.")] = None,
    domain: DomainOption = None,
) -> None:
    """Ask the agent; destructive calls are shown and have to be approved. Exit status 1 unless all was done."""
    from taskagent_platform.agent.session import ask as ask_agent

    settings = _settings()
    moment = _moment(now) if now is not None else None
    asked_of = _domain(settings, domain)
    answer = ask_agent(settings, asked_of, text, yes=yes, now=moment, base_url=endpoint, echo=_echo)
    if any(call.outcome == "refused" for call in answer.calls) or not answer.is_finished:
        raise typer.Exit(1)


@app.command()
def evaluate(
    endpoint: Annotated[str, typer.Option(help="Base URL of an OpenAI-compatible server, with /v1.")],
    model: Annotated[str, typer.Option(help="The model name to ask for.")],
    suite: Annotated[list[Path], typer.Option(help="A suite file; more may follow, or the option again.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="More suite files.")] = None,
    robustness: Annotated[
        list[Path] | None, typer.Option(help="A suite file of hard cases, each of a slice, which no gate counts.")
    ] = None,
    domain: DomainOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the whole report here, as JSON.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write the report here, as one HTML page.")] = None,
    load: Annotated[bool, typer.Option("--load", help="Measure the load curve, too: many requests at once.")] = False,
    gate: Annotated[bool, typer.Option("--gate", help="Exit with status 1 unless every gate passes.")] = False,
    api_key: Annotated[str, typer.Option(envvar="TASKAGENT_API_KEY", help="For servers that want one.")] = "none",
) -> None:
    """Measure any OpenAI-compatible server on suite files, with a domain's prompt and tools."""
    from rich.console import Console

    from taskagent_platform.evaluation.page import render_page
    from taskagent_platform.evaluation.report import gate_results, render_report
    from taskagent_platform.evaluation.run import evaluate as measure
    from taskagent_platform.evaluation.suite import load_suites
    from taskagent_platform.serving.active import checked_key
    from taskagent_platform.settings import EvaluationSettings

    settings = _settings()
    chosen = settings.evaluation
    concurrency = (chosen.load_concurrency or EvaluationSettings().load_concurrency) if load else 0
    # A profile may ask only a part of the suites in its runs; here all of what was named is asked. What the command
    # line says wins over the environment, too.
    chosen = chosen.model_copy(update={"case_limit": None, "load_concurrency": concurrency})
    settings = settings.model_copy(update={"evaluation": chosen})
    of_domain = _domain(settings, domain)
    suites = load_suites([*suite, *(more or [])], robustness or (), of_domain)
    for file in (json_file, html_file):
        if file is not None and not file.resolve().parent.is_dir():
            raise PlatformError(f"{file} cannot be written: there is no folder {file.resolve().parent}.")
    console = Console(stderr=True)
    with console.status("asking") as status:
        report = measure(
            settings,
            of_domain,
            base_url=endpoint.rstrip("/"),
            model_name=model,
            model_digest=None,
            suite=suites.gated,
            robustness=suites.robustness,
            api_key=checked_key(api_key),
            on_progress=lambda what, done, total: status.update(f"{what}: {done}/{total}"),
        )
    if json_file is not None:
        json_file.write_text(report.model_dump_json(indent=1), encoding="utf-8")
    if html_file is not None:
        html_file.write_text(render_page(report, gate_results(report, settings.gates)), encoding="utf-8")
    typer.echo(render_report(report, settings.gates), nl=False)
    if gate and not all(result.passed for result in gate_results(report, settings.gates)):
        raise typer.Exit(1)


@suite_app.command("lint")
def lint_suite_files(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Suite files, looked at together.")],
    domain: DomainOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with status 1 for notes, too.")] = False,
) -> None:
    """Find wrong gold answers and near-duplicates; exit status 1 if a case cannot stand as it is."""
    from taskagent_platform.evaluation.lint import lint_suite
    from taskagent_platform.evaluation.suite import load_suite

    of_domain = _domain(_settings(), domain)
    suite = load_suite(files, of_domain)
    findings = lint_suite(suite, of_domain)
    for finding in findings:
        typer.echo(f"{'ERROR' if finding.is_error else 'note '} {finding.case}: {finding.kind}: {finding.sentence}")
    errors = sum(finding.is_error for finding in findings)
    typer.echo(f"{len(suite.cases)} cases, {errors} errors, {len(findings) - errors} notes.")
    if errors or (strict and findings):
        raise typer.Exit(1)


@domain_app.command("list")
def list_domains() -> None:
    """List the installed domains."""
    from taskagent_platform.domains.registry import domains

    for name, domain in domains().items():
        typer.echo(f"{name}: {', '.join(tool.name for tool in domain.tools)}")


@domain_app.command("show")
def show_domain(
    name: Annotated[str, typer.Argument(help="The domain.")],
    now: NowOption = None,
) -> None:
    """Print system message and tools as JSON, exactly as they are sent to the server."""
    from taskagent_platform.domains.registry import find_domain

    domain = find_domain(name)
    moment = _moment(now) if now is not None else datetime.now()
    shown = {"messages": list(domain.system_messages(moment)), "tools": domain.openai_tools()}
    typer.echo(json.dumps(shown, ensure_ascii=False, indent=2))


@app.command()
def status() -> None:
    """Show what is deployed and what runs; exit status 1 if the endpoint does not answer."""
    from taskagent_platform.serving.active import endpoint_url
    from taskagent_platform.serving.deployments import status as platform_status

    settings = _settings()
    found = platform_status(settings)
    gateway = "not running" if found.gateway is None else f"running (process {found.gateway.pid})"
    typer.echo(f"profile   {settings.profile}, home {settings.home}")
    typer.echo(f"endpoint  {found.endpoint}, gateway {gateway}")
    if found.endpoint != (wanted := endpoint_url(settings)):
        typer.echo(f"          the settings now put it at {wanted}; the next deployment moves it there")
    healthy = found.gateway is not None
    for of_domain in found.domains:
        deployments = of_domain.deployments
        if deployments is None:
            typer.echo(f"{of_domain.domain}: nothing is deployed")
        else:
            active = deployments.active
            remedy = f"does not answer; `taskagent serve --domain {of_domain.domain}` starts it again"
            state = "answers" if found.gateway is not None and of_domain.active_is_healthy else remedy
            typer.echo(
                f"{of_domain.domain}: model {active.model_digest[:_DIGEST_SHOWN]} as {active.model_name!r}, deployed "
                f"{active.deployed_at:%Y-%m-%d %H:%M} UTC by {active.deployed_by}: {state}"
            )
            if active.override_reason is not None:
                typer.echo(f"  deployed past its gates: {active.override_reason}")
            for gate in active.gates:
                verdict = "PASS" if gate.passed else "FAIL"
                measured = gate.note if gate.value is None and gate.note else _number(gate.value)
                typer.echo(f"  {verdict} {gate.name}: {measured} (target {gate.target:g})")
            healthy = healthy and of_domain.active_is_healthy
            if deployments.previous is not None:
                ready = "ready" if of_domain.previous_is_ready else "stopped, started by a rollback"
                typer.echo(f"  before: model {deployments.previous.model_digest[:_DIGEST_SHOWN]}, {ready}")
        for server in of_domain.others:
            typer.echo(f"  being measured: model {server.model_digest[:_DIGEST_SHOWN]} at {server.base_url}")
    if not any(of_domain.deployments for of_domain in found.domains) or not healthy:
        raise typer.Exit(1)


@app.command()
def serve(domain: DomainOption = None) -> None:
    """Serve the deployed model again, after a restart of the machine or where its server was stopped or ended."""
    from taskagent_platform.serving.active import endpoint_url
    from taskagent_platform.serving.deployments import serve as serve_again

    settings = _settings()
    served = serve_again(settings, _domain(settings, domain), on_progress=typer.echo)
    typer.echo(f"Model {served.model_digest[:_DIGEST_SHOWN]} of {served.domain} is served at {endpoint_url(settings)}.")


@app.command()
def stop() -> None:
    """Stop the runs, model servers, gateway and pages that the platform started, and only those."""
    from taskagent_platform.defs.instance import report_canceling
    from taskagent_platform.job_process import stop_jobs
    from taskagent_platform.launchers.run_worker import FOLDER, RunWorkers
    from taskagent_platform.serving.deployments import stop_all

    settings = _settings()
    workers = RunWorkers(settings.home / "dagster" / FOLDER)
    # Runs first, so that none starts a server again.
    stopped = stop_jobs(settings)
    runs = workers.stop_all(partial(report_canceling, settings))
    stopped += [f"run {run_id[:8]}, which Dagster had started" for run_id in runs]
    stopped += stop_all(settings)
    stopped += _stop_pages(settings)
    for text in stopped:
        typer.echo(f"stopped {text}" if not text.startswith("not ") else f"could not stop {text.removeprefix('not ')}")
    if not stopped:
        typer.echo("Nothing was running.")
    if any(text.startswith("not ") for text in stopped):
        raise typer.Exit(1)


@app.command()
def ui() -> None:
    """Open Dagster's page on the platform's instance; Materialize all there does what the demo does."""
    from taskagent_platform.defs.instance import close_abandoned_runs, instance_environment, open_instance
    from taskagent_platform.serving.server import LOOPBACK, check_port
    from taskagent_platform.settings import PROJECT_ROOT

    settings = _settings()
    port = settings.ports.dagster
    check_port(LOOPBACK, port, "TASKAGENT_PORTS__DAGSTER")
    with open_instance(settings) as instance:
        close_abandoned_runs(instance)
    typer.echo(f"Dagster opens at http://{LOOPBACK}:{port} (Ctrl-C ends it).")
    program = str(Path(sys.executable).with_name("dg"))
    command = [program, "dev", "--host", LOOPBACK, "--port", str(port)]
    if not (PROJECT_ROOT / "pyproject.toml").is_file():
        # Installed as a package: there is no project to find the definitions in.
        command += ["--module-name", "taskagent_platform.definitions"]
    # dg compares the active environment with the project's and warns where none is active.
    environment = {**instance_environment(settings), "VIRTUAL_ENV": sys.prefix}
    _become_page(settings, "Dagster", command, environment, PROJECT_ROOT)


@app.command()
def mlflow() -> None:
    """Open MLflow's page on the platform's runs."""
    from taskagent_platform.defs.tracking import server_environment, store_folder, store_uri
    from taskagent_platform.serving.server import LOOPBACK, check_port

    settings = _settings()
    port = settings.ports.mlflow
    check_port(LOOPBACK, port, "TASKAGENT_PORTS__MLFLOW")
    folder = store_folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    typer.echo(f"MLflow opens at http://{LOOPBACK}:{port} (Ctrl-C ends it).")
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1",
        "--backend-store-uri", store_uri(settings), "--default-artifact-root", (folder / "artifacts").as_uri(),
    ]  # fmt: skip
    _become_page(settings, "MLflow", command, server_environment(), folder)


@app.command()
def doctor() -> None:
    """Look at Python, disk, memory, ports, GPU and packages: what is wrong, and what to do about it."""
    from taskagent_platform.doctor import examine

    checks = examine(_settings())
    marks = {"ok": "ok      ", "warning": "WARNING ", "problem": "PROBLEM "}
    for check in checks:
        typer.echo(f"{marks[check.status]}{check.name}: {check.found}")
        if check.remedy:
            typer.echo(f"{' ' * 8}  what to do: {check.remedy}")
    if any(check.status == "problem" for check in checks):
        raise typer.Exit(1)


@app.command()
def rollback(
    reason: Annotated[str, typer.Option(help="Why; it goes into the audit log.")],
    domain: DomainOption = None,
) -> None:
    """Serve the model again that was deployed before the present one."""
    from taskagent_platform.serving.deployments import rollback as roll_back

    settings = _settings()
    served = roll_back(settings, _domain(settings, domain), reason=reason, on_progress=typer.echo)
    typer.echo(f"Model {served.model_digest[:_DIGEST_SHOWN]} of {served.domain} is served again.")


@audit_app.command("verify")
def verify_audit() -> None:
    """Check that no line of the audit log was changed, removed or cut off."""
    from taskagent_platform.audit import audit_log

    log = audit_log(_settings())
    typer.echo(f"{log.path}: {log.verify()} lines, unchanged.")


@audit_app.command("list")
def list_audit(
    last: Annotated[int, typer.Option(help="How many lines, the newest last.", min=1)] = 20,
) -> None:
    """Show the newest lines of the audit log: who, when, what, with which outcome."""
    from collections import deque

    from taskagent_platform.audit import AuditEntry, audit_log

    newest: deque[AuditEntry] = deque(maxlen=last)
    damage = None
    try:
        newest.extend(audit_log(_settings()).entries())
    except PlatformError as error:
        # What stands before the damaged line is shown all the same.
        damage = error
    for entry in newest:
        arguments = entry.arguments if isinstance(entry.arguments, str) else json.dumps(entry.arguments or {})
        call = f" {entry.tool}({arguments})" if entry.tool else ""
        model = f" by model {entry.model_digest[:_DIGEST_SHOWN]}" if entry.model_digest else ""
        # What a model wrote may hold control characters, which a terminal would obey.
        line = f"{entry.actor} {entry.action} {entry.outcome}{call}{model}{f': {entry.reason}' if entry.reason else ''}"
        shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
        typer.echo(f"{entry.time:%Y-%m-%d %H:%M:%S} {entry.domain or '-'} {shown}")
    if damage is not None:
        raise damage


@key_app.command("add")
def add_key(name: Annotated[str, typer.Argument(help="Whom it is for; the gateway's log shows it.")]) -> None:
    """Make a key and print it, once: only its hash is kept. From the first key on, every client needs one."""
    typer.echo(_keys().add(name))


@key_app.command("list")
def list_keys() -> None:
    """List whom keys were made for."""
    for name in _keys().names():
        typer.echo(name)


@key_app.command("remove")
def remove_key(name: Annotated[str, typer.Argument(help="Whose key is taken back.")]) -> None:
    """Take a key back; it stops working at once."""
    left = _keys().remove(name)
    rest = f"{left} left." if left else "No key is left: nobody gets in."
    typer.echo(f"The key of {name} is no longer accepted. {rest}")


def _echo(line: str) -> None:
    """Prints a line; where its reader is gone (`| head`), everything from it on goes nowhere."""
    try:
        typer.echo(line)
    except BrokenPipeError:
        # Python itself would complain of what is left in the buffer when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _keys() -> "ApiKeys":
    from taskagent_platform.serving.active import active_file
    from taskagent_platform.serving.gateway import ApiKeys, api_keys_file

    return ApiKeys(api_keys_file(active_file(_settings())))


def _settings() -> "Settings":
    from taskagent_platform.settings import load_settings

    return load_settings()


def _domain(settings: "Settings", name: str | None) -> "Domain":
    from taskagent_platform.domains.registry import find_domain

    return find_domain(name or settings.domain)


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise PlatformError(f"--now takes a moment such as 2024-01-15T09:00, not {text!r}.") from None
    return moment.replace(tzinfo=None)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _become_page(
    settings: "Settings", name: str, command: list[str], environment: dict[str, str], folder: Path
) -> None:
    """Becomes the page's server, which then gets the terminal's signals itself, and leaves word of it for `stop`."""
    import psutil

    from taskagent_platform.process_identity import process_mark

    record = settings.home / _PAGES / name
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(process_mark(psutil.Process()))
    sys.stdout.flush()
    # A shell starts what runs in the background with SIGINT ignored, and Dagster gives SIGTERM the same treatment.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.chdir(folder)
    os.execve(command[0], command, environment)


def _stop_pages(settings: "Settings") -> list[str]:
    """Ends the pages that are open, with their children; returns what was stopped."""
    import psutil

    from taskagent_platform.process_identity import marked_process

    stopped = []
    for record in sorted((settings.home / _PAGES).glob("*")):
        page = marked_process(record.read_text())
        if page is not None:
            with suppress(psutil.NoSuchProcess):
                family = [page, *page.children(recursive=True)]
                page.terminate()
                psutil.wait_procs([page], _PAGE_PATIENCE_S)
                # A server ends its children with itself; what it left behind has nobody to serve.
                for process in family:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                psutil.wait_procs(family, _PAGE_PATIENCE_S)
            stopped.append(f"{record.name}'s page (process {page.pid})")
        record.unlink(missing_ok=True)
    return stopped


if __name__ == "__main__":
    main()
