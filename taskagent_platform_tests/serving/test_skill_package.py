import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from taskagent_platform.artifacts import Manifest, read_manifest
from taskagent_platform.domains.task_api import TaskApiDomain
from taskagent_platform.errors import PlatformError
from taskagent_platform.serving.active import (
    ActiveDeployments,
    Deployment,
    DomainDeployments,
    active_file,
    write_active,
)
from taskagent_platform.serving.skill_package import make_skill_package
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform_tests.serving.judged_model import make_model, make_report, small_domain


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path / "home"))
    return load_settings(profile="smoke", evaluation={"case_limit": None})


@pytest.fixture
def domain(tmp_path: Path) -> TaskApiDomain:
    return small_domain(tmp_path)


def test_the_package_holds_what_the_specification_asks_for_with_this_models_figures(
    settings: Settings, domain: TaskApiDomain, tmp_path: Path
) -> None:
    folder, model = make_model(settings)
    report = make_report(settings, domain, model, failing={"argument_extraction": 1})
    out = tmp_path / "package"
    manifest, reused = make_skill_package(settings, domain, folder, report, out)
    assert not reused
    assert read_manifest(out, kind="skill_package", verify=True) == manifest
    skill = yaml.safe_load((out / "skill.yaml").read_text())
    assert skill["name"] == "task-api-agentic-backend"
    assert skill["version"].endswith(f"+{model.digest[:8]}")
    assert skill["model"] == {
        "path": "./model", "format": "safetensors", "base": "tiny", "digest": model.digest, "served_name": "task_api",
    }  # fmt: skip
    assert skill["capabilities"] == ["tool-calling", "multi-tool-orchestration", "json-structured-output"]
    assert skill["tools_supported"] == [tool.name for tool in domain.tools]
    assert skill["metrics"]["argument_extraction"] == {
        "value": 0.95, "n": 20, "interval_95": [0.7639, 0.9911], "target": "> 0.9", "passed": True,
    }  # fmt: skip
    assert skill["metrics"]["latency_ms"]["p95"] == 200
    assert "gates_overridden" not in skill
    assert (out / "model" / "model.safetensors").read_text() == "weights"
    assert Manifest.model_validate_json((out / "model_manifest.json").read_text()).digest == model.digest
    assert (out / "chat_template.jinja").read_text() == "template"
    assert json.loads((out / "tools.json").read_text()) == domain.openai_tools()
    request = json.loads((out / "request.json").read_text())
    assert request["messages"][-1]["content"] == "Create a high-priority task to review the Q4 budget"
    card = (out / "README.md").read_text()
    assert card.startswith("# card")
    assert "| argument_extraction | 95.0% | 20 | 76.4% to 99.1% | > 0.9 |" in card
    assert "Ask a person before executing `delete_task`" in card


def test_the_compose_file_serves_it_on_one_gpu_read_only_and_on_loopback(
    settings: Settings, domain: TaskApiDomain, tmp_path: Path
) -> None:
    folder, model = make_model(settings)
    out = tmp_path / "package"
    make_skill_package(settings, domain, folder, make_report(settings, domain, model), out)
    service = yaml.safe_load((out / "compose.yaml").read_text())["services"]["vllm"]
    assert service["image"].startswith("vllm/vllm-openai:v")
    assert service["volumes"] == ["./model:/model:ro"]
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    command = " ".join(service["command"])
    assert "--enable-auto-tool-choice --tool-call-parser hermes --chat-template /model/chat_template.jinja" in command
    assert "--dtype float32" in command
    assert "--model /model --served-model-name task_api" in command


def test_it_is_made_again_only_when_something_changed(
    settings: Settings, domain: TaskApiDomain, tmp_path: Path
) -> None:
    folder, model = make_model(settings)
    report = make_report(settings, domain, model)
    out = tmp_path / "package"
    first, _ = make_skill_package(settings, domain, folder, report, out)
    assert make_skill_package(settings, domain, folder, report, out) == (first, True)
    folder, model = make_model(settings, "new weights")
    report = make_report(settings, domain, model)
    second, reused = make_skill_package(settings, domain, folder, report, out)
    assert not reused
    assert second.digest != first.digest


def test_a_model_that_was_not_let_through_is_not_packaged(
    settings: Settings, domain: TaskApiDomain, tmp_path: Path
) -> None:
    folder, model = make_model(settings)
    out = tmp_path / "package"
    with pytest.raises(PlatformError, match="no evaluation report"):
        make_skill_package(settings, domain, folder, tmp_path / "nothing", out)
    report = make_report(settings, domain, model, failing={"multi_tool_chains": 10})
    with pytest.raises(PlatformError, match=r"is not packaged:\n- Multi-tool completion is 50\.0%"):
        make_skill_package(settings, domain, folder, report, out)
    other, _ = make_model(settings, "another")
    with pytest.raises(PlatformError, match="The report is of model"):
        make_skill_package(settings, domain, other, report, out)
    assert not out.exists()


def test_an_overridden_deployment_is_packaged_with_the_reason_and_the_true_figures(
    settings: Settings, domain: TaskApiDomain, tmp_path: Path
) -> None:
    folder, model = make_model(settings)
    report = make_report(settings, domain, model, failing={"multi_tool_chains": 10})
    deployed = Deployment(
        domain="task_api", model_name="task_api", model_digest=model.digest, model_folder=folder, report_digest=None,
        gates=(), base_url="http://127.0.0.1:1/v1", server=Path("s.json"),
        deployed_at=datetime(2024, 1, 15, tzinfo=UTC), deployed_by="ann", override_reason="for the demo",
    )  # fmt: skip
    write_active(active_file(settings), ActiveDeployments(domains={"task_api": DomainDeployments(active=deployed)}))
    out = tmp_path / "package"
    make_skill_package(settings, domain, folder, report, out)
    skill = yaml.safe_load((out / "skill.yaml").read_text())
    assert skill["gates_overridden"] == "for the demo"
    assert skill["metrics"]["multi_tool"]["value"] == 0.5
    assert skill["metrics"]["multi_tool"]["passed"] is False
    assert "for the demo" in (out / "README.md").read_text()
