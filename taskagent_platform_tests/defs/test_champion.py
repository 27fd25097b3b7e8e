"""The champion's report: taken as it is while it holds, measured again on its own server where it does not."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from taskagent_platform.artifacts import read_manifest
from taskagent_platform.defs import eval_report
from taskagent_platform.defs.eval_report import _write_anew, champion_report, model_server
from taskagent_platform.defs.platform import Stage
from taskagent_platform.domains.task_api import TaskApiDomain
from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.report import TEXT_FILE, load_report, read_verdict
from taskagent_platform.evaluation.run import conditions
from taskagent_platform.evaluation.suite import domain_suites
from taskagent_platform.serving import deployments
from taskagent_platform.serving.deployments import deploy, server_files, status, stop_all
from taskagent_platform.serving.gates import judge
from taskagent_platform.serving.server import detach, server_is_alive, stop_server
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform_tests.serving.fake_model_server import start_fake_server
from taskagent_platform_tests.serving.judged_model import make_model, make_report, small_domain


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path / "home"))
    made = load_settings(profile="smoke", evaluation={"case_limit": None})
    monkeypatch.setattr(deployments, "start_server", start_fake_server)
    monkeypatch.setattr(deployments, "start_gateway", lambda settings: None)
    monkeypatch.setattr(deployments, "running_gateway", lambda settings: None)
    yield made
    stop_all(made)


@pytest.fixture
def domain(tmp_path: Path) -> TaskApiDomain:
    return small_domain(tmp_path)


def stage_of(settings: Settings, domain: TaskApiDomain, said: list[str]) -> Stage:
    context: Any = SimpleNamespace(
        log=SimpleNamespace(info=said.append),
        log_event=lambda event: None,
        asset_key=dg.AssetKey([domain.name, "eval_report"]),
    )
    return Stage(context, settings, domain, "eval_report")


def test_a_step_whose_model_server_was_killed_says_so(
    settings: Settings, domain: TaskApiDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(settings, domain, [])
    folder, model = make_model(settings, "one")
    monkeypatch.setattr(eval_report, "start_server", start_fake_server)

    def ask(*, is_killed: bool) -> None:
        with model_server(stage, folder, model) as server:
            server.log_file.write_text("Killed: for want of memory.")
            if is_killed:
                stop_server(server)
            raise PlatformError("It does not answer.")

    with pytest.raises(PlatformError, match=r"ended while it was asked: Killed: for want of memory\. The whole"):
        ask(is_killed=True)
    with pytest.raises(PlatformError, match=r"^It does not answer\.$"):
        ask(is_killed=False)


def test_the_champion_serves_on_while_its_model_is_measured_with_other_settings(
    settings: Settings, domain: TaskApiDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = make_model(settings, "one")
    monkeypatch.setattr(eval_report, "start_server", start_fake_server)
    with model_server(stage_of(settings, domain, []), folder, model, keep=lambda: True) as champion:
        deploy(settings, domain, folder, make_report(settings, domain, model))
    serving = settings.serving.model_copy(update={"max_num_seqs": 1, "model_name": "tasks"})
    tuned = settings.model_copy(update={"serving": serving})
    with model_server(stage_of(tuned, domain, []), folder, model) as measured:
        assert (measured.pid != champion.pid, measured.name) == (True, "tasks")
        [of_domain] = status(settings).domains
        assert (of_domain.active_is_healthy, of_domain.others) == (True, (measured,))
    assert not server_is_alive(measured)
    [of_domain] = status(settings).domains
    assert (of_domain.active_is_healthy, of_domain.others) == (True, ())


def test_a_server_that_is_served_meanwhile_outlives_its_measurement(
    settings: Settings, domain: TaskApiDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = make_model(settings, "one")
    monkeypatch.setattr(eval_report, "start_server", start_fake_server)
    with model_server(stage_of(settings, domain, []), folder, model) as server:
        detach(server)
    assert server_is_alive(server)


def test_the_champions_report_is_measured_again_when_the_suites_changed(
    settings: Settings, domain: TaskApiDomain
) -> None:
    said: list[str] = []
    stage = stage_of(settings, domain, said)
    folder, champion = make_model(settings, "one")
    report_folder = make_report(settings, domain, champion)
    suites = domain_suites(domain)
    assert champion_report(stage, champion, suites) is None, "nothing is deployed"
    deploy(settings, domain, folder, report_folder)
    assert champion_report(stage, champion, suites) is None, "the model itself is the champion"

    _, candidate = make_model(settings, "two")
    kept = champion_report(stage, candidate, suites)
    assert kept is not None
    assert (kept.model_digest, said) == (champion.digest, [])

    [path] = domain.suites
    path.write_text(path.read_text().replace("select 0", "choose 0"))
    suites = domain_suites(domain)
    report_folder = make_report(settings, domain, candidate)
    assert "measured on other suites" in " ".join(judge(settings, domain, candidate, report_folder).refusals)
    again = champion_report(stage, candidate, suites)
    assert again is not None
    assert (again.model_digest, again.suites) == (champion.digest, suites.digests)
    assert "The champion is measured again." in said[0]
    # The stand-in's server answers every case with a text: only the cases that ask for no call are right.
    assert (again.metrics["abstention"].rate, again.metrics["tool_selection"].rate) == (1.0, 0.0)
    assert server_files(settings, domain.name, champion.digest).record_file.exists(), "its own server was asked"
    assert judge(settings, domain, candidate, report_folder).refusals == ()


def test_a_report_that_is_kept_is_written_anew_when_the_gates_changed(
    settings: Settings, domain: TaskApiDomain
) -> None:
    _, model = make_model(settings, "one")
    folder = make_report(settings, domain, model)
    report, manifest = load_report(folder), read_manifest(folder)
    made_from = manifest.model_dump(include={"kind", "inputs", "settings", "code_version"})
    same = stage_of(settings, domain, [])
    _write_anew(same, made_from, report, None)
    assert "base model" in (folder / TEXT_FILE).read_text(), "the base model's report is compared since"
    written = read_manifest(folder).digest
    _write_anew(same, made_from, report, None)
    assert read_manifest(folder).digest == written
    stricter = settings.model_copy(update={"gates": settings.gates.model_copy(update={"tool_selection": 0.9991})})
    _write_anew(stage_of(stricter, domain, []), made_from, report, None)
    assert "> 99.91%" in (folder / TEXT_FILE).read_text()
    assert read_verdict(folder).gates[0].target == 0.9991
    assert load_report(folder) == report


def test_reports_of_different_simulated_backends_are_not_compared(settings: Settings, domain: TaskApiDomain) -> None:
    suites = domain_suites(domain)
    before = conditions(settings, domain, suites)
    assert conditions(settings, domain, suites) == before

    class Fuller(type(domain)):  # type: ignore[misc]
        def backend(self, now: datetime, fixture: str = "default") -> Any:
            backend = super().backend(now, fixture)
            backend.execute("create_task", {"title": "one more"})
            return backend

    domain.__class__ = Fuller
    assert conditions(settings, domain, suites) != before
