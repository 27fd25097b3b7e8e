"""The routes to Docker, Kubernetes and Ray: what goes over the wire, from launch to health to terminate.

The launchers and clients are the real ones; a stand-in answers for the engine. Where an extra is not installed, its
test is skipped, and another one shows that the launcher says which extra is missing.
"""

import importlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.launcher import WorkerStatus

from taskagent_platform.errors import PlatformError
from taskagent_platform.launchers import gpu_run_launcher
from taskagent_platform.launchers.gpu_run_launcher import (
    GpuRunLauncher,
    docker_configuration,
    kubernetes_configuration,
    ray_configuration,
)
from taskagent_platform.launchers.routes import ROUTE_TAG
from taskagent_platform_tests.launchers.fake_api import FakeApi, fake_api
from taskagent_platform_tests.launchers.test_gpu_run_launcher import health, launch, launcher_of, status, tags

RUN = {"DAGSTER_RUN_JOB_NAME": "train"}


def needs(module: str, extra: str) -> None:
    pytest.importorskip(module, reason=f"the extra {extra!r} is not installed")


@pytest.fixture
def api(monkeypatch) -> Iterator[FakeApi]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with fake_api() as made:
        yield made


def instance_with(gpu: dict[str, Any]) -> Any:
    launcher = {
        "module": "taskagent_platform.launchers.gpu_run_launcher",
        "class": "GpuRunLauncher",
        "config": {"gpu": gpu, "cpu": {"local": {}}},
    }
    return dg.instance_for_test(overrides={"run_launcher": launcher})


@pytest.mark.parametrize(
    ("route", "module"), [("docker", "dagster_docker"), ("kubernetes", "dagster_k8s"), ("ray", "dagster_ray")]
)
def test_a_missing_extra_is_named(route, module, monkeypatch):
    monkeypatch.setattr(gpu_run_launcher, "find_spec", lambda name: None if name == module else find_spec(name))
    with pytest.raises(PlatformError, match=f"route {route} needs the package {module}.*extra '{route}'"):
        GpuRunLauncher(gpu={route: {}})


@pytest.mark.parametrize(
    ("gpus", "request_"),
    [
        (1, {"Driver": "nvidia", "Capabilities": [["gpu"]], "Count": 1}),
        ("all", {"Driver": "nvidia", "Capabilities": [["gpu"]], "Count": -1}),
        ([0, 2], {"Driver": "nvidia", "Capabilities": [["gpu"]], "DeviceIDs": ["0", "2"]}),
    ],
)
def test_docker_asks_for_the_gpus_that_are_named(gpus, request_):
    made = docker_configuration({"image": "worker", "gpus": gpus, "container_kwargs": {"shm_size": "8g"}})
    assert made == {"image": "worker", "container_kwargs": {"shm_size": "8g", "device_requests": [request_]}}


def test_a_kubernetes_route_keeps_what_it_is_given():
    made = kubernetes_configuration(
        {
            "gpus": 2,
            "node_selector": {"accelerator": "h100"},
            "resources": {"limits": {"memory": "64Gi"}, "requests": {"cpu": "8"}},
            "run_k8s_config": {"pod_spec_config": {"node_selector": {"zone": "a"}}, "job_metadata": {"labels": {}}},
        }
    )
    assert made["resources"] == {"limits": {"memory": "64Gi", "nvidia.com/gpu": "2"}, "requests": {"cpu": "8"}}
    assert made["run_k8s_config"] == {
        "pod_spec_config": {
            "node_selector": {"zone": "a", "accelerator": "h100"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        },
        "job_metadata": {"labels": {}},
    }


def test_a_ray_route_reserves_gpus_for_the_run():
    assert ray_configuration({"address": "a", "gpus": 2}) == {"address": "a", "num_gpus": 2}


def test_docker_from_launch_to_terminate(api, monkeypatch):
    needs("dagster_docker", "docker")
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{api.port}")
    container: dict[str, Any] = {"Id": "c0ffee", "State": {"Status": "running"}, "Config": {}, "Name": "/run"}
    api.answer("GET", ".*/version", {"ApiVersion": "1.44", "Version": "25"})
    api.answer("POST", ".*/containers/create", {"Id": "c0ffee", "Warnings": []}, 201)
    api.answer("GET", ".*/containers/c0ffee/json", lambda _: container)
    api.answer("POST", ".*/containers/c0ffee/(start|stop)", None, 204)
    route = {
        "image": "taskagent/gpu-worker:1",
        "gpus": 1,
        "env_vars": ["TASKAGENT_PROFILE=gpu"],
        "networks": ["platform"],
        "container_kwargs": {"volumes": ["home:/data"], "shm_size": "8g", "stop_timeout": 60},
    }
    with instance_with({"docker": route}) as instance:
        run_id = launch(instance, "train")
        (created,) = api.find("POST", ".*/containers/create")
        assert created.body["Image"] == "taskagent/gpu-worker:1"
        assert created.body["Env"] == ["TASKAGENT_PROFILE=gpu", "DAGSTER_RUN_JOB_NAME=train"]
        assert created.body["Labels"] == {"dagster/run_id": run_id, "dagster/job_name": "train"}
        assert created.body["Cmd"][:3] == ["dagster", "api", "execute_run"]
        assert json.loads(created.body["Cmd"][3])["pipeline_run_id"] == run_id
        host = created.body["HostConfig"]
        (request,) = host["DeviceRequests"]
        assert {name: value for name, value in request.items() if value} == {
            "Driver": "nvidia", "Count": 1, "Capabilities": [["gpu"]],
        }  # fmt: skip
        assert host["NetworkMode"] == "platform"
        assert host["Binds"] == ["home:/data"]
        assert host["ShmSize"] == 8 << 30
        assert api.find("POST", ".*/containers/c0ffee/start")
        assert tags(instance, run_id)[ROUTE_TAG] == "gpu:docker"
        assert health(instance, run_id).status == WorkerStatus.RUNNING
        container["State"] = {"Status": "exited", "ExitCode": 137, "OOMKilled": True}
        lost = health(instance, run_id)
        assert lost.status == WorkerStatus.FAILED
        assert '"OOMKilled": true' in lost.msg
        assert launcher_of(instance).supports_resume_run
        assert launcher_of(instance).terminate(run_id)
        (stopped,) = api.find("POST", ".*/containers/c0ffee/stop")
        assert stopped.query == "t=60"
        assert status(instance, run_id) == dg.DagsterRunStatus.CANCELING


def test_kubernetes_from_launch_to_terminate(api, tmp_path):
    needs("dagster_k8s", "kubernetes")
    job: dict[str, Any] = {"metadata": {"name": "job"}, "status": {"active": 1}}
    jobs = "/apis/batch/v1/namespaces/ml/jobs"
    api.answer("GET", "/version/?", {"major": "1", "minor": "30", "gitVersion": "v1.30.0"} | dict.fromkeys(
        ("gitCommit", "gitTreeState", "buildDate", "goVersion", "compiler", "platform"), "x"))  # fmt: skip
    api.answer("POST", jobs, lambda asked: asked.body, 201)
    api.answer("GET", f"{jobs}/[^/]+(/status)?", lambda _: job)
    api.answer("DELETE", f"{jobs}/[^/]+", {"status": "Success"})
    pods = "/api/v1/namespaces/ml/pods"
    api.answer("GET", pods, {"kind": "PodList", "items": [{"metadata": {"name": "pod-1"}}]})
    api.answer("DELETE", f"{pods}/pod-1", {"kind": "Pod", "metadata": {"name": "pod-1"}})
    route = {
        "job_image": "taskagent/gpu-worker:1",
        "gpus": 2,
        "node_selector": {"accelerator": "h100"},
        "job_namespace": "ml",
        "instance_config_map": "dagster-instance",
        "service_account_name": "dagster",
        "dagster_home": "/opt/dagster",
        "load_incluster_config": False,
        "kubeconfig_file": str(kubeconfig(tmp_path, api.port)),
        "env_vars": ["TASKAGENT_PROFILE=gpu"],
        "resources": {"requests": {"memory": "32Gi"}},
    }
    with instance_with({"kubernetes": route}) as instance:
        run_id = launch(instance, "train")
        (created,) = api.find("POST", jobs)
        assert created.body["metadata"]["name"] == f"dagster-run-{run_id}"
        assert created.body["spec"]["template"]["metadata"]["labels"]["dagster/run-id"] == run_id
        pod = created.body["spec"]["template"]["spec"]
        assert pod["nodeSelector"] == {"accelerator": "h100"}
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert pod["serviceAccountName"] == "dagster"
        assert pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        assert container["image"] == "taskagent/gpu-worker:1"
        assert container["resources"] == {"limits": {"nvidia.com/gpu": "2"}, "requests": {"memory": "32Gi"}}
        assert container["args"][:3] == ["dagster", "api", "execute_run"]
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert environment["DAGSTER_HOME"] == "/opt/dagster"
        assert environment["TASKAGENT_PROFILE"] == "gpu"
        assert environment["DAGSTER_RUN_JOB_NAME"] == "train"
        assert tags(instance, run_id)[ROUTE_TAG] == "gpu:kubernetes"
        assert health(instance, run_id).status == WorkerStatus.RUNNING
        job["status"] = {"failed": 1}
        assert health(instance, run_id).status == WorkerStatus.FAILED
        assert launcher_of(instance).supports_resume_run
        assert launcher_of(instance).terminate(run_id)
        assert [asked.path for asked in api.find("DELETE", f"{jobs}/.*")] == [f"{jobs}/dagster-run-{run_id}"]
        assert api.find("DELETE", f"{pods}/pod-1"), "its pods go with it"


def test_ray_from_launch_to_terminate(api):
    needs("dagster_ray", "ray")
    needs("ray", "ray")
    ray = importlib.import_module("ray")
    state = {"status": "RUNNING"}

    def details(_asked: Any) -> Any:
        return {"type": "SUBMISSION", "submission_id": "s", "entrypoint": "x", "message": "", **state}

    api.answer("GET", "/api/version", {"version": "4", "ray_version": ray.__version__, "ray_commit": ray.__commit__})
    api.answer("POST", "/api/jobs/", lambda asked: {"job_id": "s", "submission_id": asked.body["submission_id"]})
    api.answer("GET", "/api/jobs/[^/]+", details)
    api.answer("POST", "/api/jobs/[^/]+/stop", {"stopped": True})
    route = {"address": f"http://127.0.0.1:{api.port}", "gpus": 2, "num_cpus": 4, "env_vars": ["TASKAGENT_PROFILE=gpu"]}
    with instance_with({"ray": route}) as instance:
        run_id = launch(instance, "train")
        (submitted,) = api.find("POST", "/api/jobs/")
        assert submitted.body["submission_id"] == f"dagster-run-{run_id}"
        assert submitted.body["entrypoint_num_gpus"] == 2
        assert submitted.body["entrypoint_num_cpus"] == 4
        assert submitted.body["entrypoint"].startswith("dagster api execute_run '")
        assert submitted.body["runtime_env"]["env_vars"] == {"TASKAGENT_PROFILE": "gpu", **RUN}
        assert submitted.body["metadata"]["dagster/run-id"] == run_id
        assert tags(instance, run_id)[ROUTE_TAG] == "gpu:ray"
        assert health(instance, run_id).status == WorkerStatus.RUNNING
        state["status"] = "FAILED"
        assert health(instance, run_id).status == WorkerStatus.FAILED
        assert launcher_of(instance).terminate(run_id)
        assert api.find("POST", f"/api/jobs/dagster-run-{run_id}/stop")


def kubeconfig(folder: Path, port: int) -> Path:
    path = folder / "kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
                "users": [{"name": "u", "user": {"token": "t"}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "c",
            }
        )
    )
    return path
