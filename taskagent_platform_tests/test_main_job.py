"""The main job for real: a tiny model is trained, merged, served by vLLM, measured, gated and deployed.

One home folder, one domain that a tiny model can learn, one story from the first interrupted run to the last stop. Each
test leaves the home folder as the next one expects it.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pytest

from taskagent_platform.agent.state import stored_backend
from taskagent_platform.artifacts import MANIFEST_NAME, read_manifest
from taskagent_platform.defs.domain import domain_definitions
from taskagent_platform.defs.instance import open_instance
from taskagent_platform.defs.platform import Platform
from taskagent_platform.defs.tracking import MODEL_TAG, Tracking, store_uri
from taskagent_platform.serving.active import active_file, read_active
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform_tests.switch_domain import ROOMS, SWITCHES
from taskagent_platform_tests.switch_home import left_over, started_here, switch_home, taskagent

pytestmark = pytest.mark.timeout(1800)

DATA = {"STRUCTURED_OUTPUTS": "230", "FUNCTION_CALLING": "270", "MULTI_TOOL": "205"}
# What a tiny model passes once it has learned anything of its domain.
LOW_GATES = {"TOOL_SELECTION": "0.3", "ARGUMENT_EXTRACTION": "0.3", "JSON_VALIDITY": "0.5", "MULTI_TOOL": "0.2"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables that every process of the story runs with."""
    domain = "taskagent_platform_tests.switch_domain:SWITCHES"
    with switch_home(tmp_path_factory.mktemp("main_job"), domain, DATA) as made:
        yield made


@pytest.fixture
def settings(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def low(gates: dict[str, str] = LOW_GATES) -> dict[str, str]:
    return {f"TASKAGENT_GATES__{name}": value for name, value in gates.items()}


def run_assets(selection: dg.AssetSelection, run_config: dict[str, Any] | None = None) -> dg.ExecuteInProcessResult:
    """Runs a part of the graph on the story's own instance, as somebody may in Dagster's page."""
    definitions = dg.Definitions.merge(
        domain_definitions(SWITCHES),
        dg.Definitions(
            resources={"platform": Platform(), "tracking": Tracking()},
            executor=dg.in_process_executor,
            jobs=[dg.define_asset_job("part", selection=selection)],
        ),
    )
    with open_instance(load_settings()) as instance:
        job = definitions.resolve_job_def("part")
        return job.execute_in_process(instance=instance, run_config=run_config, raise_on_error=False)


def failure_of(result: dg.ExecuteInProcessResult, asset: str) -> str:
    data = result.failure_data_for_node(f"{SWITCHES.name}__{asset}")
    assert data is not None
    assert data.user_failure_data is not None, data.error
    return data.user_failure_data.description or ""


def asset(name: str) -> dg.AssetSelection:
    return dg.AssetSelection.keys([SWITCHES.name, name])


def is_deployed(settings: Settings) -> bool:
    return SWITCHES.name in read_active(active_file(settings)).domains


def test_an_interrupted_demo_leaves_no_process_and_nothing_half_made(environment, settings):
    demo = subprocess.Popen(
        [sys.executable, "-u", "-m", "taskagent_platform.cli", "demo"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Who starts the tests in the background of a script hands an ignored Ctrl-C down to them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert demo.stdout is not None
    lines = []
    for line in demo.stdout:
        lines.append(line)
        if "base_eval_report: running (model server loading" in line:
            demo.send_signal(signal.SIGINT)
    assert demo.wait(timeout=120) == 130, "".join(lines)
    assert any(re.match(r"Profile smoke, domain switches: about ", line) for line in lines)
    assert left_over(environment) == []
    folder = settings.folder(SWITCHES.name)
    assert not list(folder.glob(".*.partial"))
    for made in folder.iterdir():
        if (made / MANIFEST_NAME).exists():
            read_manifest(made, verify=True)
    assert not (folder / "base_eval_report").exists()
    with open_instance(settings) as instance:
        assert [run.status for run in instance.get_runs()] == [dg.DagsterRunStatus.CANCELED]


def test_a_model_that_fails_its_gates_is_not_deployed(environment, settings):
    done = taskagent(environment, "demo")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "base_model: reused" in done.stdout
    assert re.search(r"^TRAINING DATASET  switches\nexamples +\d+$", done.stdout, re.MULTILINE)
    assert "OVERALL: FAIL" in done.stdout
    assert "Gate argument_extraction blocks the model" in done.stdout
    assert re.search(
        r"Argument extraction is \d+\.\d% and must be greater than 90\.0%: \d+\.\d points short", done.stdout
    )
    assert "Nothing was deployed." in done.stdout
    assert not is_deployed(settings)
    assert left_over(environment) == []


def test_it_is_not_deployed_by_the_endpoint_alone(settings):
    result = run_assets(asset("vllm_endpoint"))
    assert not result.success
    assert "Argument extraction" in failure_of(result, "vllm_endpoint")
    assert not is_deployed(settings)


def test_it_is_not_deployed_without_checks(environment, settings):
    # What comes after the endpoint brings a check of its own, which cannot be left out.
    result = run_assets(asset("vllm_endpoint").upstream().without_checks())
    assert not result.success
    made = {event.asset_key.path[1] for event in result.get_asset_materialization_events() if event.asset_key}
    assert "eval_report" in made
    assert "Argument extraction" in failure_of(result, "vllm_endpoint")
    assert not is_deployed(settings)
    assert left_over(environment) == []


def test_a_swapped_model_is_not_deployed_even_where_the_gates_are_low(settings, monkeypatch):
    for name, value in low().items():
        monkeypatch.setenv(name, value)
    merged = settings.folder(SWITCHES.name) / "merged_model"
    kept = merged.with_name("kept")
    shutil.copytree(merged, kept)
    # Another finished artifact in the same place: the weights of the base model, with a manifest of their own.
    weights = settings.folder(SWITCHES.name) / "base_model" / "model.safetensors"
    manifest = json.loads((merged / MANIFEST_NAME).read_text())
    manifest["files"]["model.safetensors"] = read_manifest(weights.parent).files["model.safetensors"]
    shutil.copyfile(weights, merged / "model.safetensors")
    try:
        refused = failure_of(run_assets(asset("vllm_endpoint")), "vllm_endpoint")
        assert "does not match its manifest" in refused
        (merged / MANIFEST_NAME).write_text(json.dumps(manifest))
        refused = failure_of(run_assets(asset("vllm_endpoint")), "vllm_endpoint")
        assert read_manifest(kept).digest[:12] in refused, "the report is of the other model"
    finally:
        shutil.rmtree(merged)
        kept.rename(merged)
    assert not is_deployed(settings)


def test_a_model_that_passes_its_gates_is_deployed_and_answers(environment, settings):
    done = taskagent(environment, "demo", **low())
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("training_dataset", "base_model", "lora_adapter", "merged_model", "eval_report"):
        assert f"{stage}: reused" in done.stdout
    assert "OVERALL: PASS" in done.stdout
    url = f"http://127.0.0.1:{environment['TASKAGENT_SERVING__PORT']}/v1"
    assert url in done.stdout
    assert "taskagent ask" in done.stdout
    with httpx.Client(trust_env=False, timeout=120) as client:
        models = client.get(f"{url}/models").json()["data"]
        assert [model["id"] for model in models] == [SWITCHES.name]
        # The command that the summary prints, with the file that it names.
        request = re.search(r"-d @(\S+)", done.stdout)
        assert request is not None
        body = json.loads(Path(request[1]).read_text())
        body["messages"][-1]["content"] = "Switch on the kitchen lamp and turn off the hall lamp"
        answer = client.post(f"{url}/chat/completions", json=body)
        calls = answer.json()["choices"][0]["message"]["tool_calls"]
        assert {call["function"]["name"] for call in calls} <= {tool.name for tool in SWITCHES.tools}
        assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)
        digest = read_manifest(settings.folder(SWITCHES.name) / "merged_model").digest
        assert answer.headers["x-model-digest"] == digest
    assert "answers" in taskagent(environment, "status").stdout


def test_the_run_is_in_mlflow_with_its_curve_and_its_figures(settings):
    from mlflow import MlflowClient

    client = MlflowClient(store_uri(settings))
    experiment = client.get_experiment_by_name(SWITCHES.name)
    assert experiment is not None
    digest = read_manifest(settings.folder(SWITCHES.name) / "lora_adapter").digest
    runs = client.search_runs([experiment.experiment_id], filter_string=f"tags.`{MODEL_TAG}` = '{digest}'")
    assert len(runs) == 1
    assert runs[0].info.status == "FINISHED"
    steps = [metric.step for metric in client.get_metric_history(runs[0].info.run_id, "loss")]
    assert len(steps) > 5
    assert steps == sorted(steps)
    assert runs[0].data.metrics["eval.tool_selection"] > 0.3
    assert runs[0].data.params["rank"] == "32"


def test_the_live_curve_and_the_tables_are_in_dagster(settings):
    with open_instance(settings) as instance:
        observed = instance.fetch_observations(dg.AssetKey([SWITCHES.name, "lora_adapter"]), limit=100).records
        assert any("loss" in record.asset_observation.metadata for record in observed if record.asset_observation)
        made = instance.get_latest_materialization_event(dg.AssetKey([SWITCHES.name, "lora_adapter"]))
        assert made is not None
        assert made.asset_materialization is not None
        picture = made.asset_materialization.metadata["loss_curve"].value
        assert str(picture).startswith("![training and evaluation loss by step](data:image/png;base64,")
        smoke = instance.get_latest_materialization_event(dg.AssetKey([SWITCHES.name, "agent_smoke"]))
        assert smoke is not None
        assert smoke.asset_materialization is not None
        assert SWITCHES.agent_requests[0][0] in str(smoke.asset_materialization.metadata["requests"].value)


def test_a_second_demo_reuses_everything_and_says_so(environment):
    before = {process.pid for process in started_here(environment)}
    begin = time.monotonic()
    done = taskagent(environment, "demo", **low())
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Up to date and reused: .*eval_report", done.stdout)
    assert "last made here" in done.stdout
    assert time.monotonic() - begin < 120
    assert {process.pid for process in started_here(environment)} == before, "the endpoint goes on as it was"


def test_the_agent_asks_before_it_destroys(environment, settings):
    done = taskagent(environment, "ask", "Remove the kitchen lamp", "--now", "2024-01-15T09:00")
    # What a tiny model calls may be wrong; that nothing is destroyed without a word may not.
    assert done.stdout.strip(), done.stderr
    assert done.returncode == ("refused" in done.stdout)
    assert ("remove_lamp(" not in done.stdout) or "refused: there is no terminal to ask on" in done.stdout
    assert set(stored_backend(settings, SWITCHES).snapshot()) == set(ROOMS)


def test_stop_ends_everything(environment):
    assert started_here(environment)
    done = taskagent(environment, "stop")
    assert "stopped gateway" in done.stdout
    assert "stopped server of switches" in done.stdout
    assert left_over(environment) == []


def test_an_override_needs_its_reason_and_is_on_record(environment, settings):
    config = {"ops": {f"{SWITCHES.name}__vllm_endpoint": {"config": {"override_reason": "shown to a visitor"}}}}
    result = run_assets(asset("vllm_endpoint"), config)
    assert result.success
    made = result.asset_materializations_for_node(f"{SWITCHES.name}__vllm_endpoint")[0]
    assert made.metadata["override_reason"].value == "shown to a visitor"
    assert "Argument extraction" in str(made.metadata["refusals"].value)
    assert "shown to a visitor" in (active_file(settings).with_name("audit.jsonl")).read_text()
