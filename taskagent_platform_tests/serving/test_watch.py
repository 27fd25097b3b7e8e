"""Watching an endpoint: a gateway of its own stands in, the audit log and the training mix are real."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from taskagent_platform.artifacts import new_artifact
from taskagent_platform.audit import audit_log
from taskagent_platform.defs.endpoint_sensor import endpoint_sensor
from taskagent_platform.serving.active import (
    ActiveDeployments,
    Deployment,
    DomainDeployments,
    active_file,
    write_active,
)
from taskagent_platform.serving.watch import Problem, look
from taskagent_platform.settings import load_settings
from taskagent_platform_tests.light_domain import LIGHTS


class Gateway:
    """Answers as it is told."""

    def __init__(self) -> None:
        self.healthy = True
        self.call: dict[str, Any] | None = {"name": "list_lights", "arguments": "{}"}
        self.text: str | None = None
        self.status = 200
        self.keys: list[str | None] = []
        self.bodies: list[dict[str, Any]] = []


@pytest.fixture
def gateway(tmp_path, monkeypatch) -> Iterator[Gateway]:
    answers = Gateway()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state = {"lights": {"healthy": answers.healthy}}
            self._say(200 if answers.healthy else 503, {"deployments": state})

        def do_POST(self) -> None:
            answers.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            answers.keys.append(self.headers["authorization"])
            message: dict[str, Any] = {"role": "assistant", "content": answers.text}
            if answers.call is not None:
                message["tool_calls"] = [{"id": "1", "type": "function", "function": answers.call}]
            self._say(answers.status, {"choices": [{"message": message}]})

        def _say(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")
    monkeypatch.setenv("TASKAGENT_SERVING__PORT", str(server.server_address[1]))
    monkeypatch.setenv("TASKAGENT_MONITORING__MIN_CALLS", "20")
    try:
        yield answers
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def deployed(gateway: Gateway) -> Gateway:
    settings = load_settings()
    deployment = Deployment(
        domain="lights", model_name="lights", model_digest="d" * 64, model_folder=Path("model"), report_digest="r",
        gates=(), base_url="http://127.0.0.1:1/v1", server=Path("server.json"), deployed_at=datetime.now(UTC),
        deployed_by="somebody",
    )  # fmt: skip
    write_active(active_file(settings), ActiveDeployments(domains={"lights": DomainDeployments(active=deployment)}))
    usage = {"set_light": 50, "list_lights": 50, "add_lamp": 0, "add_timer": 0, "remove_lamp": 0}
    with new_artifact(
        settings.folder("lights") / "training_dataset",
        kind="training_dataset",
        inputs={},
        settings={},
        code_version="1",
        details={"distribution": {"tool_usage": usage}},
    ):
        pass
    return gateway


def problems() -> tuple[Problem, ...]:
    found = look(load_settings(), LIGHTS)
    assert found is not None
    return found.problems


def log_calls(tool: str, count: int, arguments: Any, outcome: Any = "executed") -> None:
    log = audit_log(load_settings())
    for _ in range(count):
        log.append("tool_call", outcome, domain="lights", tool=tool, arguments=arguments)


def test_nothing_is_watched_where_nothing_is_deployed(gateway):
    assert look(load_settings(), LIGHTS) is None


def test_a_sound_endpoint_has_no_problem(deployed, monkeypatch):
    monkeypatch.setenv("TASKAGENT_API_KEY", "tk-1")
    log_calls("set_light", 10, {"room": "hall", "level": 1})
    log_calls("list_lights", 10, {})
    found = look(load_settings(), LIGHTS)
    assert found is not None
    assert found.problems == ()
    assert [(canary.called, canary.fault) for canary in found.canaries] == [(("list_lights",), "")]
    assert (found.use.calls, found.use.malformed, found.use.drift) == (20, 0, 0.0)
    assert deployed.keys == ["Bearer tk-1"]
    assert [tool["function"]["name"] for tool in deployed.bodies[0]["tools"]] == [tool.name for tool in LIGHTS.tools]


def test_a_server_that_does_not_answer_is_told_and_no_canary_is_sent(deployed):
    deployed.healthy = False
    (problem,) = problems()
    assert problem.kind == "down"
    assert "the model server of lights does not" in problem.sentence
    assert deployed.bodies == []


def test_a_gateway_that_is_gone_is_told(deployed, monkeypatch):
    monkeypatch.setenv("TASKAGENT_SERVING__PORT", "1")
    (problem,) = problems()
    assert "The gateway does not answer at http://127.0.0.1:1/health" in problem.sentence
    assert "`taskagent serve --domain lights` starts it again" in problem.sentence


@pytest.mark.parametrize(
    ("call", "text", "status", "said"),
    [
        ({"name": "add_lamp", "arguments": '{"room": "hall"}'}, None, 200, "called add_lamp instead of list_lights"),
        (None, "Hello!", 200, "called no tool instead of list_lights"),
        ({"name": "list_lights", "arguments": "{"}, None, 200, "a call that no tool takes"),
        (None, '<tool_call>{"name": "list_', 200, "a call that no tool takes"),
        (None, "", 500, "was answered with status 500"),
    ],
)
def test_a_canary_that_goes_wrong_is_told(deployed, call, text, status, said):
    deployed.call, deployed.text, deployed.status = call, text, status
    (problem,) = problems()
    assert problem.kind == "canary"
    assert "1 of 1 canary requests went wrong" in problem.sentence
    assert said in problem.sentence


def test_malformed_calls_are_told_once_they_are_surely_too_many(deployed):
    log_calls("list_lights", 19, {})
    log_calls("list_lights", 1, "{", outcome="failed")
    assert [problem.kind for problem in problems()] == ["drift"], "one of twenty may be chance"
    log_calls("set_light", 10, {"room": 3}, outcome="failed")
    log_calls("fly", 2, {}, outcome="refused")
    told = {problem.kind: problem.sentence for problem in problems()}
    assert "13 of 32 calls of the last 24 h (40.6%) are malformed" in told["malformed"]


def test_a_call_is_counted_once_though_its_approval_is_a_line_of_its_own(deployed):
    log_calls("remove_lamp", 5, {"lamp_id": "lamp_1"}, outcome="approved")
    log_calls("remove_lamp", 5, {"lamp_id": "lamp_1"})
    found = look(load_settings(), LIGHTS)
    assert found is not None
    assert found.use.mix == {"remove_lamp": 5}
    assert found.use.drift is None, "five calls are too few to speak of a mix"


def test_another_use_than_was_taught_is_told(deployed):
    log_calls("remove_lamp", 15, {"lamp_id": "lamp_1"})
    log_calls("list_lights", 15, {})
    (problem,) = problems()
    assert problem.kind == "drift"
    assert "50% away from the training mix; 35% is allowed" in problem.sentence


def test_the_sensor_stores_what_it_found_and_tells_a_fault_again_only_after_it_was_over(deployed):
    sensor = endpoint_sensor(LIGHTS)
    with dg.instance_for_test() as instance:

        def tick() -> Any:
            return sensor.evaluate_tick(dg.build_sensor_context(instance=instance))

        sound = tick()
        assert sound.skip_message == "The endpoint answers as it should."
        stored = sound.asset_events[0]
        assert stored.asset_key == dg.AssetKey(["lights", "vllm_endpoint"])
        assert stored.metadata["canaries_right"].value == 1
        deployed.healthy = False
        assert "Alert: lights/vllm_endpoint: the endpoint does not answer." in tick().skip_message
        assert "Alert" not in tick().skip_message
        deployed.healthy = True
        tick()
        deployed.healthy = False
        assert "Alert" in tick().skip_message
