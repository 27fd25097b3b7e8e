"""Dagster's page as its users see it: Materialize all, a model that a gate blocks, then one that is deployed.

The real webserver and daemon, driven through Chromium (Debian's package ``chromium``; CONTRIBUTING.md). The domain, its
base model and the folders are those of the main job's story. ``TASKAGENT_TEST_SCREENSHOTS`` names a folder in which the
screenshots are kept; without it they are in pytest's own.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from taskagent_platform.defs.check_evaluations import failed_checks
from taskagent_platform.defs.instance import open_instance
from taskagent_platform.launchers.routes import ROUTE_TAG
from taskagent_platform.serving.active import active_file, read_active
from taskagent_platform.serving.server import free_port
from taskagent_platform.settings import load_settings
from taskagent_platform_tests import test_main_job as main_job
from taskagent_platform_tests.switch_domain import SWITCHES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# A module-scoped fixture of its own here: another home folder, the same base model and domain.
environment = main_job.environment
GROUP = f"/locations/taskagent_platform/asset-groups/{SWITCHES.name}/lineage"
REPORT = f"/assets/{SWITCHES.name}/eval_report"
RUN_TIMEOUT_S = 2400.0
# Loading a page of Dagster's for the first time can take long on a busy machine.
PAGE_TIMEOUT_S = 180.0
RATES = {"bad": "1e-6", "good": "3e-3"}


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("TASKAGENT_TEST_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def variables(environment: dict[str, str]) -> dict[str, str]:
    """The variables of the page; what a model is trained with comes from settings.yaml, where it can be changed."""
    changing = {"TASKAGENT_TRAINING__LEARNING_RATE"}
    kept = {name: value for name, value in environment.items() if name not in changing}
    return {**kept, **main_job.low(), "TASKAGENT_PORTS__DAGSTER": str(free_port())}


@pytest.fixture(scope="module")
def url(variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`taskagent ui`: webserver, daemon and code location; afterwards, nothing of it runs any more."""
    log = tmp_path_factory.mktemp("ui") / "ui.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "taskagent_platform.cli", "ui"],
            env=variables, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{variables['TASKAGENT_PORTS__DAGSTER']}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with suppress(httpx.HTTPError):
            return httpx.get(f"{address}/server_info", trust_env=False, timeout=10).is_success
        return False

    try:
        wait_for(answers, PAGE_TIMEOUT_S, "Dagster's page does not answer")
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    assert program, "This test drives Chromium, which is not installed: apt-get install chromium (see CONTRIBUTING.md)."
    with sync_playwright() as playwright:
        # Chromium refuses to sandbox itself for root, as whom containers run.
        made = playwright.chromium.launch(executable_path=program, chromium_sandbox=os.getuid() != 0)
        yield made
        made.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    # The tables of an asset's page are wide.
    made = browser.new_page(base_url=url, viewport={"width": 1840, "height": 1050})
    made.set_default_timeout(PAGE_TIMEOUT_S * 1000)
    expect.set_options(timeout=PAGE_TIMEOUT_S * 1000)
    yield made
    made.close()


def wait_for(what: Callable[[], Any], timeout_s: float, otherwise: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, otherwise
        time.sleep(1)


def train(variables: dict[str, str], rate: str) -> None:
    home = Path(variables["TASKAGENT_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    (home / "settings.yaml").write_text(f"training: {{learning_rate: {rate}}}\n")


def materialize_all(page: Page) -> str:
    """Clicks it and returns the run's address."""
    page.goto(GROUP)
    expect(page.get_by_text("agent_smoke").first).to_be_visible()
    page.get_by_role("button", name="Materialize all").click()
    view = page.get_by_role("link", name="View", exact=True)
    expect(view).to_be_visible()
    return str(view.get_attribute("href"))


def ended(instance: dg.DagsterInstance, address: str) -> dg.DagsterRun:
    run_id = address.rpartition("/")[2]

    def is_finished() -> bool:
        run = instance.get_run_by_id(run_id)
        return run is not None and run.is_finished

    wait_for(is_finished, RUN_TIMEOUT_S, f"run {run_id} does not end")
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run


@pytest.fixture
def instance(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with open_instance(load_settings()) as opened:
        yield opened


def shoot(page: Page, file: Path) -> None:
    # What is drawn late (graphs are laid out in a worker, plots fade in) is to be on the picture.
    page.wait_for_timeout(3000)
    page.screenshot(path=file)
    assert file.stat().st_size > 10_000


def test_every_asset_says_what_it_is(page, screenshots):
    page.goto(GROUP)
    for name in ("structured_outputs", "lora_adapter", "eval_report", "vllm_endpoint"):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    shoot(page, screenshots / "graph.png")
    page.goto(REPORT)
    for text in ("The merged model, served by vLLM", "tool-calling", "vllm", "ML Flow", "domain: switches"):
        expect(page.get_by_text(text).first).to_be_visible()


def test_a_model_that_fails_is_blocked_by_a_gate(page, variables, instance, screenshots):
    train(variables, RATES["bad"])
    address = materialize_all(page)
    run = ended(instance, address)
    assert run.status == dg.DagsterRunStatus.FAILURE
    assert [check.check_name for check in failed_checks(instance, run.run_id) if check.blocking]
    assert run.tags[ROUTE_TAG].endswith(":local"), "the daemon launched it"
    page.goto(address)
    expect(page.get_by_text("Failure", exact=True).first).to_be_visible()
    shoot(page, screenshots / "blocked_run.png")
    page.goto(f"{REPORT}?view=checks")
    page.get_by_text("Failed", exact=True).first.click()
    expect(page.get_by_text("points short").first).to_be_visible()
    shoot(page, screenshots / "blocked_checks.png")
    page.goto(REPORT)
    expect(page.get_by_text("points short").first).to_be_visible()
    shoot(page, screenshots / "blocked_report.png")
    page.goto(GROUP)
    expect(page.get_by_text("agent_smoke").first).to_be_visible()
    shoot(page, screenshots / "blocked_graph.png")
    assert SWITCHES.name not in read_active(active_file(load_settings())).domains


def test_a_model_that_passes_is_deployed(page, variables, instance, screenshots):
    train(variables, RATES["good"])
    run = ended(instance, materialize_all(page))
    assert run.status == dg.DagsterRunStatus.SUCCESS
    page.goto(f"{REPORT}?view=checks")
    expect(page.get_by_text("tool_selection").first).to_be_visible()
    expect(page.get_by_text("Failed", exact=True)).to_have_count(0)
    shoot(page, screenshots / "passed_checks.png")
    page.goto(f"/assets/{SWITCHES.name}/lora_adapter")
    expect(page.get_by_text("loss_curve").first).to_be_visible()
    shoot(page, screenshots / "adapter.png")
    endpoint = load_settings().serving.port
    page.goto(f"/assets/{SWITCHES.name}/vllm_endpoint")
    expect(page.get_by_text(f"http://127.0.0.1:{endpoint}/v1").first).to_be_visible()
    shoot(page, screenshots / "endpoint.png")
    page.goto(GROUP)
    expect(page.get_by_text("agent_smoke").first).to_be_visible()
    shoot(page, screenshots / "deployed_graph.png")
    assert SWITCHES.name in read_active(active_file(load_settings())).domains
    models = httpx.get(f"http://127.0.0.1:{endpoint}/v1/models", trust_env=False, timeout=60).json()["data"]
    assert [model["id"] for model in models] == [SWITCHES.name]
