import json
import os
import socket
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from taskagent_platform.artifacts import MANIFEST_NAME, Manifest, read_manifest
from taskagent_platform.audit import account, audit_log
from taskagent_platform.domains.task_api import TaskApiDomain
from taskagent_platform.errors import PlatformError
from taskagent_platform.serving import deployments
from taskagent_platform.serving import server as server_module
from taskagent_platform.serving.active import Deployment, active_file, endpoint_url, read_active
from taskagent_platform.serving.deployments import (
    DeploymentRefusedError,
    deploy,
    find_server,
    make_room,
    rollback,
    serve,
    server_files,
    status,
    stop_all,
)
from taskagent_platform.serving.gateway_process import GatewayProcess, running_gateway
from taskagent_platform.serving.server import Server, free_port, read_server, server_is_alive
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform_tests.serving.fake_model_server import start_fake_server
from taskagent_platform_tests.serving.judged_model import make_model, make_report, small_domain

NAME = "task_api"


class Stage:
    """A home folder with models, reports and servers that come and go."""

    def __init__(self, settings: Settings, domain: TaskApiDomain) -> None:
        self.settings = settings
        self.domain = domain
        self.model_folder = settings.folder(NAME) / "merged_model"
        self.report_folder = settings.folder(NAME) / "eval_report"
        self.starts: list[Path] = []
        self.gateway_runs = False

    def serve_otherwise(self, **changes: Any) -> None:
        """Changes how models are served, and measures the present one, if there is one, as it is served then."""
        serving = self.settings.serving.model_copy(update=changes)
        self.settings = self.settings.model_copy(update={"serving": serving})
        if (self.model_folder / MANIFEST_NAME).exists():
            make_report(self.settings, self.domain, read_manifest(self.model_folder))

    def start(self, settings: Settings, model_folder: Path, **options: Any) -> Server:
        self.starts.append(model_folder)
        return start_fake_server(settings, model_folder, **options)

    def train(self, weights: str, **report: Any) -> Manifest:
        """Makes a model and its report, and leaves the candidate's server running, as the evaluation does."""
        _, model = make_model(self.settings, weights)
        make_report(self.settings, self.domain, model, **report)
        files = server_files(self.settings, NAME, model.digest)
        start_fake_server(
            self.settings, self.model_folder, name=NAME, log_file=files.log_file, record_file=files.record_file
        )
        return model

    def deploy(self, **options: Any) -> Deployment:
        return deploy(self.settings, self.domain, self.model_folder, self.report_folder, **options)

    def rollback(self, reason: str = "it misbehaves") -> Deployment:
        return rollback(self.settings, self.domain, reason=reason)

    def answering(self) -> str:
        """Returns the digest of the model whose server a client of the endpoint reaches."""
        active = read_active(active_file(self.settings)).domains[NAME].active
        with httpx.Client(trust_env=False) as client:
            answer = client.post(f"{active.base_url}/chat/completions", json={"model": NAME, "messages": []})
        said = answer.json()["choices"][0]["message"]["content"]
        server = self.record(active.model_digest)
        assert said == f"process {server.pid}"
        return server.model_digest

    def record(self, digest: str) -> Server:
        server = read_server(server_files(self.settings, NAME, digest).record_file)
        assert server is not None
        return server

    def audit(self) -> list[tuple[str, str]]:
        return [(entry.action, entry.outcome) for entry in audit_log(self.settings).entries()]

    def nothing_is_deployed(self) -> bool:
        return read_active(active_file(self.settings)).domains == {} and not self.gateway_runs


@pytest.fixture
def stage_with_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path / "home"))
    settings = load_settings(profile="smoke", evaluation={"case_limit": None}, serving={"port": free_port()})
    stage = Stage(settings, small_domain(tmp_path))
    monkeypatch.setattr(deployments, "start_server", stage.start)
    monkeypatch.setattr(server_module, "available_memory_gib", lambda: 64.0)
    yield stage
    stop_all(settings)


@pytest.fixture
def stage(stage_with_gateway: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A stage whose gateway is only noted as running: its process takes a second to start."""
    stage = stage_with_gateway
    process = GatewayProcess(pid=1, create_time=0, host="h", port=1, requests_per_minute=1, log_file=Path("log"))

    def start(settings: Settings) -> GatewayProcess:
        stage.gateway_runs = True
        return process

    def stop(settings: Settings) -> bool:
        ran, stage.gateway_runs = stage.gateway_runs, False
        return ran

    monkeypatch.setattr(deployments, "start_gateway", start)
    monkeypatch.setattr(deployments, "stop_gateway", stop)
    monkeypatch.setattr(deployments, "running_gateway", lambda settings: process if stage.gateway_runs else None)
    return stage


def test_clients_of_the_gateway_follow_deployment_promotion_and_rollback(stage_with_gateway: Stage) -> None:
    stage = stage_with_gateway
    url = endpoint_url(stage.settings)
    with httpx.Client(trust_env=False) as client:

        def answering() -> str:
            answer = client.post(f"{url}/chat/completions", json={"model": NAME, "messages": []})
            assert answer.status_code == 200
            return answer.headers["x-model-digest"]

        first = stage.train("one")
        stage.deploy()
        assert answering() == first.digest
        second = stage.train("two")
        stage.deploy()
        assert answering() == second.digest
        stage.rollback()
        assert answering() == first.digest
        described = client.get(url.removesuffix("/v1") + "/deployment").json()[NAME]
    assert (described["active"]["model_digest"], described["previous"]["model_digest"]) == (first.digest, second.digest)
    assert described["active"]["gates"][0]["n"] == 20
    serving = stage.settings.serving.model_copy(update={"port": free_port()})
    moved = stage.settings.model_copy(update={"serving": serving})
    assert (status(moved).endpoint, endpoint_url(moved) == url) == (url, False)
    assert stop_all(stage.settings)[0].startswith(f"gateway on port {stage.settings.serving.port}")


def test_a_candidate_that_passes_is_promoted_as_it_runs(stage: Stage) -> None:
    model = stage.train("one")
    candidate = stage.record(model.digest)
    deployment = stage.deploy(actor="ann")
    assert stage.answering() == deployment.model_digest == model.digest
    assert stage.starts == []
    promoted = stage.record(model.digest)
    assert (promoted.pid, promoted.detached) == (candidate.pid, True)
    assert dict(pairwise(deployment.server_options))["--max-num-seqs"] == "32"
    assert str(candidate.port) not in deployment.server_options
    assert (deployment.deployed_by, deployment.override_reason, deployment.refusals) == ("ann", None, ())
    assert [gate.passed for gate in deployment.gates] == [True] * 6
    assert stage.gateway_runs
    assert stage.audit() == [("deploy", "executed")]


def test_a_failed_gate_deploys_nothing_and_names_the_gate_and_by_how_much(stage: Stage) -> None:
    stage.train("bad", failing={"argument_extraction": 6})
    with pytest.raises(DeploymentRefusedError, match=r"Argument extraction is 70\.0% .* 20\.0 points short") as refused:
        stage.deploy()
    assert [gate.name for gate in refused.value.verdict.gates if not gate.passed] == ["argument_extraction"]
    assert stage.nothing_is_deployed()
    assert stage.audit() == [("deploy", "refused")]


def _without_report(stage: Stage) -> None:
    (stage.report_folder / "manifest.json").unlink()


def _swap_model(stage: Stage) -> None:
    make_model(stage.settings, "another")


def _touch_weights(stage: Stage) -> None:
    (stage.model_folder / "model.safetensors").write_text("tampered")


def _add_file(stage: Stage) -> None:
    (stage.model_folder / "extra.py").write_text("")


def _touch_report(stage: Stage) -> None:
    file = stage.report_folder / "report.json"
    file.write_text(file.read_text().replace('"complete": true', '"complete":  true'))


def _unfinished_model(stage: Stage) -> None:
    (stage.model_folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_without_report, "no evaluation report to go by"),
        (_swap_model, "The report is of model"),
        (_touch_weights, "model.safetensors was changed"),
        (_add_file, "extra.py is missing or extra"),
        (_touch_report, "report.json was changed"),
        (_unfinished_model, "not a finished artifact"),
    ],
)
def test_whatever_does_not_fit_together_is_refused_and_on_record(
    stage: Stage, harm: Callable[[Stage], None], says: str
) -> None:
    stage.train("one")
    harm(stage)
    with pytest.raises(PlatformError, match=says):
        stage.deploy()
    assert stage.nothing_is_deployed()
    assert stage.audit() == [("deploy", "refused")]


def test_a_refusal_leaves_the_champion_where_it_is(stage: Stage) -> None:
    champion = stage.train("one")
    stage.deploy()
    stage.train("two", failing={"tool_selection": 20})
    with pytest.raises(DeploymentRefusedError):
        stage.deploy()
    assert stage.answering() == champion.digest
    assert status(stage.settings).domains[0].active_is_healthy


def test_a_model_that_passes_every_gate_but_is_worse_than_the_champion_is_refused(stage: Stage) -> None:
    champion = stage.train("one")
    stage.deploy()
    stage.train("two", failing={"abstention": 5})
    with pytest.raises(DeploymentRefusedError, match=r"-6\.2 points and must not be less than -2\.0: 0 cases only"):
        stage.deploy()
    assert stage.answering() == champion.digest
    second = stage.train("three", failing={"abstention": 1})
    gate = stage.deploy().gates[-1]
    assert (gate.name, gate.n, gate.value) == ("no_worse_than_champion", 80, -1 / 80)
    stage.train("four", failing={"abstention": 3})
    with pytest.raises(DeploymentRefusedError, match=r"-2\.5 points"):
        stage.deploy()
    assert stage.answering() == second.digest


def test_a_candidate_is_not_compared_with_a_champion_that_nobody_measured(stage: Stage) -> None:
    stage.train("one")
    _without_report(stage)
    stage.deploy(override_reason="it has to run today")
    second = stage.train("two")
    with pytest.raises(DeploymentRefusedError, match="champion's report cannot be used"):
        stage.deploy()
    assert stage.deploy(override_reason="compared by hand").model_digest == second.digest


def test_a_rollback_is_followed_by_a_comparison_with_the_model_rolled_back_to(stage: Stage) -> None:
    stage.train("one")
    stage.deploy()
    stage.train("two", failing={"abstention": 1})
    stage.deploy()
    stage.rollback()
    stage.train("three", failing={"abstention": 2})
    with pytest.raises(DeploymentRefusedError, match=r"-2\.5 points"):
        stage.deploy()


def test_an_override_needs_a_reason_and_leaves_it_in_the_log_and_on_the_deployment(stage: Stage) -> None:
    model = stage.train("bad", failing={"tool_selection": 20})
    for reason in ("", "  \n"):
        with pytest.raises(PlatformError, match="needs a written reason"):
            stage.deploy(override_reason=reason)
    deployment = stage.deploy(override_reason="Demo for the board, decided by Maya.", actor="ann")
    assert stage.answering() == model.digest
    assert deployment.override_reason == "Demo for the board, decided by Maya."
    assert "Tool selection is 0.0%" in deployment.refusals[0]
    entries = list(audit_log(stage.settings).entries())
    assert [(entry.action, entry.outcome, entry.actor) for entry in entries] == [
        ("gate_override", "approved", "ann"), ("deploy", "executed", "ann"),
    ]  # fmt: skip
    assert "decided by Maya" in (entries[0].reason or "")
    assert "Tool selection is 0.0%" in (entries[0].reason or "")


def test_gates_that_settings_lowered_are_on_record(stage: Stage) -> None:
    _, model = make_model(stage.settings, "one")

    def reason(override: str | None = None, **failing: int) -> str | None:
        make_report(stage.settings, stage.domain, model, failing=failing)
        stage.deploy(override_reason=override)
        return list(audit_log(stage.settings).entries())[-1].reason

    assert reason() is None
    evaluation = stage.settings.evaluation.model_copy(update={"case_limit": 10})
    changes = {"tool_selection": 0.99, "json_validity": 0, "champion_margin": 0.1, "latency_p95_ms": 30_000}
    lax = stage.settings.gates.model_copy(update=changes)
    stage.settings = stage.settings.model_copy(update={"evaluation": evaluation, "gates": lax})
    lowered = (
        "gates lowered by settings: gates.json_validity 0 (default 0.99), gates.latency_p95_ms 30000 (default 20000), "
        "gates.champion_margin 0.1 (default 0.02), evaluation.case_limit 10"
    )
    assert reason() == lowered
    assert reason("Maya decided it", tool_selection=10) == f"Maya decided it; {lowered}"


def test_an_override_does_not_let_a_tampered_model_through(stage: Stage) -> None:
    stage.train("one")
    _touch_weights(stage)
    with pytest.raises(PlatformError, match="was changed"):
        stage.deploy(override_reason="I want it")
    assert stage.nothing_is_deployed()


def test_an_override_that_was_not_needed_is_none(stage: Stage) -> None:
    stage.train("one")
    assert stage.deploy(override_reason="just in case").override_reason is None
    assert stage.audit() == [("deploy", "executed")]


def test_the_last_champion_stays_ready_and_a_rollback_is_instant_both_ways(stage: Stage) -> None:
    first = stage.train("one")
    stage.deploy()
    second = stage.train("two")
    stage.deploy()
    assert stage.answering() == second.digest
    assert status(stage.settings).domains[0].previous_is_ready
    assert stage.rollback().model_digest == first.digest
    assert stage.answering() == first.digest
    assert stage.rollback("it was not the model").model_digest == second.digest
    assert stage.answering() == second.digest
    assert stage.starts == []
    assert stage.audit()[-2:] == [("rollback", "executed")] * 2


def test_older_champions_are_stopped_and_their_copies_removed(stage: Stage) -> None:
    digests = []
    for weights in ("one", "two", "three"):
        digests.append(stage.train(weights).digest)
        stage.deploy()
    files = [server_files(stage.settings, NAME, digest).record_file for digest in digests]
    assert [file.exists() for file in files] == [False, True, True]
    for name in ("deployments", "deployment_reports"):
        kept = stage.settings.folder(NAME) / name
        assert sorted(folder.name for folder in kept.iterdir()) == sorted(digests[1:])


def test_a_rollback_outlives_the_server_and_the_original_of_its_model(stage: Stage) -> None:
    first = stage.train("one")
    stage.deploy()
    stage.train("two")
    stage.deploy()
    make_room(stage.settings, NAME)
    assert not status(stage.settings).domains[0].previous_is_ready
    assert status(stage.settings).domains[0].active_is_healthy
    # The merged model's folder now holds the second one; the first is started from the copy that was kept.
    stage.rollback()
    assert stage.starts == [stage.settings.folder(NAME) / "deployments" / first.digest]
    assert stage.answering() == first.digest


def test_a_rollback_to_a_tampered_copy_is_refused(stage: Stage) -> None:
    first = stage.train("one")
    stage.deploy()
    second = stage.train("two")
    stage.deploy()
    make_room(stage.settings, NAME)
    weights = stage.settings.folder(NAME) / "deployments" / first.digest / "model.safetensors"
    weights.write_text("tampered")
    with pytest.raises(PlatformError, match="was changed"):
        stage.rollback()
    assert stage.answering() == second.digest


def test_there_must_be_something_to_go_back_to_and_a_reason(stage: Stage) -> None:
    stage.train("one")
    stage.deploy()
    with pytest.raises(PlatformError, match="no earlier deployment"):
        stage.rollback()
    with pytest.raises(PlatformError, match="needs a reason"):
        stage.rollback(" ")


def test_deploying_the_champion_again_changes_nothing_but_the_record(stage: Stage) -> None:
    first = stage.train("one")
    stage.deploy()
    second = stage.train("two")
    stage.deploy()
    again = stage.deploy()
    present = read_active(active_file(stage.settings)).domains[NAME]
    assert (present.active.model_digest, present.previous and present.previous.model_digest) == (
        second.digest, first.digest,
    )  # fmt: skip
    assert again.model_digest == second.digest
    assert stage.starts == []


def test_a_candidate_whose_server_is_gone_is_started_again(stage: Stage) -> None:
    model = stage.train("one")
    server = stage.record(model.digest)
    psutil.Process(server.pid).kill()
    psutil.Process(server.pid).wait(5)
    stage.deploy()
    assert len(stage.starts) == 1
    assert stage.answering() == model.digest


def test_a_server_that_runs_otherwise_than_it_would_be_served_is_not_promoted(stage: Stage) -> None:
    model = stage.train("one")
    candidate = stage.record(model.digest)
    assert find_server(stage.settings, NAME, model.digest) is not None
    stage.serve_otherwise(max_num_seqs=1)
    assert find_server(stage.settings, NAME, model.digest) is None
    stage.deploy()
    assert len(stage.starts) == 1
    assert stage.record(model.digest).pid != candidate.pid
    assert server_is_alive(candidate), "it ends with the process that started it"


@pytest.mark.parametrize(
    "change",
    [{"dtype": "bfloat16"}, {"max_model_len": 512}, {"max_num_seqs": 1}, {"speculation": True}, {"model_name": "m"}],
)
def test_a_model_that_is_served_otherwise_has_a_record_of_its_own(stage: Stage, change: dict[str, Any]) -> None:
    first, again = (server_files(stage.settings, NAME, "d" * 64) for _ in range(2))
    stage.serve_otherwise(**change)
    assert first == again
    assert set(first).isdisjoint(server_files(stage.settings, NAME, "d" * 64))


def test_a_rollback_serves_under_the_name_that_its_server_has(stage: Stage) -> None:
    stage.train("one")
    stage.deploy()
    stage.train("two")
    stage.deploy()
    stage.serve_otherwise(model_name="tasks")
    assert (stage.rollback().model_name, stage.starts) == (NAME, [])
    make_room(stage.settings, NAME)
    assert (stage.rollback().model_name, len(stage.starts)) == ("tasks", 1)


def test_the_champion_with_other_settings_replaces_itself_once_it_answers(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stage.train("one")
    stage.deploy()
    before = stage.record(model.digest)

    def start(*arguments: Any, **options: Any) -> Server:
        started = stage.start(*arguments, **options)
        assert server_is_alive(before)
        return started

    monkeypatch.setattr(deployments, "start_server", start)
    stage.serve_otherwise(max_num_seqs=1)
    stage.deploy()
    assert stage.answering() == model.digest
    assert (server_is_alive(before), before.record_file.exists()) == (False, False)


@pytest.mark.parametrize("weights", ["one", "two"])
def test_what_serves_is_left_as_it_is_when_its_successor_does_not_start(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    champion = stage.train("one")
    stage.deploy()
    before = stage.record(champion.digest)
    _, model = make_model(stage.settings, weights)
    make_report(stage.settings, stage.domain, model)

    def fail(*_: Any, **__: Any) -> Server:
        raise PlatformError("The model server ended while loading.")

    monkeypatch.setattr(deployments, "start_server", fail)
    stage.serve_otherwise(max_num_seqs=1)
    with pytest.raises(PlatformError, match="ended while loading"):
        stage.deploy()
    assert server_is_alive(before)
    assert status(stage.settings).domains[0].active_is_healthy


def test_nothing_is_stopped_for_a_server_that_finds_no_memory(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for weights in ("one", "two"):
        digests.append(stage.train(weights).digest)
        stage.deploy()
    running = [stage.record(digest) for digest in digests]
    stage.serve_otherwise(max_num_seqs=1)
    monkeypatch.setattr(server_module, "available_memory_gib", lambda: 1.0)
    with pytest.raises(PlatformError, match="needs about"):
        stage.deploy()
    assert [server_is_alive(server) for server in running] == [True, True]
    # What the server kept for a rollback would set free is enough.
    monkeypatch.setattr(deployments, "memory_held_gib", lambda server: 4.0 if server == running[0] else 0.0)
    assert stage.deploy().model_digest == digests[1]
    assert server_is_alive(running[0]) is False


def test_what_is_deployed_is_served_again_although_a_newer_candidate_was_blocked(stage: Stage) -> None:
    first = stage.train("one")
    stage.deploy()
    second = stage.train("two")
    stage.deploy()
    stage.train("three", failing={"tool_selection": 20})
    with pytest.raises(DeploymentRefusedError):
        stage.deploy()
    stop_all(stage.settings)
    stage.serve_otherwise(max_num_seqs=1)
    served = serve(stage.settings, stage.domain, actor="ann")
    assert stage.answering() == served.model_digest == second.digest
    assert (stage.gateway_runs, served.deployed_by) == (True, account())
    present = read_active(active_file(stage.settings)).domains[NAME]
    assert (present.active, present.previous and present.previous.model_digest) == (served, first.digest)
    kept = stage.settings.folder(NAME) / "deployments"
    assert stage.starts == [kept / second.digest]
    last = list(audit_log(stage.settings).entries())[-1]
    assert (last.action, last.outcome, last.actor, last.model_digest) == ("serve", "executed", "ann", second.digest)
    assert last.reason is not None
    assert "--max-num-seqs 1 " in last.reason.partition("; it was judged with ")[0]
    # A record from before the options were kept is read, and completed.
    file = active_file(stage.settings)
    told = read_active(file).model_dump(mode="json")
    del told["domains"][NAME]["active"]["server_options"]
    file.write_text(json.dumps(told))
    again = serve(stage.settings, stage.domain)
    assert dict(pairwise(again.server_options))["--max-num-seqs"] == "1"
    assert len(stage.starts) == 1, "it answers"
    (kept / second.digest / "model.safetensors").write_text("tampered")
    stop_all(stage.settings)
    with pytest.raises(PlatformError, match="was changed"):
        serve(stage.settings, stage.domain)


def test_after_stopping_everything_the_same_model_is_deployed_again_without_training(stage: Stage) -> None:
    model = stage.train("one")
    stage.deploy()
    told = stop_all(stage.settings)
    assert len(told) == 2
    found = status(stage.settings)
    assert (found.gateway, found.domains[0].active_is_healthy) == (None, False)
    assert stop_all(stage.settings) == []
    stage.deploy()
    assert stage.answering() == model.digest


def test_a_record_whose_process_is_another_one_stops_nothing(stage: Stage) -> None:
    model = stage.train("one")
    server = stage.record(model.digest)
    stranger = server.model_copy(update={"create_time": server.create_time - 100})
    server.record_file.write_text(stranger.model_dump_json())
    assert stop_all(stage.settings) == []
    assert psutil.pid_exists(server.pid)
    server.record_file.write_text(server.model_dump_json())


def test_a_damaged_record_does_not_keep_the_others_running(stage: Stage) -> None:
    model = stage.train("one")
    stage.deploy()
    server = stage.record(model.digest)
    server_files(stage.settings, NAME, "0" * 64).record_file.write_text("{")
    told = stop_all(stage.settings)
    assert any(text.startswith("not a server: ") for text in told)
    assert not server_is_alive(server)


def test_a_port_in_use_deploys_nothing_and_leaves_nothing_behind(stage_with_gateway: Stage) -> None:
    stage = stage_with_gateway
    stage.train("one")
    with socket.socket() as other:
        other.bind(("127.0.0.1", stage.settings.serving.port))
        other.listen()
        with pytest.raises(PlatformError, match="Nothing can listen"):
            stage.deploy()
    assert stage.nothing_is_deployed()
    assert running_gateway(stage.settings) is None


def test_a_server_that_another_process_is_starting_is_left_alone(stage: Stage) -> None:
    model = stage.train("one")
    stage.deploy()
    stop_all(stage.settings)
    stage.train("one")
    candidate = stage.record(model.digest)
    psutil.Process(candidate.pid).suspend()
    record = candidate.record_file
    record.write_text(candidate.model_copy(update={"owner_pid": os.getppid()}).model_dump_json())
    try:
        with pytest.raises(PlatformError, match=rf"Process {os.getppid()} is starting a server of model"):
            serve(stage.settings, stage.domain)
        assert server_is_alive(candidate)
    finally:
        psutil.Process(candidate.pid).resume()


def test_a_gateway_that_cannot_move_starts_and_stops_no_server(stage: Stage) -> None:
    champion = stage.train("one")
    stage.deploy()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        stage.serve_otherwise(port=other.getsockname()[1], max_num_seqs=1)
        with pytest.raises(PlatformError, match="Nothing can listen"):
            stage.deploy()
    assert (stage.starts, stage.gateway_runs) == ([], True)
    assert find_server(stage.settings, NAME, champion.digest, any_settings=True) is not None


def test_a_server_that_does_not_start_deploys_nothing_and_leaves_nothing_behind(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stage.train("one")
    stop_all(stage.settings)

    def fail(*_: Any, **__: Any) -> Server:
        raise PlatformError("The model server ended while loading.")

    monkeypatch.setattr(deployments, "start_server", fail)
    with pytest.raises(PlatformError, match="ended while loading"):
        stage.deploy()
    assert stage.nothing_is_deployed()
    assert not server_files(stage.settings, NAME, model.digest).record_file.exists()


def test_nothing_is_promoted_when_the_audit_log_was_tampered_with(stage: Stage) -> None:
    first = stage.train("one")
    stage.deploy()
    log = audit_log(stage.settings)
    stage.train("two")
    log.path.write_text("")
    with pytest.raises(PlatformError, match="was cut off"):
        stage.deploy()
    assert stage.answering() == first.digest
