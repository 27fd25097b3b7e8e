"""The asset graph of one domain: assets, checks, job, schedule and sensor from its description alone."""

import dagster as dg

from taskagent_platform.defs.agent_smoke import agent_smoke
from taskagent_platform.defs.base_model import base_model
from taskagent_platform.defs.bfcl_report import bfcl_job, bfcl_report
from taskagent_platform.defs.endpoint_sensor import endpoint_sensor
from taskagent_platform.defs.eval_report import base_eval_report, eval_report, gate_checks
from taskagent_platform.defs.failure_diagnosis import diagnose_job, failure_diagnosis, targeted_examples
from taskagent_platform.defs.lora_adapter import lora_adapter, lora_adapter_checks
from taskagent_platform.defs.merged_model import merged_model, merged_model_checks
from taskagent_platform.defs.retrain import nightly_retrain, retrain_job
from taskagent_platform.defs.skill_package import skill_package
from taskagent_platform.defs.source_datasets import source_dataset
from taskagent_platform.defs.training_dataset import training_dataset, training_dataset_checks
from taskagent_platform.defs.training_sweep import sweep_job, training_sweep
from taskagent_platform.defs.vllm_endpoint import vllm_endpoint
from taskagent_platform.domains.base import Domain

_STAGES = (
    "training_dataset", "base_model", "base_eval_report", "lora_adapter", "merged_model", "eval_report",
    "vllm_endpoint", "agent_smoke", "skill_package",
)  # fmt: skip


def stage_names(domain: Domain) -> tuple[str, ...]:
    """Returns the names of the assets that the main job makes, sources first."""
    return (*domain.sources, *_STAGES)


def domain_definitions(domain: Domain) -> dg.Definitions:
    """Builds everything that Dagster knows of a domain; asset keys begin with its name, and so do its groups."""
    return dg.Definitions(
        assets=[
            *(source_dataset(domain, source) for source in domain.sources),
            training_dataset(domain),
            base_model(domain),
            base_eval_report(domain),
            lora_adapter(domain),
            merged_model(domain),
            eval_report(domain),
            vllm_endpoint(domain),
            agent_smoke(domain),
            skill_package(domain),
            failure_diagnosis(domain),
            targeted_examples(domain),
            bfcl_report(domain),
            training_sweep(domain),
        ],
        asset_checks=[
            training_dataset_checks(domain),
            lora_adapter_checks(domain),
            merged_model_checks(domain),
            gate_checks(domain),
        ],
        jobs=[retrain_job(domain), diagnose_job(domain), bfcl_job(domain), sweep_job(domain)],
        schedules=[nightly_retrain(domain)],
        sensors=[endpoint_sensor(domain)],
    )
