"""The container files without an engine: their schema, and that every path, port, variable and command is real."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from taskagent_platform.defs.instance import prepare_instance
from taskagent_platform.defs.tracking import Tracking, server_environment
from taskagent_platform.serving.active import API_KEY_VARIABLE
from taskagent_platform.serving.server import options_of, server_command
from taskagent_platform.settings import PROJECT_ROOT, Settings, load_settings
from taskagent_platform_tests.serving.judged_model import make_model

DOCKER = PROJECT_ROOT / "docker"
OWN = ("mlflow", "code-location", "webserver", "daemon")
ENTRY_POINT = ["/bin/sh", "/app/docker/entrypoint.sh"]


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def services(compose: Any) -> Any:
    return compose["services"]


def substituted(value: str) -> str:
    """Returns a value as compose does where no variable is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value).replace("$$", "$")


def serve_deployed() -> Any:
    spec = importlib.util.spec_from_file_location("serve_deployed", DOCKER / "serve_deployed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_compose_is_valid_by_the_specification_s_schema(compose):
    spec = importlib.util.find_spec("check_jsonschema")
    assert spec is not None, "check-jsonschema, which carries the schema, is not installed: run `make env`"
    assert spec.origin is not None
    schema = Path(spec.origin).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    validator = jsonschema.validators.validator_for(json.loads(schema.read_text()))(json.loads(schema.read_text()))
    assert [error.message for error in validator.iter_errors(compose)] == []
    compose = {**compose, "services": {**compose["services"], "broken": {"imagine": "x"}}}
    assert list(validator.iter_errors(compose)), "the schema says no where there is a reason to"


def test_the_dockerfile_is_clean():
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert program is not None, "hadolint is not installed: run `make env`"
    done = subprocess.run([program, str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_stage_and_file_that_is_named_exists(services):
    text = (DOCKER / "Dockerfile").read_text()
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE))
    for name in OWN:
        build = services[name]["build"]
        assert build["target"] in stages
        assert (DOCKER / build["context"]).resolve() == PROJECT_ROOT
        assert (PROJECT_ROOT / build["dockerfile"]).is_file()
    ignore = (PROJECT_ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignore if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    for source in (source.rstrip("/") for line in copied for source in line.split()):
        assert (PROJECT_ROOT / source).exists(), source
        assert source in allowed, f"{source} does not come into the build: .dockerignore"
    for stage, source in re.findall(r"^COPY --from=(\S+) (\S+) ", text, re.MULTILINE):
        assert stage in stages
        assert source in ("/opt/venv", "/app")


def test_every_mounted_file_exists_and_every_volume_is_declared(compose, services):
    for service in services.values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).is_file(), source
            else:
                assert source in compose["volumes"]
        for secret in service.get("secrets", []):
            assert secret in compose["secrets"]
    for secret in compose["secrets"].values():
        assert substituted(secret["file"]).startswith("./secrets/")
    ignored = (PROJECT_ROOT / ".gitignore").read_text().splitlines()
    assert "/docker/secrets/" in ignored


def test_no_password_is_written_down_and_nobody_is_root(compose, services):
    text = (DOCKER / "compose.yaml").read_text() + (DOCKER / "dagster.yaml").read_text()
    assert not re.search(r"(?i)password: *[\"']?\w+[\"']?$", text, re.MULTILINE)
    final = (DOCKER / "Dockerfile").read_text().split("\nFROM base AS ")
    for stage in final:
        if stage.startswith(("orchestrator\n", "gpu-worker\n")):
            assert re.search(r"^USER 10001:10001$", stage, re.MULTILINE)
    assert services["vllm"]["user"] == "10001:10001"
    for name, service in services.items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is open to the network"


def test_mlflow_is_as_quiet_as_on_a_workstation(services):
    wanted = {name: value for name, value in server_environment().items() if name.startswith("MLFLOW_")}
    assert wanted.items() <= services["mlflow"]["environment"].items()


def test_no_password_is_among_the_arguments_of_a_program(services):
    for name, service in services.items():
        # What its shell exports before it becomes the program is not.
        arguments = " ".join(service.get("command", ())).rpartition("exec ")[2]
        assert "PASSWORD" not in arguments, name


def test_every_service_is_watched_and_waits_for_what_it_needs(services):
    for name, service in services.items():
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["restart"] == "unless-stopped"
        for other in service.get("depends_on", {}):
            assert other in services, name
    assert services["daemon"]["network_mode"] == "service:code-location"
    for name in ("daemon", "vllm"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    grace = int(services["daemon"]["stop_grace_period"].removesuffix("s"))
    assert grace > 45


def test_every_variable_is_a_setting(services, monkeypatch, tmp_path):
    secrets = tmp_path / "alert_urls"
    secrets.write_text("json://127.0.0.1:1\n")
    for name in OWN:
        environment = {key: substituted(value) for key, value in services[name]["environment"].items()}
        for key, value in environment.items():
            monkeypatch.setenv(key, value.replace("/run/secrets/alert_urls", str(secrets)))
        monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
        settings = load_settings()
        assert settings.profile == "gpu"
        assert settings.mlflow_uri == "http://mlflow:5000"
        page = Tracking(tracking_uri=settings.mlflow_uri).page(settings)
        assert page == "http://localhost:5210", "only containers know the name mlflow"
        assert settings.alerts.urls_file == secrets
        monkeypatch.setenv("TASKAGENT_SERVING__IMAGINED", "1")
        with pytest.raises(Exception, match="imagined"):
            load_settings()
        monkeypatch.delenv("TASKAGENT_SERVING__IMAGINED")


def test_ports_agree_with_each_other_and_with_the_settings(services, monkeypatch):
    published = {name: port.split(":")[1:] for name, service in services.items() for port in service.get("ports", [])}
    settings = Settings.model_fields
    assert published["code-location"] == [services["daemon"]["environment"]["TASKAGENT_SERVING__PORT"]] * 2
    assert published["webserver"] == [str(settings["ports"].default.dagster)] * 2
    assert published["mlflow"] == [str(settings["ports"].default.mlflow), "5000"]
    assert services["daemon"]["environment"]["TASKAGENT_MLFLOW_URI"] == "http://mlflow:5000"
    location = yaml.safe_load((DOCKER / "workspace.yaml").read_text())["load_from"][0]["grpc_server"]
    command = services["code-location"]["command"]
    assert location["host"] in services
    assert str(location["port"]) == command[command.index("--port") + 1]
    assert command[command.index("--module-name") + 1] == "taskagent_platform.definitions"
    assert services["vllm"]["environment"]["PORT"] in published["vllm"]
    for name in ("mlflow", "code-location", "webserver", "vllm"):
        said = " ".join(services[name]["healthcheck"]["test"])
        assert published.get(name, ["4000"])[-1] in said or "4000" in said


def test_every_program_that_is_started_is_installed(services):
    installed = {entry.name for entry in entry_points(group="console_scripts")}
    for name in OWN:
        for command in (services[name]["command"], services[name]["healthcheck"]["test"][1:]):
            program = command[2] if command[:2] == ENTRY_POINT else command[0]
            assert program in installed or program in ("python", "/bin/sh"), program


def test_the_health_check_that_opens_the_instance_goes_through_the_entry_point(services):
    """By itself it would not, and the entry point alone knows the password."""
    assert (DOCKER / "Dockerfile").read_text().count(f"ENTRYPOINT {json.dumps(ENTRY_POINT)}\n") == 2
    check = services["daemon"]["healthcheck"]["test"]
    assert check == ["CMD", *ENTRY_POINT, "dagster-daemon", "liveness-check"]


@pytest.mark.parametrize(("key", "handed_on"), [("tk_1\n", "s3cret tk_1\n"), ("", "s3cret none\n")])
def test_the_entry_point_hands_on_the_secrets(tmp_path, monkeypatch, key, handed_on):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    script = (DOCKER / "entrypoint.sh").read_text()
    (tmp_path / "postgres_password").write_text("s3cret\n")
    (tmp_path / "api_key").write_text(key)
    assert "secrets=/run/secrets\n" in script
    script = script.replace("/run/secrets", str(tmp_path))
    said = f'echo "$DAGSTER_PG_PASSWORD ${{{API_KEY_VARIABLE}-none}}"'
    command = ["/bin/sh", "-c", script, "entrypoint", "/bin/sh", "-c", said]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == handed_on


def test_who_asks_the_endpoint_has_its_key(services):
    has_it = {name for name in OWN if "api_key" in services[name]["secrets"]}
    # The one runs sensors, the other runs.
    assert has_it == {"code-location", "daemon"}


def test_the_instance_is_the_workstation_s_but_for_its_storage(tmp_path, monkeypatch):
    from dagster._core.instance.config import dagster_instance_config

    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")
    here = yaml.safe_load((prepare_instance(load_settings()) / "dagster.yaml").read_text())
    there = yaml.safe_load((DOCKER / "dagster.yaml").read_text())
    assert set(there.pop("storage")) == {"postgres"}
    del here["storage"]
    assert there == here
    monkeypatch.setenv("DAGSTER_PG_HOST", "postgres")
    monkeypatch.setenv("DAGSTER_PG_PASSWORD", "x")
    config, _ = dagster_instance_config(str(DOCKER))
    assert config["run_launcher"]["class"] == "GpuRunLauncher"
    assert config["storage"]["postgres"]["postgres_db"]["db_name"] == "dagster"


def test_the_plain_server_serves_as_the_platform_s_own_does(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    monkeypatch.setenv("TASKAGENT_PROFILE", "gpu")
    folder = tmp_path / "model"
    monkeypatch.setenv("TASKAGENT_SERVING__DTYPE", "float16")
    monkeypatch.setenv("TASKAGENT_SERVING__MAX_NUM_SEQS", "7")
    monkeypatch.setenv("TASKAGENT_SEED", "3")
    # Where the candidate was judged: not from the deployment's copy, and at another address.
    judged = server_command(load_settings(), tmp_path / "merged", name="task_api", host="127.0.0.1", port=1)
    deployment = {"model_folder": str(folder), "server_options": options_of(judged)}
    _, *plain = serve_deployed().command(json.loads(json.dumps(deployment)), 8000)
    _, *own = server_command(load_settings(), folder, name="task_api", host="0.0.0.0", port=8000)
    # It has the card to itself.
    share = own.index("--gpu-memory-utilization")
    del own[share : share + 2]
    assert sorted(plain) == sorted(own)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder, deployment: None, None),
        (lambda folder, deployment: deployment.pop("server_options"), "does not say how its model is served"),
        (lambda folder, deployment: deployment.update(model_digest="d" * 64), "does not hold model dddddddddddd"),
        (lambda folder, deployment: (folder / "model.safetensors").write_text("x"), r"manifest \(model.safetensors\)"),
        (lambda folder, deployment: (folder / "extra.py").write_text(""), r"manifest \(extra.py\)"),
        (lambda folder, deployment: (folder / "config.json").unlink(), r"manifest \(config.json\)"),
        (lambda folder, deployment: (folder / "manifest.json").write_text("[]"), "cannot be read"),
    ],
)
def test_the_plain_server_serves_nothing_that_was_changed(tmp_path, monkeypatch, harm, says):
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    folder, model = make_model(load_settings(profile="smoke"))
    deployment = {"model_folder": str(folder), "model_digest": model.digest, "server_options": ["--seed", "3"]}
    harm(folder, deployment)
    module = serve_deployed()
    assert module.fault(deployment) is None if says is None else re.search(says, module.fault(deployment))
    if says is not None:
        active = tmp_path / "active.json"
        active.write_text(json.dumps({"domains": {"task_api": {"active": deployment}}}))
        monkeypatch.setattr(module.subprocess, "Popen", None)
        assert module.main(active, "task_api", 8000) == 1


def test_nothing_is_served_that_is_not_deployed(tmp_path):
    active = tmp_path / "active.json"
    assert serve_deployed().deployed(active, "task_api") is None
    active.write_text(json.dumps({"domains": {"task_api": {"active": {"model_digest": "d"}}}}))
    assert serve_deployed().deployed(active, "task_api") == {"model_digest": "d"}
    assert serve_deployed().deployed(active, "other") is None
