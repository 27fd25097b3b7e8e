"""The asset graph as Dagster loads it, and what loading it costs."""

import json
import os
import subprocess
import sys
from typing import Any

import dagster as dg

from taskagent_platform.definitions import defs
from taskagent_platform.launchers.routes import GPU_POOL

GRAPH = {
    "structured_outputs": [],
    "function_calling": [],
    "multi_tool": [],
    "training_dataset": ["function_calling", "multi_tool", "structured_outputs"],
    "base_model": [],
    "base_eval_report": ["base_model"],
    "lora_adapter": ["base_model", "training_dataset"],
    "merged_model": ["base_model", "lora_adapter"],
    "eval_report": ["base_eval_report", "merged_model"],
    "vllm_endpoint": ["eval_report", "merged_model"],
    "agent_smoke": ["vllm_endpoint"],
    "skill_package": ["eval_report", "merged_model", "vllm_endpoint"],
    "failure_diagnosis": ["eval_report", "training_dataset"],
    "targeted_examples": ["failure_diagnosis"],
    "bfcl_report": ["base_model", "merged_model"],
    "training_sweep": ["base_model", "training_dataset"],
}
# The assets that the main job leaves out, by the job that makes them.
ON_DEMAND = {
    "diagnose": {"failure_diagnosis", "targeted_examples"},
    "bfcl": {"bfcl_report"},
    "sweep": {"training_sweep"},
}
# What a job on demand makes on its way, reused where the main job made it already.
ON_THE_WAY = {"sweep": {"structured_outputs", "function_calling", "multi_tool", "training_dataset", "base_model"}}
# The assets that load a model: no two of them at a time on one accelerator.
IN_GPU_POOL = {
    "base_eval_report", "lora_adapter", "merged_model", "eval_report", "vllm_endpoint", "bfcl_report", "training_sweep",
}  # fmt: skip
# Each check, and whether it blocks what comes after.
CHECKS = {
    "training_dataset": {
        "enough_examples": True,
        "single_tool_share": True,
        "every_tool_used": True,
        "apart_from_evaluation": True,
    },
    "lora_adapter": {"converged": False, "no_divergence": True},
    "merged_model": {"answers_as_base_and_adapter": True},
    "eval_report": {
        "tool_selection": True,
        "argument_extraction": True,
        "json_validity": True,
        "multi_tool": True,
        "latency_p95_ms": True,
        "no_worse_than_champion": True,
    },
    "agent_smoke": {"calls_the_right_tools": True},
}
HEAVY = ("torch", "transformers", "trl", "peft", "unsloth", "vllm", "ray", "datasets", "mlflow", "matplotlib", "openai")
LOADING_CPU_S = 3.0


def test_the_graph_of_a_domain_is_the_drawn_one():
    graph = defs.resolve_asset_graph()
    found = {
        key.path[1]: sorted(parent.path[1] for parent in graph.get(key).parent_keys)
        for key in graph.get_all_asset_keys()
        if key.path[0] == "task_api"
    }
    assert found == GRAPH


def test_what_loads_a_model_shares_a_pool():
    graph = defs.resolve_asset_graph()
    keys = [key for key in graph.get_all_asset_keys() if key.path[0] == "task_api"]
    assert {key.path[1] for key in keys if graph.get(key).pools == {GPU_POOL}} == IN_GPU_POOL


def test_dagster_shows_the_domains_that_the_settings_name():
    program = (
        "from taskagent_platform.definitions import defs\n"
        "print(*sorted({key.path[0] for key in defs.resolve_asset_graph().get_all_asset_keys()}))\n"
    )

    def shown(**variables: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **variables}, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert shown() == ["task_api"]
    assert shown(TASKAGENT_MORE_DOMAINS='["customer_support"]') == ["customer_support", "task_api"]
    assert shown(TASKAGENT_DOMAIN="customer_support") == ["customer_support"]


def test_every_asset_says_what_it_is():
    for spec in defs.resolve_all_asset_specs():
        domain, name = spec.key.path
        assert spec.group_name == (f"{domain}_on_demand" if name in set().union(*ON_DEMAND.values()) else domain)
        assert spec.tags["domain"] == spec.key.path[0]
        assert spec.description
        assert spec.kinds
        assert spec.owners


def test_the_checks_and_which_of_them_block():
    found: dict[str, dict[str, bool]] = {}
    graph = defs.resolve_asset_graph()
    for spec in map(graph.get_check_spec, graph.asset_check_keys):
        if spec.asset_key.path[0] == "task_api":
            found.setdefault(spec.asset_key.path[1], {})[spec.name] = spec.blocking
            assert spec.description
    assert found == CHECKS


def test_the_job_holds_every_check_and_every_asset_but_those_for_the_next_run():
    on_demand = {name for names in ON_DEMAND.values() for name in names}
    for job, names in ON_DEMAND.items():
        selected = {key.path[1] for key in defs.resolve_job_def(job).asset_layer.selected_asset_keys}
        assert selected == names | ON_THE_WAY.get(job, set())
    layer = defs.resolve_job_def("retrain").asset_layer
    assert {key.path[1] for key in layer.selected_asset_keys} == set(GRAPH) - on_demand
    assert {(key.asset_key.path[1], key.name) for key in layer.asset_graph.asset_check_keys} == {
        (asset, name) for asset, names in CHECKS.items() for name in names
    }


def test_the_nightly_schedule_is_off_until_somebody_switches_it_on():
    schedule = defs.resolve_schedule_def("retrain_nightly")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert schedule.job_name == "retrain"


def test_an_unchanged_platform_is_not_retrained_at_night(monkeypatch, tmp_path):
    from taskagent_platform.defs.platform import FINGERPRINT_TAG, fingerprint
    from taskagent_platform.domains.registry import find_domain
    from taskagent_platform.settings import load_settings

    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")
    nightly = defs.resolve_schedule_def("retrain_nightly")
    with dg.instance_for_test() as instance:

        def evaluate() -> Any:
            return nightly.evaluate_tick(dg.build_schedule_context(instance))

        assert len(evaluate().run_requests) == 1
        instance.create_run_for_job(
            defs.resolve_job_def("retrain"),
            status=dg.DagsterRunStatus.SUCCESS,
            tags={FINGERPRINT_TAG: fingerprint(load_settings(), find_domain("task_api"))},
        )
        assert "same as in run" in evaluate().skip_message
        # Another setting that decides the outcome is a reason to retrain; another port is none.
        monkeypatch.setenv("TASKAGENT_PORTS__DAGSTER", "4999")
        assert not evaluate().run_requests
        monkeypatch.setenv("TASKAGENT_TRAINING__EPOCHS", "2")
        assert len(evaluate().run_requests) == 1


def test_loading_the_definitions_is_cheap():
    program = (
        "import json, resource, sys\n"
        "import taskagent_platform.definitions\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(json.dumps([used.ru_utime + used.ru_stime, sorted(sys.modules)]))\n"
    )
    # The first run may have to compile sources, which happens once.
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    cpu_s, modules = json.loads(done.stdout)
    assert not [name for name in modules if name.split(".")[0] in HEAVY]
    # Processor time, because a busy machine stretches the clock's.
    if not sys.dont_write_bytecode:
        assert cpu_s < LOADING_CPU_S
