"""The command line as a user meets it: in a process of its own, or through Typer's runner."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import httpx
import psutil
import pytest
from typer.testing import CliRunner, Result

from taskagent_platform import cli
from taskagent_platform.audit import audit_log
from taskagent_platform.defs.instance import open_instance
from taskagent_platform.domains.registry import find_domain
from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.report import EvalReport
from taskagent_platform.launchers.run_worker import FOLDER, RunWorkers
from taskagent_platform.serving import deployments
from taskagent_platform.serving import server as server_module
from taskagent_platform.serving.active import (
    ActiveDeployments,
    Deployment,
    DomainDeployments,
    active_file,
    endpoint_url,
    write_active,
)
from taskagent_platform.serving.gateway_process import GatewayProcess
from taskagent_platform.serving.server import free_port
from taskagent_platform.settings import load_settings
from taskagent_platform_tests.agent.scripted_server import ScriptedServer, call
from taskagent_platform_tests.evaluation.light_server import LightServer
from taskagent_platform_tests.serving.fake_model_server import start_fake_server
from taskagent_platform_tests.serving.fake_server import serve
from taskagent_platform_tests.serving.judged_model import make_model

# None of them is needed to print help.
HEAVY = ("torch", "transformers", "vllm", "mlflow", "dagster", "openai", "agents", "numpy", "pydantic_settings")
COMMANDS = (
    "demo", "improve", "ask", "evaluate", "domain", "status", "stop", "ui", "mlflow", "doctor", "rollback", "audit",
    "suite", "key", "sweep", "serve",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "taskagent_platform.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        timeout=120,
    )


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def test_help_lists_every_command_and_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from taskagent_platform import cli\n"
        "sys.argv = ['taskagent', '--help']\n"
        "try:\n"
        "    cli.main()\n"
        "except SystemExit as done:\n"
        "    print(done.code, sorted(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert all(f" {command} " in done.stdout for command in COMMANDS)
    loaded = done.stderr
    assert loaded.startswith("0 ")
    assert [name for name in HEAVY if f"'{name}'" in loaded] == []


def test_a_domain_is_shown_as_it_is_sent():
    done = invoke("domain", "show", "task_api", "--now", "2024-01-15T09:00")
    assert done.exit_code == 0
    domain = find_domain("task_api")
    shown = json.loads(done.stdout)
    assert list(shown) == ["messages", "tools"]
    assert shown["tools"] == domain.openai_tools()
    assert [message["role"] for message in shown["messages"]] == ["system"]
    assert "2024-01-15" in shown["messages"][0]["content"]


def test_the_domains_are_listed_with_their_tools():
    done = invoke("domain", "list")
    assert done.exit_code == 0
    assert any(line.startswith("task_api: create_task, ") for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("domain", "show", "cooking"), "There is no domain 'cooking'"),
        (("domain", "show", "task_api", "--now", "tomorrow"), "--now takes a moment such as"),
        (("rollback", "--reason", "it is worse"), "no earlier deployment of task_api"),
        (("evaluate", "--endpoint", "http://127.0.0.1:1/v1", "--model", "m", "--suite", "none.json"), "none.json"),
        (("ask", "Hello"), "Nothing answers at"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_no_traceback(arguments, sentence):
    done = run(*arguments, TASKAGENT_SERVING__PORT="1")
    assert done.returncode == 1
    assert done.stderr.startswith("taskagent: ")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_wrong_setting_is_named():
    done = run("status", TASKAGENT_TRAINING__RANK="many")
    assert done.returncode == 1
    assert "training.rank = 'many'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_line_of_a_suite_is_named(tmp_path):
    suite = tmp_path / "suite.json"
    suite.write_text('{"tool_selection": [\n {"input": "Hello", "expected_tool": "fly"}]}')
    done = run("evaluate", "--endpoint", "http://127.0.0.1:1/v1", "--model", "m", "--suite", str(suite))
    assert done.returncode == 1
    assert "suite.json, tool_selection[0] (line 2), field expected_tool" in done.stderr


def test_evaluate_measures_every_named_suite_whole_and_writes_the_report(tmp_path, monkeypatch):
    from taskagent_platform.evaluation import run as evaluation

    first, second, target = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "report.json"
    for file, words in ((first, ("one", "two")), (second, tuple("abcdefghij"))):
        cases = [{"input": word, "expected_tool": "list_tasks", "category": "query"} for word in words]
        file.write_text(json.dumps({"tool_selection": cases}))
    seen: dict[str, Any] = {}

    hard = tmp_path / "hard.json"
    hard.write_text(json.dumps({"abstention": [{"input": "thx", "slice": "terse"}]}))

    def stub(settings, domain, *, suite, robustness, base_url, model_name, **more):
        seen.update(suite=suite, base_url=base_url, model_name=model_name, limit=settings.evaluation.case_limit)
        seen.update(robustness=robustness)
        raise PlatformError("enough")

    monkeypatch.setattr(evaluation, "evaluate", stub)
    done = invoke(
        "evaluate",
        "--endpoint",
        "http://h/v1/",
        "--model",
        "m",
        "--suite",
        str(first),
        str(second),
        "--robustness",
        str(hard),
        "--json",
        str(target),
    )
    assert str(done.exception) == "enough"
    assert [case.input for case in seen["suite"].cases] == ["one", "two", *"abcdefghij"]
    assert [case.input for case in seen["robustness"].cases] == ["thx"]
    assert (seen["base_url"], seen["model_name"]) == ("http://h/v1", "m")
    assert seen["limit"] is None, "the smoke profile's limit is for its own runs"
    assert not target.exists(), "a report of a failed evaluation must not be there"


@pytest.mark.parametrize(
    ("options", "variable", "load"),
    [((), "7", 0), (("--load",), "7", 7), (("--load",), "", 64), (("--load",), "0", 64)],
)
def test_what_evaluate_is_told_wins_over_the_environment(tmp_path, monkeypatch, options, variable, load):
    from taskagent_platform.evaluation import run as evaluation

    suite = tmp_path / "suite.json"
    suite.write_text(json.dumps({"abstention": [{"input": "thx"}]}))
    monkeypatch.setenv("TASKAGENT_EVALUATION__CASE_LIMIT", "1")
    monkeypatch.setenv("TASKAGENT_EVALUATION__LOAD_CONCURRENCY", variable)
    seen: list[Any] = []

    def stub(settings, domain, **more):
        seen.append((settings.evaluation.case_limit, settings.evaluation.load_concurrency))
        raise PlatformError("enough")

    monkeypatch.setattr(evaluation, "evaluate", stub)
    invoke("evaluate", "--endpoint", "http://h/v1", "--model", "m", "--suite", str(suite), *options)
    assert seen == [(None, load)]


def test_evaluate_measures_a_server_and_says_what_the_gates_say(tmp_path):
    suite, as_json, as_html = tmp_path / "suite.json", tmp_path / "report.json", tmp_path / "report.html"
    cases = {"What is due?": "list_tasks", "Call it a day <b>now</b>": "create_task"}
    listed = [{"input": said, "expected_tool": tool, "category": "query"} for said, tool in cases.items()]
    suite.write_text(json.dumps({"tool_selection": listed}))
    server = LightServer({said: [[("list_tasks", {})]] for said in cases})
    with serve(server.app) as url:
        asked = ("evaluate", "--endpoint", f"{url}/v1", "--model", "m", "--suite", str(suite))
        done = invoke(*asked, "--json", str(as_json), "--html", str(as_html))
        gated = invoke(*asked, "--gate")
    assert (done.exit_code, gated.exit_code) == (0, 1), done.output
    assert re.search(r"Tool selection +1/2 +50\.0%.* FAIL", done.stdout)
    report = EvalReport.model_validate_json(as_json.read_text())
    assert (report.metrics["tool_selection"].correct, report.latency is not None) == (1, True)
    assert "Call it a day &lt;b&gt;now&lt;/b&gt;" in as_html.read_text()
    assert {body["model"] for body in server.bodies} == {"m"}


def test_status_without_a_deployment_says_so_and_fails():
    done = invoke("status")
    assert done.exit_code == 1
    assert "gateway not running" in done.stdout


def test_what_is_deployed_is_served_again(monkeypatch):
    monkeypatch.setenv("TASKAGENT_SERVING__PORT", str(free_port()))
    settings = load_settings()
    folder, model = make_model(settings)
    deployment = Deployment(
        domain="task_api", model_name="task_api", model_digest=model.digest, model_folder=folder, report_digest="r",
        gates=(), base_url="http://127.0.0.1:1/v1", server=settings.home / "ended.json", deployed_at=datetime.now(UTC),
        deployed_by="somebody",
    )  # fmt: skip
    write_active(active_file(settings), ActiveDeployments(domains={"task_api": DomainDeployments(active=deployment)}))
    gateway = GatewayProcess(pid=1, create_time=0, host="h", port=1, requests_per_minute=1, log_file=folder)
    monkeypatch.setattr(deployments, "start_server", start_fake_server)
    monkeypatch.setattr(deployments, "start_gateway", lambda settings: gateway)
    monkeypatch.setattr(deployments, "running_gateway", lambda settings: gateway)
    monkeypatch.setattr(server_module, "available_memory_gib", lambda: 64.0)
    try:
        before = invoke("status")
        assert (before.exit_code, "does not answer; `taskagent serve --domain task_api`" in before.stdout) == (1, True)
        done = invoke("serve")
        assert f"Model {model.digest[:12]} of task_api is served at {endpoint_url(settings)}." in done.stdout
        after = invoke("status")
        assert (after.exit_code, "by somebody: answers" in after.stdout) == (0, True)
    finally:
        invoke("stop")


def test_there_must_be_something_to_serve():
    done = run("serve")
    assert (done.returncode, "No model of task_api is deployed; `taskagent demo`" in done.stderr) == (1, True)


def test_stop_without_servers_says_so():
    done = invoke("stop")
    assert (done.exit_code, done.stdout) == (0, "Nothing was running.\n")


def test_the_audit_log_is_verified():
    log = audit_log(load_settings())
    log.append("deploy", "executed", domain="task_api")
    log.append("rollback", "executed", domain="task_api")
    done = invoke("audit", "verify")
    assert done.exit_code == 0
    assert "2 lines, unchanged" in done.stdout
    lines = log.path.read_text().splitlines(keepends=True)
    log.path.write_text(lines[1])
    again = run("audit", "verify")
    assert again.returncode == 1
    assert "was changed" in again.stderr


def test_the_audit_log_is_shown_without_what_a_terminal_would_obey():
    log = audit_log(load_settings())
    log.append("deploy", "executed", domain="task_api", model_digest="ab" * 32)
    log.append("tool_call", "refused", domain="task_api", tool="delete_task", arguments="\x1b[2J", reason="not asked")
    done = invoke("audit", "list", "--last", "1")
    assert done.exit_code == 0
    assert done.stdout.count("\n") == 1
    assert "tool_call refused delete_task(\\x1b[2J): not asked" in done.stdout
    assert "deploy executed by model abababababab" in invoke("audit", "list").stdout


def test_the_whole_lines_of_an_audit_log_are_shown_before_what_is_wrong():
    log = audit_log(load_settings())
    log.append("deploy", "executed", domain="task_api")
    log.append("rollback", "executed", domain="task_api")
    with log.path.open("ab") as file:
        file.write(b'{"time": "2024')
    done = run("audit", "list")
    assert done.returncode == 1
    assert [line.split()[4] for line in done.stdout.splitlines()] == ["deploy", "rollback"]
    assert done.stderr.startswith("taskagent: ")
    assert "taskagent audit verify" in done.stderr


def test_keys_are_made_listed_and_taken_back():
    made = invoke("key", "add", "ann")
    key = made.stdout.strip()
    assert (made.exit_code, key[:3], len(key) > 40) == (0, "tk-", True)
    stored = load_settings().home / "smoke" / "api_keys.json"
    assert key not in stored.read_text()
    again = run("key", "add", "ann")
    assert again.returncode == 1
    assert "There is a key for 'ann' already" in again.stderr
    invoke("key", "add", "bob")
    assert invoke("key", "list").stdout == "ann\nbob\n"
    assert "1 left" in invoke("key", "remove", "ann").stdout
    assert "nobody gets in" in invoke("key", "remove", "bob").stdout
    # Taking the last key back must not open the door.
    assert stored.exists()
    assert "there are: none" in run("key", "remove", "bob").stderr


def test_the_doctor_says_what_to_do(monkeypatch):
    from taskagent_platform import doctor

    checks = [doctor.Check("Disk", "problem", "0.1 GiB are free", "free some space"), doctor.Check("GPU", "ok", "none")]
    monkeypatch.setattr(doctor, "examine", lambda settings: checks)
    done = invoke("doctor")
    assert done.exit_code == 1
    assert "PROBLEM Disk: 0.1 GiB are free" in done.stdout
    assert "what to do: free some space" in done.stdout


def test_a_refused_call_makes_ask_fail(monkeypatch):
    from taskagent_platform.agent import session
    from taskagent_platform.agent.execution import ExecutedCall

    class Answer:
        calls = (ExecutedCall("delete_task", {"task_id": "1"}, "refused", reason="no terminal"),)

    asked: dict[str, Any] = {}

    def stub(settings, domain, text, **more):
        asked.update(text=text, **more)
        return Answer()

    monkeypatch.setattr(session, "ask", stub)
    done = invoke("ask", "Delete task 1", "--now", "2024-01-15T09:00")
    assert done.exit_code == 1
    assert asked["text"] == "Delete task 1"
    assert asked["yes"] is False
    assert asked["now"].isoformat() == "2024-01-15T09:00:00"


def test_an_answer_without_an_end_makes_ask_fail():
    scripts = ([[call("list_tasks")]] * 5, [""], ["Hello!"])
    codes = []
    for turns in scripts:
        with serve(ScriptedServer(*turns).app) as url:
            codes.append(invoke("ask", "Hello", "--endpoint", f"{url}/v1").exit_code)
    assert codes == [1, 1, 0]


def test_ask_ends_with_130_when_it_is_interrupted(monkeypatch):
    from taskagent_platform.agent import session

    def stub(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "ask", stub)
    assert invoke("ask", "Delete task 1").exit_code == 130


def test_ask_goes_on_where_nobody_reads_its_output():
    server = ScriptedServer([call("create_task", title="Zürich")], [call("list_tasks")], "Added.")
    reading, writing = os.pipe()
    os.close(reading)
    with serve(server.app) as url:
        command = [sys.executable, "-m", "taskagent_platform.cli", "ask", "Add it", "--endpoint", f"{url}/v1"]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert [(entry.tool, entry.outcome) for entry in audit_log(load_settings()).entries()] == [
        ("create_task", "executed"), ("list_tasks", "executed"),
    ]  # fmt: skip


@pytest.mark.parametrize(("command", "variable"), [("ui", "DAGSTER"), ("mlflow", "MLFLOW")])
def test_a_page_whose_port_is_taken_names_the_setting(command, variable):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run(command, **{f"TASKAGENT_PORTS__{variable}": port})
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert f"TASKAGENT_PORTS__{variable}" in done.stderr


@pytest.mark.slow
def test_mlflow_opens_on_the_platform_s_store():
    port = free_port()
    environment = {**os.environ, "TASKAGENT_PORTS__MLFLOW": str(port)}
    page = subprocess.Popen([sys.executable, "-m", "taskagent_platform.cli", "mlflow"], env=environment)
    try:
        deadline = time.monotonic() + 240
        while not is_answered(f"http://127.0.0.1:{port}/health"):
            assert page.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert (load_settings().home / "mlflow" / "mlflow.db").is_file()
    finally:
        page.send_signal(signal.SIGINT)
        page.wait(60)


_PAGE = """
import os, sys
from pathlib import Path
from taskagent_platform.cli import _become_page
from taskagent_platform.settings import load_settings
server = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '600'])"]
_become_page(load_settings(), "Dagster", server, dict(os.environ), Path.cwd())
"""


def test_stop_ends_open_pages_with_their_children_and_no_other_process():
    page, other = subprocess.Popen([sys.executable, "-c", _PAGE]), subprocess.Popen(["sleep", "600"])
    try:
        deadline = time.monotonic() + 60
        while not (children := psutil.Process(page.pid).children()):
            assert page.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # An old record, whose process number is somebody else's by now.
        (load_settings().home / "pages" / "MLflow").write_text(f"{other.pid}@1.00")
        done = invoke("stop")
        assert done.stdout == f"stopped Dagster's page (process {page.pid})\n"
        assert not any(child.is_running() for child in children)
        assert other.poll() is None
        assert invoke("stop").stdout == "Nothing was running.\n"
    finally:
        for process in (page, other):
            process.kill()
            process.wait()


_JOB = """
import signal, sys
from taskagent_platform import job_process
from taskagent_platform.demo import INTERRUPTED
from taskagent_platform.settings import load_settings
class Instance:
    def get_runs(self, **_):
        return []
# As a shell starts what runs in the background.
signal.signal(signal.SIGINT, signal.SIG_IGN)
job_process._MODULE = "endless"
try:
    with job_process.start_job(load_settings(), Instance(), "sweep") as run:
        for _ in run.events():
            if "ready" in run.last_words():
                print(run.process.pid, flush=True)
except KeyboardInterrupt:
    sys.exit(INTERRUPTED)
"""


def test_stop_interrupts_a_job_that_another_process_waits_for_and_no_other_process(tmp_path):
    (tmp_path / "endless.py").write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    search = os.pathsep.join([str(tmp_path), *sys.path])
    waiting = subprocess.Popen(
        [sys.executable, "-c", _JOB], env={**os.environ, "PYTHONPATH": search}, stdout=subprocess.PIPE, text=True
    )
    other = subprocess.Popen(["sleep", "600"])
    assert waiting.stdout is not None
    try:
        job = psutil.Process(int(waiting.stdout.readline()))
        folder = load_settings().home / "jobs"
        # An old record, whose process number is somebody else's by now.
        (folder / f"demo.{other.pid}").write_text(f"{other.pid}@1@boot")
        done = invoke("stop")
        assert done.stdout == f"stopped the run of the job sweep (process {waiting.pid})\n"
        assert waiting.wait(60) == 130
        assert not job.is_running()
        assert other.poll() is None
        assert list(folder.iterdir()) == []
        assert invoke("stop").stdout == "Nothing was running.\n"
    finally:
        for process in (waiting, other):
            process.kill()
            process.wait()
        waiting.stdout.close()


def test_stop_says_that_a_run_of_dagster_is_canceled_before_it_ends_it(monkeypatch):
    @dg.job
    def empty():
        pass

    settings = load_settings()
    # What opening the instance sets.
    monkeypatch.setenv("DAGSTER_HOME", str(settings.home / "dagster"))
    with open_instance(settings) as instance:
        run_id = instance.create_run_for_job(empty, status=dg.DagsterRunStatus.STARTED).run_id
    workers = RunWorkers(settings.home / "dagster" / FOLDER, patience_s=2.0)
    workers.start(run_id, ["sleep", "600"])
    try:
        assert invoke("stop").stdout == f"stopped run {run_id[:8]}, which Dagster had started\n"
    finally:
        workers.stop_all()
    with open_instance(settings) as instance:
        run = instance.get_run_by_id(run_id)
    assert run is not None
    assert run.status == dg.DagsterRunStatus.CANCELING, "the daemon's monitoring would resume it"


def is_answered(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=10).is_success
    except httpx.HTTPError:
        return False


def test_interrupting_the_demo_ends_with_130(monkeypatch):
    from taskagent_platform import demo

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    assert invoke("demo").exit_code == 130
