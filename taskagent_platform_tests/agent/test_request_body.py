"""What is measured is what is served: the evaluation and the agent send the same bytes."""

import asyncio
from datetime import datetime
from pathlib import Path

import pytest

from taskagent_platform.agent.session import ask
from taskagent_platform.domains.task_api import DOMAIN
from taskagent_platform.evaluation.client import Endpoint, open_client, run_case
from taskagent_platform.evaluation.suite import Case
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform_tests.agent.scripted_server import ScriptedServer, call
from taskagent_platform_tests.serving.fake_server import serve

NOW = datetime(2024, 1, 15, 9)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    return load_settings(profile="smoke", evaluation={"max_turns": 6})


def _script() -> ScriptedServer:
    return ScriptedServer(
        [call("create_project", name="Café Zürich"), call("list_tasks", tags=["urgent", "home"])],
        [call("create_task", title='say "hi"', project_id="proj_004"), call("complete_task", task_id="no such task")],
        [call("list_tasks"), call("delete_task", task_id="task_001"), call("create_task", title="after it")],
        ("Let me look.", [call("get_calendar", start_date="2024-01-15")]),
        "All done — enjoy!",
    )


def test_every_body_of_a_conversation_is_the_same_byte_for_byte(settings: Settings) -> None:
    agent, evaluation = _script(), _script()
    request = "Create a project called Café Zürich, then plan it…"
    with serve(agent.app) as url:
        ask(settings, DOMAIN, request, now=NOW, base_url=f"{url}/v1", echo=lambda line: None, yes=True)
    case = Case("1", "multi_tool_chains", request, "", (), True, NOW, "default", ())
    with serve(evaluation.app) as url:
        endpoint = Endpoint(f"{url}/v1", "task_api", settings.serving.max_tokens)

        async def run() -> None:
            async with open_client(endpoint) as client:
                await run_case(client, endpoint, DOMAIN, DOMAIN.openai_tools(), case, max_turns=6)

        asyncio.run(run())
    assert len(agent.bodies) == len(evaluation.bodies) == 5
    for number, (sent, measured) in enumerate(zip(agent.bodies, evaluation.bodies, strict=True)):
        assert sent == measured, f"request {number}"
