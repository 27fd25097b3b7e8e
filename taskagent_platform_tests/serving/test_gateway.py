import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from taskagent_platform.serving.active import ActiveDeployments, Deployment, DomainDeployments, write_active
from taskagent_platform.serving.gateway import MAX_BODY_BYTES, ApiKeys, RateLimit, create_app
from taskagent_platform_tests.serving.fake_server import serve


class Upstream:
    """A model server that says its name, and remembers what it was asked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.left = threading.Event()
        self.app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/{path:path}", self.answer, methods=["GET", "POST"]),
            ]
        )

    async def health(self, request: Request) -> Response:
        return Response()

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model"}]})

    async def answer(self, request: Request) -> Response:
        body = await request.body()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.paths.append(str(request.url))
        asked = json.loads(body) if body else {}
        if asked.get("model", self.name) != self.name:
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        if asked.get("wait"):
            while not await request.is_disconnected():
                await asyncio.sleep(0.01)
            self.left.set()
        if asked.get("stream") == "endless":
            return StreamingResponse(self.endless(), media_type="text/event-stream")
        if asked.get("stream"):
            return StreamingResponse(self.chunks(), media_type="text/event-stream")
        return JSONResponse(
            {
                "id": "1", "object": "chat.completion", "created": 1, "model": self.name,
                "choices": [{"index": 0, "finish_reason": "stop",
                             "message": {"role": "assistant", "content": f"from {self.name}"}}],
            },
            headers={"connection": "close", "x-request-id": "7", "x-user": request.headers.get("x-user", "")},
        )  # fmt: skip

    async def chunks(self) -> AsyncIterator[str]:
        for word in ("one", "two"):
            delta = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": self.name,
                     "choices": [{"index": 0, "delta": {"content": word}}]}  # fmt: skip
            yield f"data: {json.dumps(delta)}\n\n"
        yield "data: [DONE]\n\n"

    async def endless(self) -> AsyncIterator[str]:
        try:
            while True:
                yield "data: more\n\n"
                await asyncio.sleep(0.01)
        finally:
            self.left.set()


def deployment(domain: str, url: str, digest: str) -> Deployment:
    return Deployment(
        domain=domain, model_name=domain, model_digest=digest, model_folder=Path("/models") / digest,
        report_digest="report", gates=(), base_url=f"{url}/v1", server="server.json",
        deployed_at=datetime.now(UTC), deployed_by="ann",
    )  # fmt: skip


class Stage:
    """A gateway with upstreams behind it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.active_path = folder / "active.json"
        self._stack = stack
        self.domains: dict[str, DomainDeployments] = {}

    def upstream(self, name: str) -> tuple[Upstream, str]:
        upstream = Upstream(name)
        return upstream, self._stack.enter_context(serve(upstream.app))

    def deploy(self, domain: str, url: str, digest: str) -> None:
        self.domains[domain] = DomainDeployments(active=deployment(domain, url, digest))
        write_active(self.active_path, ActiveDeployments(domains=self.domains))

    def client(self, requests_per_minute: int = 100) -> httpx.Client:
        url = self._stack.enter_context(serve(create_app(self.active_path, requests_per_minute=requests_per_minute)))
        return self._stack.enter_context(httpx.Client(base_url=url, trust_env=False))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(tmp_path, stack)


def test_a_request_reaches_the_active_deployment_unchanged_and_the_answer_names_the_model(stage: Stage) -> None:
    upstream, url = stage.upstream("task_api")
    stage.deploy("task_api", url, "d1")
    body = b'{"model":  "task_api", "messages": [{"role": "user", "content": "caf\xc3\xa9"}]}'
    headers = {"authorization": "Bearer secret", "content-type": "application/json", "x-trace": "9"}
    answer = stage.client().post("/v1/chat/completions?seed=1", content=body, headers=headers)
    assert answer.json()["choices"][0]["message"]["content"] == "from task_api"
    assert (answer.headers["x-model-digest"], answer.headers["x-request-id"]) == ("d1", "7")
    assert upstream.bodies == [body]
    assert upstream.paths == [f"{url}/v1/chat/completions?seed=1"]
    assert upstream.headers[0]["x-trace"] == "9"
    assert "authorization" not in upstream.headers[0]


def test_headers_that_are_not_ascii_pass_both_ways_as_they_came(stage: Stage) -> None:
    upstream, url = stage.upstream("task_api")
    stage.deploy("task_api", url, "d1")
    name = "Jürgen ✓".encode()
    answer = stage.client().post("/v1/chat/completions", json={"model": "task_api"}, headers={b"x-user": name})
    assert answer.status_code == 200
    assert upstream.headers[0]["x-user"] == name.decode("latin-1")
    assert (b"x-user", name) in answer.headers.raw


def test_a_fault_of_the_gateway_answers_in_the_shape_that_clients_look_for(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("private words")

    monkeypatch.setattr("taskagent_platform.serving.gateway._Gateway._choose", fail)
    answer = stage.client().post("/v1/chat/completions", json={})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "private" not in answer.text


def test_a_stream_passes_through_openais_client(stage: Stage) -> None:
    _, url = stage.upstream("task_api")
    stage.deploy("task_api", url, "d1")
    client = openai.OpenAI(base_url=f"{stage.client().base_url}/v1", api_key="none")
    stream = client.chat.completions.create(model="task_api", messages=[{"role": "user", "content": "hi"}], stream=True)
    assert [chunk.choices[0].delta.content for chunk in stream] == ["one", "two"]


def test_a_promotion_takes_effect_with_the_next_request_and_a_rollback_too(stage: Stage) -> None:
    _, old = stage.upstream("task_api")
    newer, new = stage.upstream("task_api")
    stage.deploy("task_api", old, "d1")
    client = stage.client()
    digests = []
    for url, digest in ((old, "d1"), (new, "d2"), (old, "d1")):
        stage.deploy("task_api", url, digest)
        digests.append(client.post("/v1/chat/completions", json={"model": "task_api"}).headers["x-model-digest"])
    assert digests == ["d1", "d2", "d1"]
    assert len(newer.bodies) == 1


def test_the_model_name_chooses_among_domains_and_a_single_server_judges_it_itself(stage: Stage) -> None:
    _, first = stage.upstream("task_api")
    _, second = stage.upstream("support")
    stage.deploy("task_api", first, "d1")
    client = stage.client()
    assert client.post("/v1/chat/completions", json={"model": "gpt"}).json()["error"]["message"] == "no such model"
    stage.deploy("support", second, "d2")
    for name in ("task_api", "support"):
        answer = client.post("/v1/chat/completions", json={"model": name})
        assert answer.json()["choices"][0]["message"]["content"] == f"from {name}"
    unknown = client.post("/v1/chat/completions", json={"model": "gpt"})
    assert (unknown.status_code, unknown.json()["error"]["message"]) == (
        404, "There is no model 'gpt' here; there are task_api, support.",
    )  # fmt: skip
    for body in (b"{", b"[" * 100_000):
        assert client.post("/v1/chat/completions", content=body).status_code == 400
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["task_api", "support"]


def test_models_whose_servers_answer_are_listed_without_the_others(stage: Stage) -> None:
    _, url = stage.upstream("support")
    client = stage.client()
    stage.deploy("task_api", "http://127.0.0.1:9", "d1")
    assert client.get("/v1/models").status_code == 503
    stage.deploy("support", url, "d2")
    answer = client.get("/v1/models")
    assert [model["id"] for model in answer.json()["data"]] == ["support"]
    assert answer.headers["x-model-digest"] == "d2"


def test_nothing_deployed_and_a_dead_server_are_said_plainly(stage: Stage) -> None:
    client = stage.client()
    for answer in (client.get("/v1/models"), client.post("/v1/chat/completions", json={})):
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            503, "Nothing is deployed: a model has to pass its gates first.",
        )  # fmt: skip
    assert client.get("/health").status_code == 503
    stage.deploy("task_api", "http://127.0.0.1:9", "d1")
    answer = client.post("/v1/chat/completions", json={})
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    assert "task_api does not answer" in answer.json()["error"]["message"]
    assert client.get("/health").json()["deployments"] == {"task_api": {"model_digest": "d1", "healthy": False}}
    stage.active_path.write_text("{")
    assert client.post("/v1/chat/completions", json={}).status_code == 503


def test_health_and_deployment_describe_what_runs(stage: Stage) -> None:
    _, url = stage.upstream("task_api")
    stage.deploy("task_api", url, "d1")
    client = stage.client()
    assert client.get("/health").json() == {
        "status": "ok", "deployments": {"task_api": {"model_digest": "d1", "healthy": True}},
    }  # fmt: skip
    described = client.get("/deployment").json()["task_api"]
    assert (described["active"]["model_digest"], described["previous"]) == ("d1", None)


def test_paths_that_change_what_is_served_or_leave_v1_do_not_pass(stage: Stage) -> None:
    upstream, url = stage.upstream("task_api")
    stage.deploy("task_api", url, "d1")
    client = stage.client()
    for path in ("/v1/load_lora_adapter", "/v1/%2e%2e/metrics", "/v1/a//b", "/metrics", "/v1/a/%2E/b"):
        assert client.post(path, json={"model": "task_api"}).status_code in (404, 405), path
    assert client.delete("/v1/models/task_api").status_code == 405
    assert upstream.bodies == []


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_refused(stage: Stage, declared: bool) -> None:
    upstream, url = stage.upstream("task_api")
    stage.deploy("task_api", url, "d1")
    large = b"x" * (MAX_BODY_BYTES + 1)
    content = large if declared else iter([large[:1000], large])
    assert stage.client().post("/v1/chat/completions", content=content).status_code == 413
    assert upstream.bodies == []


def test_a_client_over_its_limit_is_told_when_to_come_back(stage: Stage) -> None:
    _, url = stage.upstream("task_api")
    stage.deploy("task_api", url, "d1")
    client = stage.client(requests_per_minute=2)
    statuses = [client.post("/v1/chat/completions", json={"model": "task_api"}).status_code for _ in range(2)]
    over = client.get("/v1/models")
    assert [*statuses, over.status_code] == [200, 200, 429]
    assert 1 <= int(over.headers["retry-after"]) <= 60
    assert client.get("/health").status_code == 200


def test_the_limit_is_kept_for_each_client_and_forgets_after_a_minute() -> None:
    now = [0.0]
    limit = RateLimit(2, clock=lambda: now[0])
    assert [limit.wait_s("a"), limit.wait_s("a"), limit.wait_s("b")] == [0, 0, 0]
    now[0] = 20.0
    assert limit.wait_s("a") == 40.0
    now[0] = 60.0
    assert limit.wait_s("a") == 0


def test_keys_are_needed_once_one_was_made_and_are_stored_hashed(stage: Stage) -> None:
    _, url = stage.upstream("task_api")
    stage.deploy("task_api", url, "d1")
    client = stage.client(requests_per_minute=2)
    file = stage.active_path.with_name("api_keys.json")
    keys = ApiKeys(file)
    ann, bob = keys.add("ann"), keys.add("bob")
    assert ann not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0

    def post(key: str | None) -> int:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return client.post("/v1/chat/completions", json={"model": "task_api"}, headers=headers).status_code

    assert [post(None), post("tk-wrong"), post("")] == [401, 401, 401]
    assert client.get("/deployment").status_code == 401
    # The limit belongs to the key: one client's requests do not use up another's.
    assert [post(ann), post(ann), post(ann), post(bob)] == [200, 200, 429, 200]
    file.write_text(json.dumps({**json.loads(file.read_text()), "eve": "schlüssel", "mal": "\ud800"}))
    assert [post("tk-wrong"), post(bob)] == [401, 200]
    file.write_text("[]")
    assert post(bob) == 503


def test_a_client_that_leaves_ends_the_upstream_request(stage: Stage) -> None:
    upstream, url = stage.upstream("task_api")
    stage.deploy("task_api", url, "d1")
    with pytest.raises(httpx.ReadTimeout):
        stage.client().post("/v1/chat/completions", json={"model": "task_api", "wait": True}, timeout=0.5)
    assert upstream.left.wait(5)


def test_a_client_that_leaves_in_the_middle_of_a_stream_ends_it_upstream(stage: Stage) -> None:
    upstream, url = stage.upstream("task_api")
    stage.deploy("task_api", url, "d1")
    asked = {"model": "task_api", "stream": "endless"}
    with stage.client().stream("POST", "/v1/chat/completions", json=asked) as answer:
        # Kept: the connection is closed together with the iterator.
        chunks = answer.iter_text()
        assert next(chunks).startswith("data: more")
        assert not upstream.left.is_set()
    assert upstream.left.wait(5)


def test_neither_bodies_nor_keys_are_logged(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    _, url = stage.upstream("task_api")
    stage.deploy("task_api", url, "d1")
    key = ApiKeys(stage.active_path.with_name("api_keys.json")).add("ann")
    with caplog.at_level(logging.INFO):
        stage.client().post(
            "/v1/chat/completions?token=hidden", json={"model": "task_api", "messages": "private words"},
            headers={"authorization": f"Bearer {key}"},
        )  # fmt: skip
        time.sleep(0.1)
    logged = [record.getMessage() for record in caplog.records if record.name == "taskagent.gateway"]
    assert len(logged) == 1
    assert "POST '/v1/chat/completions' 200" in logged[0]
    assert logged[0].endswith("'key ann'")
    for secret in ("private", "hidden", key):
        assert secret not in logged[0]
