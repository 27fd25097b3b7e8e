"""Every command, variable, setting, path and link in README.md, CONTRIBUTING.md and docs/: it runs, or it exists."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from dagster._config import process_config, resolve_to_config_type
from typer.testing import CliRunner

from taskagent_platform.cli import app
from taskagent_platform.definitions import defs
from taskagent_platform.defs.eval_report import GATES
from taskagent_platform.defs.instance import prepare_instance
from taskagent_platform.domains.registry import find_domain
from taskagent_platform.launchers.gpu_run_launcher import GpuRunLauncher
from taskagent_platform.settings import PROJECT_ROOT, Settings, load_settings

PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (PROJECT_ROOT / "docs").glob("*.md")))
PROGRAMS = (
    "make", "taskagent", "dagster", "pytest", "docker", "pre-commit", "apt-get", "mkdir", "openssl", "touch", "chmod",
)  # fmt: skip
ASSIGNMENT = re.compile(r"([A-Z_]+)=(.*)", re.DOTALL)
# Variables of ours that are no settings.
OTHER_VARIABLES = {"TASKAGENT_API_KEY", "TASKAGENT_TORCH_INDEX", "TASKAGENT_DAGSTER_URL"}
# Executed here, in a folder like a clone.
HERE = (
    "taskagent doctor", "taskagent status", "taskagent domain", "taskagent suite", "taskagent audit", "taskagent key",
    "dagster instance", "make stop", "mkdir", "openssl", "touch", "chmod",
)  # fmt: skip
# These may say that something is missing, which it is.
STATUSES = {"taskagent doctor": {0, 1}, "taskagent status": {1}}
# The others take a model, minutes, another environment, or a machine that is not here: which test executes each. None
# stands for what a test should not: it changes the clone, the system, or depends on today's registry.
TESTS = "taskagent_platform_tests"
ELSEWHERE = {
    "make demo": f"{TESTS}/test_main_job.py::test_a_model_that_passes_its_gates_is_deployed_and_answers",
    "make ui": f"{TESTS}/test_dagster_page.py::test_a_model_that_fails_is_blocked_by_a_gate",
    "make mlflow": f"{TESTS}/test_cli.py::test_mlflow_opens_on_the_platform_s_store",
    "make env": f"{TESTS}/test_requirements.py",
    "make lint": ".ci/run",
    "make test": ".ci/run",
    "make bfcl": f"{TESTS}/evaluation/test_bfcl_agreement.py",
    "make mutants": f"{TESTS}/evaluation/test_surviving_mutants.py",
    "pytest": ".ci/run",
    "taskagent ask": f"{TESTS}/test_main_job.py::test_the_agent_asks_before_it_destroys",
    "taskagent evaluate": f"{TESTS}/test_cli.py::test_evaluate_measures_a_server_and_says_what_the_gates_say",
    "taskagent improve": f"{TESTS}/test_improve.py",
    "taskagent sweep": f"{TESTS}/defs/test_training_sweep.py",
    "taskagent serve": f"{TESTS}/test_cli.py::test_what_is_deployed_is_served_again",
    "taskagent rollback": f"{TESTS}/test_cli.py::test_what_is_wrong_is_one_sentence_and_no_traceback",
    # The same processes with the same commands, without an engine.
    "docker compose": f"{TESTS}/docker/test_layout.py",
    "make locks": None,
    "pre-commit install": None,
    "apt-get install": None,
}
# What stands for something of the reader's own, and what it is here.
PLACEHOLDERS = {
    "FILE": str(find_domain("task_api").suites[0]),
    "NAME": "somebody",
    "my_domain": "customer_support",
    "/path/to/model": "/tmp",
}


def commands(page: str) -> list[str]:
    """Returns a page's commands in their order: lines of code blocks, and code in sentences that begins as one."""
    return [
        part.strip()
        for code in codes(page)
        for part in re.split(r"&&|(?:^|\s)#.*", code)
        if program(part.strip()) is not None
    ]


def codes(page: str) -> Iterator[str]:
    """Yields each line of a page's code blocks without a language, and each piece of code in its sentences."""
    text, end = (PROJECT_ROOT / page).read_text(), 0
    for fence in [*re.finditer(r"^ *```(\w*)\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL), None]:
        sentences = text[end : fence.start() if fence else None]
        yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", sentences))
        if fence is not None:
            end = fence.end()
            yield from fence[2].splitlines() if not fence[1] else ()


def words(command: str) -> tuple[dict[str, str], list[str]]:
    """Splits a command into the variables set for it and its words, the program without its folder."""
    try:
        parts = shlex.split(command)
    except ValueError:
        return {}, []
    variables: dict[str, str] = {}
    while parts and (found := ASSIGNMENT.fullmatch(parts[0])):
        variables[found[1]] = found[2]
        parts = parts[1:]
    return variables, [parts[0].removeprefix(".venv/bin/"), *parts[1:]] if parts else []


def program(command: str) -> str | None:
    """Returns the program of a command; None for code that is no command."""
    _, parts = words(command)
    if not parts or parts[0] not in PROGRAMS or (len(parts) == 1 and parts[0] != "pytest"):
        return None
    return parts[0]


def of(page_commands: dict[str, list[str]], *programs: str) -> list[str]:
    return [command for page in page_commands.values() for command in page if program(command) in programs]


ALL = {page: commands(page) for page in PAGES}


def filled_in(command: str) -> str:
    for placeholder, value in PLACEHOLDERS.items():
        command = re.sub(rf"(?<![\w/]){re.escape(placeholder)}\b", value, command)
    return command


def test_commands_are_found():
    assert {program(command) for command in of(ALL, *PROGRAMS)} == set(PROGRAMS)
    assert sum(map(len, ALL.values())) > 60


@pytest.mark.parametrize("command", sorted(set(of(ALL, "taskagent"))))
def test_taskagent_takes_the_command(command):
    _, parts = words(filled_in(command))
    # Help is printed only where every command and option before it is known.
    done = CliRunner().invoke(app, [*parts[1:], "--help"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("command", sorted(set(of(ALL, "make"))))
def test_make_has_the_target(command):
    done = subprocess.run(
        ["make", "--dry-run", *words(command)[1][1:]], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", sorted(set(of(ALL, "docker"))))
def test_compose_has_what_is_named(command):
    _, parts = words(command)
    file = PROJECT_ROOT / parts[parts.index("-f") + 1]
    services = yaml.safe_load(file.read_text())["services"]
    profiles = {profile for service in services.values() for profile in service.get("profiles", ())}
    if "--profile" in parts:
        assert parts[parts.index("--profile") + 1] in profiles
    if "exec" in parts:
        service, shell, entry_point, *inside = parts[parts.index("exec") + 1 :]
        assert service in services
        assert (shell, entry_point) == ("sh", "/app/docker/entrypoint.sh")
        assert program(" ".join(inside)) in ("taskagent", "dagster")
    else:
        assert set(parts[parts.index("up") + 1 :]) - {"--build"} <= set(services)


@pytest.mark.parametrize("command", sorted(set(of(ALL, "pytest"))))
def test_pytest_finds_what_is_named(command):
    _, parts = words(command)
    assert all((PROJECT_ROOT / part).exists() for part in parts[1:] if "/" in part)
    marks = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    assert all(any(mark.startswith(f"{part}:") for mark in marks) for part in parts[1:] if part.isalpha())


@pytest.mark.parametrize("page", PAGES)
def test_settings_and_variables_exist_and_take_the_value(page, monkeypatch, tmp_path):
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    text = (PROJECT_ROOT / page).read_text()
    for name in set(re.findall(r"TASKAGENT_[A-Z][A-Z_0-9]*", text)) - OTHER_VARIABLES:
        assert is_setting(name.removeprefix("TASKAGENT_").lower().split("__")), name
    sections = [name for name, field in Settings.model_fields.items() if hasattr(field.annotation, "model_fields")]
    for section, name in re.findall(rf"`({'|'.join(sections)})\.(\w+)(?:: [^`]*)?`", text):
        assert is_setting([section, name]), f"{section}.{name}"
    for variables in (words(filled_in(code))[0] for code in codes(page)):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            load_settings()


def is_setting(path: list[str]) -> bool:
    fields = Settings.model_fields
    for name in path[:-1]:
        fields = getattr(fields[name].annotation, "model_fields", {}) if name in fields else {}
    return path[-1] in fields


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_lead_somewhere(page):
    text = (PROJECT_ROOT / page).read_text()
    here = (PROJECT_ROOT / page).parent
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            assert (here / file).is_file(), target
            if anchor:
                titles = re.findall(r"^#+ (.+)$", (here / file).read_text(), flags=re.MULTILINE)
                assert anchor in {re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles}
    tracked = {path.name for path in PROJECT_ROOT.iterdir()} - {".venv", ".taskagent"}
    for code in re.findall(r"`([\w.]+/[\w./-]*)`", text):
        if code.split("/")[0] in tracked:
            assert (PROJECT_ROOT / code).exists(), code


def test_configuration_that_is_shown_is_accepted():
    shown = re.findall(r"^```yaml\n(.*?)^```", (PROJECT_ROOT / "docs/operate.md").read_text(), re.MULTILINE | re.DOTALL)
    for block in shown:
        launcher = yaml.safe_load(block)["run_launcher"]
        assert (launcher["module"], launcher["class"]) == (GpuRunLauncher.__module__, GpuRunLauncher.__name__)
        checked = process_config(resolve_to_config_type(GpuRunLauncher.config_type()), launcher["config"])
        assert checked.success, checked.errors
    entry = re.search(r"```toml\n(.*?)```", (PROJECT_ROOT / "docs/your_own_tools.md").read_text(), re.DOTALL)
    assert entry is not None
    assert "taskagent.domains" in tomllib.loads(entry[1])["project"]["entry-points"]


def test_the_checklist_names_every_check():
    page = (PROJECT_ROOT / "docs/operate.md").read_text()
    _, _, rest = page.partition("## Before production")
    named = set(re.findall(r"`(\w+)`", rest.partition("\n## ")[0]))
    of_domain = {key for key in defs.resolve_asset_graph().asset_check_keys if key.asset_key.path[0] == "task_api"}
    assert {key.name for key in of_domain} - set(GATES) <= named
    assert {key.asset_key.path[-1] for key in of_domain} <= named


def key_of(command: str) -> str | None:
    """Returns the entry of HERE or ELSEWHERE that a command has."""
    _, parts = words(command)
    return next((key for key in (" ".join(parts[:2]), parts[0]) if key in HERE or key in ELSEWHERE), None)


def test_every_command_is_executed_somewhere():
    keys = {command: key_of(command) for command in of(ALL, *PROGRAMS)}
    unknown = [command for command, key in keys.items() if key is None]
    assert unknown == [], "say in HERE or ELSEWHERE what executes them"
    assert set(keys.values()) == {*HERE, *ELSEWHERE}, "an entry without a command says nothing"
    for place in filter(None, ELSEWHERE.values()):
        file, _, test = place.partition("::")
        assert (PROJECT_ROOT / file).is_file(), place
        assert not test or f"def {test}(" in (PROJECT_ROOT / file).read_text(), place


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a clone, with a home folder of its own, that commands may change."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for path in PROJECT_ROOT.iterdir():
        if path.name not in (".git", ".venv", ".taskagent", "docker"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    shutil.copytree(PROJECT_ROOT / "docker", folder / "docker", ignore=shutil.ignore_patterns("secrets"))
    monkeypatch.setenv("TASKAGENT_HOME", str(folder / ".taskagent"))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")
    prepare_instance(load_settings())
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if any(key_of(command) in HERE for command in ALL[page])])
def test_commands_run_in_the_order_of_their_page(page, clone):
    environment = {**os.environ, "PATH": os.pathsep.join([str(clone / ".venv" / "bin"), os.environ["PATH"]])}
    for command in dict.fromkeys(ALL[page]):
        if key_of(command) in HERE:
            # Redirections and variables are the shell's business.
            done = subprocess.run(
                ["bash", "-c", filled_in(command)],
                cwd=clone, env=environment, capture_output=True, text=True, check=False, timeout=250,
            )  # fmt: skip
            assert done.returncode in STATUSES.get(str(key_of(command)), {0}), f"{command}\n{done.stdout}{done.stderr}"
            assert "Traceback" not in done.stderr
