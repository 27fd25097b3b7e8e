"""The processes of ``docker/compose.yaml``, with its commands, variables and health checks, without containers.

What containers would give each process (a name, a port, a volume) is put in its place: addresses of this machine, free
ports, one temporary folder. PostgreSQL is a real one where its programs and the extra ``docker`` are installed.
"""

import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from taskagent_platform.launchers.routes import ROUTE_TAG
from taskagent_platform.launchers.run_worker import FOLDER, RunWorkers
from taskagent_platform.serving.server import free_port
from taskagent_platform.settings import PROJECT_ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

DOCKER = PROJECT_ROOT / "docker"
TIMEOUT_S = 400.0
PASSWORD = "s3cret"
LAUNCH = """
mutation ($params: ExecutionParams!) {
  launchRun(executionParams: $params) { __typename ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message } }
}"""
RUN = "query ($id: ID!) { runOrError(runId: $id) { ... on Run { status tags { key value } } } }"


def has_postgres() -> bool:
    programs = shutil.which("initdb") and shutil.which("pg_ctl")
    return bool(programs) and importlib.util.find_spec("dagster_postgres") is not None


class Layout:
    """Where everything is that a container would have under a name of its own."""

    def __init__(self, folder: Path, *, postgres: bool) -> None:
        self.postgres = postgres
        self.data = folder / "data"
        self.home = self.data / "dagster"
        self.home.mkdir(parents=True)
        (folder / "mlflow").mkdir()
        secrets = folder / "secrets"
        secrets.mkdir()
        (secrets / "alert_urls").touch()
        (secrets / "postgres_password").write_text(PASSWORD)
        self.entry_point = folder / "entrypoint.sh"
        self.ports = {port: str(free_port()) for port in ("3210", "4000", "5000", "5432", "8210")}
        self._named = {
            "/app/docker/workspace.yaml": str(folder / "workspace.yaml"),
            "/app/docker/entrypoint.sh": str(self.entry_point),
            "/run/secrets": str(secrets),
            "--artifacts-destination /mlflow": f"--artifacts-destination {folder / 'mlflow'}",
        }
        self.services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
        (folder / "workspace.yaml").write_text(self.here((DOCKER / "workspace.yaml").read_text()))
        self.entry_point.write_text(self.here((DOCKER / "entrypoint.sh").read_text()))
        instance = yaml.safe_load(self.here((DOCKER / "dagster.yaml").read_text()))
        if not postgres:
            instance["storage"] = {"sqlite": {"base_dir": str(self.home)}}
        (self.home / "dagster.yaml").write_text(yaml.safe_dump(instance))
        self.folder = folder

    def here(self, text: str) -> str:
        """Returns a text of the container files with what this machine has in place of names, ports and paths."""
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text).replace("$$", "$")
        for name, value in self._named.items():
            text = text.replace(name, value)
        if not self.postgres:
            text = re.sub(r'"postgresql\+psycopg2://[^"]*"', f"sqlite:///{self.data}/mlflow.db", text)
        text = re.sub(r"\b(postgres|mlflow|code-location)(?=:\d)", "127.0.0.1", text)
        text = text.replace("host: code-location", "host: 127.0.0.1").replace("0.0.0.0", "127.0.0.1")
        return re.sub(r"\b(3210|4000|5000|5432|8210)\b", lambda found: self.ports[found[1]], text)

    def environment(self, name: str) -> dict[str, str]:
        stated = {key: self.here(value) for key, value in self.services[name]["environment"].items()}
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("TASKAGENT_", "DAGSTER_"))}
        return {
            **outside,
            **stated,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")]),
            # What the image sets. The password is left to the entry point.
            "DAGSTER_HOME": str(self.home),
            "TASKAGENT_HOME": str(self.data),
            "DAGSTER_PG_HOST": "127.0.0.1",
            "TASKAGENT_PROFILE": "smoke",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    @contextmanager
    def running(self, name: str) -> Iterator["subprocess.Popen[bytes]"]:
        command = [self.here(part) for part in self.services[name]["command"]]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                ["/bin/sh", str(self.entry_point), *command],
                env=self.environment(name), cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait_until_healthy(self, name: str, process: "subprocess.Popen[bytes]") -> None:
        """Waits until the health check of a service says so."""
        check = [self.here(part) for part in self.services[name]["healthcheck"]["test"][1:]]

        def healthy() -> bool:
            log = (self.folder / f"{name}.log").read_text(errors="replace")
            assert process.poll() is None, f"{name} ended: {log[-3000:]}"
            done = subprocess.run(check, env=self.environment(name), capture_output=True, check=False, cwd=self.folder)
            return done.returncode == 0

        wait_for(healthy)


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(1)
    raise AssertionError("it did not happen")


@contextmanager
def postgres(layout: Layout) -> Iterator[None]:
    """Runs a PostgreSQL of its own, as another user where this one is root, whom it refuses."""
    data = layout.folder / "postgres"
    data.mkdir()
    user: dict[str, Any] = {}
    if os.getuid() == 0:
        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid}
        os.chown(data, nobody.pw_uid, nobody.pw_gid)
        for folder in (layout.folder, *layout.folder.parents[:3]):
            if folder.stat().st_uid == 0 and folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o055)

    def run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, cwd=data, **user)

    made = data / "cluster"
    password = layout.folder / "secrets" / "postgres_password"
    run("initdb", "-D", str(made), "-U", "dagster", "--auth=scram-sha-256", "--pwfile", str(password))
    options = f"-p {layout.ports['5432']} -c listen_addresses=127.0.0.1 -c unix_socket_directories={data}"
    run("pg_ctl", "-D", str(made), "-w", "-l", str(data / "log"), "-o", options, "start")
    try:
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        address = ["-h", "127.0.0.1", "-p", layout.ports["5432"], "-U", "dagster"]
        for script in (["-d", "postgres", "-c", "CREATE DATABASE dagster"], ["-d", "dagster", "-f", "-"]):
            sql = (DOCKER / "create_mlflow.sql").read_text()
            subprocess.run(["psql", *address, *script], input=sql, text=True, check=True, env=environment)
        yield
    finally:
        run("pg_ctl", "-D", str(made), "-w", "-m", "immediate", "stop")


def test_a_run_asked_for_in_the_web_server_is_executed_by_the_daemon(tmp_path):
    layout = Layout(tmp_path, postgres=has_postgres())
    with ExitStack() as stack:
        if layout.postgres:
            stack.enter_context(postgres(layout))
        for name in ("mlflow", "code-location", "webserver", "daemon"):
            process = stack.enter_context(layout.running(name))
            layout.wait_until_healthy(name, process)
        client = stack.enter_context(httpx.Client(trust_env=False, timeout=60))
        url = f"http://127.0.0.1:{layout.ports['3210']}/graphql"

        def ask(query: str, **variables: Any) -> Any:
            answer = client.post(url, json={"query": query, "variables": variables}).json()
            assert "errors" not in answer, answer
            return answer["data"]

        selector = {
            "repositoryLocationName": "taskagent_platform",
            "repositoryName": "__repository__",
            "jobName": "__ASSET_JOB",
            "assetSelection": [{"path": ["task_api", "structured_outputs"]}],
            "assetCheckSelection": [],
        }
        launched = ask(LAUNCH, params={"selector": selector, "mode": "default"})["launchRun"]
        run_id = launched["run"]["runId"]
        state: dict[str, Any] = {}

        def ended() -> bool:
            state.update(ask(RUN, id=run_id)["runOrError"])
            return state["status"] in ("SUCCESS", "FAILURE", "CANCELED")

        wait_for(ended)
        log = (layout.folder / "daemon.log").read_text(errors="replace")
        assert state["status"] == "SUCCESS", log[-3000:]
        assert {"key": ROUTE_TAG, "value": "cpu:local"} in state["tags"]
        # The run succeeds a moment before its process ends.
        assert wait_for(lambda: RunWorkers(layout.home / FOLDER).ending(run_id)).code == 0
        assert (layout.data / "smoke" / "task_api" / "structured_outputs" / "manifest.json").is_file()
