"""What the main job's end says on the command line; the job itself is in test_main_job.py."""

from pathlib import Path

import pytest

from taskagent_platform.demo import _champion
from taskagent_platform.serving import deployments
from taskagent_platform.serving.deployments import deploy, server_files, stop_all
from taskagent_platform.serving.gateway_process import GatewayProcess
from taskagent_platform.serving.server import free_port
from taskagent_platform.settings import load_settings
from taskagent_platform_tests.serving.fake_model_server import start_fake_server
from taskagent_platform_tests.serving.judged_model import make_model, make_report, small_domain


def test_a_champion_that_does_not_answer_is_not_said_to_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path / "home"))
    settings = load_settings(profile="smoke", evaluation={"case_limit": None}, serving={"port": free_port()})
    domain = small_domain(tmp_path)
    gateway = GatewayProcess(pid=1, create_time=0, host="127.0.0.1", port=1, requests_per_minute=1, log_file=tmp_path)
    monkeypatch.setattr(deployments, "start_gateway", lambda settings: gateway)
    monkeypatch.setattr(deployments, "running_gateway", lambda settings: gateway)
    assert _champion(settings, domain) == "No model of this domain is served."
    folder, model = make_model(settings)
    files = server_files(settings, domain.name, model.digest)
    start_fake_server(settings, folder, name=domain.name, log_file=files.log_file, record_file=files.record_file)
    deploy(settings, domain, folder, make_report(settings, domain, model))
    before = f"The model deployed before ({model.digest[:12]})"
    assert _champion(settings, domain) == f"{before} stays at http://127.0.0.1:1/v1."
    monkeypatch.setattr(deployments, "running_gateway", lambda settings: None)
    silent = f"{before} does not answer; `taskagent serve --domain task_api` starts it again."
    assert _champion(settings, domain) == silent
    stop_all(settings)
    monkeypatch.setattr(deployments, "running_gateway", lambda settings: gateway)
    assert _champion(settings, domain) == silent
