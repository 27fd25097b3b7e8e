"""The skill package: all that another team needs to serve a judged model with vLLM and to call it."""

import importlib.metadata
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from taskagent_platform.artifacts import (
    MANIFEST_NAME,
    Manifest,
    find_artifact,
    new_artifact,
    read_manifest,
)
from taskagent_platform.domains.base import Domain
from taskagent_platform.domains.version import version_with
from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.gate import LATENCY_GATE, GateResult
from taskagent_platform.serving.active import active_file, model_name, read_active
from taskagent_platform.serving.deployments import MODEL_KIND, copy_model
from taskagent_platform.serving.gates import REPORT_KIND, judge
from taskagent_platform.settings import Settings

if TYPE_CHECKING:
    from taskagent_platform.evaluation.report import EvalReport

KIND = "skill_package"
SKILL_FILE = "skill.yaml"
COMPOSE_FILE = "compose.yaml"
TOOLS_FILE = "tools.json"
REQUEST_FILE = "request.json"
CARD_FILE = "README.md"
TEMPLATE_FILE = "chat_template.jinja"
MODEL_MANIFEST_FILE = "model_manifest.json"
MODEL_FOLDER = "model"
CAPABILITIES = ("tool-calling", "multi-tool-orchestration", "json-structured-output")
# The release that the gpu extra pins. Goes up together with it.
VLLM_IMAGE = "vllm/vllm-openai:v0.32.0"
_CONTAINER_MODEL = "/model"
_CONTAINER_PORT = 8000


def make_skill_package(
    settings: Settings, domain: Domain, merged_folder: Path, report_folder: Path, out_folder: Path
) -> tuple[Manifest, bool]:
    """Makes the skill package of a model that its gates let through.

    The folder holds the model, ``skill.yaml`` (what it is, its tools, the figures of exactly this model's report),
    ``compose.yaml`` (vLLM in a container), ``tools.json``, ``chat_template.jinja``, ``request.json`` (a first request),
    a model card, and the model's own manifest.

    Args:
        settings: the gates, and the name that the model is served under.
        domain: the domain.
        merged_folder: the ``merged_model`` artifact.
        report_folder: the ``eval_report`` artifact of exactly this model.
        out_folder: where the package goes.

    Returns:
        The manifest, and whether the package was there already, made from the same.

    Raises:
        PlatformError: the gates refuse the model and no override deployed it; says why.
    """
    from taskagent_platform.evaluation.report import load_report

    model = read_manifest(merged_folder, kind=MODEL_KIND, verify=True)
    verdict = judge(settings, domain, model, report_folder)
    override = _override_reason(settings, domain, model.digest)
    if verdict.refusals and (override is None or verdict.report_digest is None):
        reasons = "\n".join(f"- {refusal}" for refusal in verdict.refusals)
        raise PlatformError(f"Model {model.digest[:12]} of {domain.name} is not packaged:\n{reasons}")
    report = load_report(report_folder)
    made_from: dict[str, Any] = {
        "kind": KIND,
        "inputs": {MODEL_KIND: model.digest, REPORT_KIND: verdict.report_digest or ""},
        "settings": {
            "model_name": model_name(settings, domain.name),
            "max_model_len": settings.serving.max_model_len,
            "max_tokens": settings.serving.max_tokens,
            "gates": settings.gates.model_dump(),
            "override_reason": override if verdict.refusals else None,
        },
        "code_version": version_with(domain, "serving", "evaluation"),
    }
    found = find_artifact(out_folder, **made_from)
    if found is not None:
        return found, True
    skill = _skill(settings, domain, model, report, verdict.gates, made_from["settings"]["override_reason"])
    with new_artifact(out_folder, **made_from) as scratch:
        copy_model(merged_folder, scratch / MODEL_FOLDER)
        # An artifact has one manifest of that name, its own; the model's tells what the model was made from.
        (scratch / MODEL_FOLDER / MANIFEST_NAME).rename(scratch / MODEL_MANIFEST_FILE)
        (scratch / TEMPLATE_FILE).write_text((merged_folder / TEMPLATE_FILE).read_text())
        (scratch / SKILL_FILE).write_text(_yaml(skill))
        (scratch / COMPOSE_FILE).write_text(_yaml(_compose(settings, domain)))
        (scratch / TOOLS_FILE).write_text(_json(domain.openai_tools()))
        (scratch / REQUEST_FILE).write_text(_json(_request(settings, domain)))
        (scratch / CARD_FILE).write_text(_card(merged_folder, skill))
    return read_manifest(out_folder, kind=KIND), False


def _skill(
    settings: Settings,
    domain: Domain,
    model: Manifest,
    report: "EvalReport",
    gates: tuple[GateResult, ...],
    override: str | None,
) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for gate in gates:
        if gate.name in report.metrics and gate.interval is not None and gate.value is not None:
            low, high = gate.interval
            metrics[gate.name] = {
                "value": round(gate.value, 4), "n": gate.n, "interval_95": [round(low, 4), round(high, 4)],
                "target": f"> {gate.target:g}", "passed": gate.passed,
            }  # fmt: skip
    if report.latency is not None:
        latency = next(gate for gate in gates if gate.name == LATENCY_GATE)
        metrics["latency_ms"] = {
            "p50": round(report.latency.p50_ms), "p95": round(report.latency.p95_ms), "n": report.latency.requests,
            "budget_p95": round(latency.target), "specification_p95": round(settings.gates.latency_target_ms),
            "passed": latency.passed,
        }  # fmt: skip
    hardware = report.hardware
    skill: dict[str, Any] = {
        "name": f"{domain.name.replace('_', '-')}-agentic-backend",
        "version": f"{_package_version()}+{model.digest[:8]}",
        "description": f"A fine-tuned model that chooses and calls the tools of {domain.name} for an agent: it picks "
        "the tool, takes the arguments from natural language, and orchestrates several steps.",
        "model": {
            "path": f"./{MODEL_FOLDER}",
            "format": "safetensors",
            "base": _base_model(settings, settings.folder(domain.name) / "base_model", model),
            "digest": model.digest,
            "served_name": model_name(settings, domain.name),
        },
        "capabilities": list(CAPABILITIES),
        "tools_supported": [tool.name for tool in domain.tools],
        "tools_to_confirm": [tool.name for tool in domain.tools if tool.destructive],
        "metrics": metrics,
        "measured": {
            "hardware": ", ".join(hardware.gpus) or f"{hardware.cores} cores of {hardware.processor}",
            "started": report.started.isoformat(timespec="seconds"),
            "suite_digest": report.suite_digest,
            "settings": dict(report.settings),
        },
    }
    if override is not None:
        skill["gates_overridden"] = override
    return skill


def _compose(settings: Settings, domain: Domain) -> dict[str, Any]:
    """Returns a compose file that serves the package's model with vLLM on one NVIDIA GPU."""
    return {
        "services": {
            "vllm": {
                "image": VLLM_IMAGE,
                # Said in full: the image's own entry point differs between releases.
                "entrypoint": ["python3", "-m", "vllm.entrypoints.openai.api_server"],
                "command": [
                    "--model", _CONTAINER_MODEL, "--served-model-name", model_name(settings, domain.name),
                    "--host", "0.0.0.0", "--port", str(_CONTAINER_PORT),
                    "--max-model-len", str(settings.serving.max_model_len), "--dtype", settings.serving.dtype,
                    "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
                    "--chat-template", f"{_CONTAINER_MODEL}/{TEMPLATE_FILE}", "--enable-prefix-caching",
                ],
                "volumes": [f"./{MODEL_FOLDER}:{_CONTAINER_MODEL}:ro"],
                # On the host it is reached from this machine alone: the server has no authentication of its own.
                "ports": [f"127.0.0.1:{_CONTAINER_PORT}:{_CONTAINER_PORT}"],
                "environment": {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
                "ipc": "host",
                "restart": "unless-stopped",
                "healthcheck": {
                    "test": ["CMD", "curl", "--fail", "--silent", f"http://127.0.0.1:{_CONTAINER_PORT}/health"],
                    "interval": "10s", "timeout": "5s", "retries": 3, "start_period": "10m",
                },
                "deploy": {
                    "resources": {
                        "reservations": {"devices": [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]}
                    }
                },
            }
        }
    }  # fmt: skip


def _request(settings: Settings, domain: Domain) -> dict[str, Any]:
    """Returns the body of a first request, as the agent and the evaluation send it."""
    from taskagent_platform.evaluation.client import request_body
    from taskagent_platform.evaluation.suite import DEFAULT_NOW

    system = domain.system_messages(datetime.fromisoformat(DEFAULT_NOW))
    messages = [*system, {"role": "user", "content": domain.agent_requests[0][0]}]
    name = model_name(settings, domain.name)
    return request_body(name, messages, domain.openai_tools(), max_tokens=settings.serving.max_tokens)


def _card(merged_folder: Path, skill: Mapping[str, Any]) -> str:
    card = merged_folder / CARD_FILE
    written = card.read_text().rstrip() if card.exists() else f"# {skill['name']}"
    rows = []
    for name, metric in skill["metrics"].items():
        if name == "latency_ms":
            figures = (
                f"p95 {metric['p95']} ms on {skill['measured']['hardware']}",
                str(metric["n"]),
                "",
                (f"< {metric['budget_p95']} ms (specification: < {metric['specification_p95']} ms)"),
            )
        else:
            low, high = metric["interval_95"]
            figures = f"{metric['value']:.1%}", str(metric["n"]), f"{low:.1%} to {high:.1%}", metric["target"]
        rows.append("| " + " | ".join((name, *figures)) + " |")
    overridden = (
        f"\nThe gates refused this model; it was deployed for this reason: {skill['gates_overridden']}\n"
        if "gates_overridden" in skill
        else ""
    )
    confirm = ", ".join(f"`{name}`" for name in skill["tools_to_confirm"])
    caution = f"\nAsk a person before executing {confirm}.\n" if confirm else ""
    return f"""{written}

## Evaluation
Measured as it is served, on the suite `{skill["measured"]["suite_digest"][:12]}`.

| metric | value | n | 95 % interval | target |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}
{overridden}
## Use
```
docker compose up --detach --wait
curl --header 'content-type: application/json' --data @{REQUEST_FILE} \\
  http://127.0.0.1:{_CONTAINER_PORT}/v1/chat/completions
```
Put the present moment into the date block of the system message, and execute the calls of the answer yourself.
{caution}"""


def _override_reason(settings: Settings, domain: Domain, digest: str) -> str | None:
    deployed = read_active(active_file(settings)).domains.get(domain.name)
    if deployed is None or deployed.active.model_digest != digest:
        return None
    return deployed.active.override_reason


def _base_model(settings: Settings, base_folder: Path, model: Manifest) -> str:
    """Returns what the model was made from, as the base model's artifact names it where it is still the same one."""
    try:
        base = read_manifest(base_folder, kind="base_model")
    except PlatformError:
        return settings.base_model.source
    source = str(base.details.get("source", settings.base_model.source))
    return source if base.digest in model.inputs.values() else settings.base_model.source


def _package_version() -> str:
    try:
        return importlib.metadata.version("taskagent-platform")
    except importlib.metadata.PackageNotFoundError:
        return "0.0.0"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
