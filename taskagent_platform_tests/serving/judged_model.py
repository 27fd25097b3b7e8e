"""A small domain, a merged model of a few bytes and evaluation reports of it, for tests of what may be deployed."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from taskagent_platform.artifacts import Manifest, new_artifact, read_manifest
from taskagent_platform.domains.task_api import TaskApiDomain
from taskagent_platform.evaluation.latency import Latency
from taskagent_platform.evaluation.report import (
    CaseRecord,
    EvalReport,
    Hardware,
    categories_of,
    metrics_of,
    save_report,
)
from taskagent_platform.evaluation.run import SERVED_WITH, conditions
from taskagent_platform.evaluation.suite import Case, Suites, domain_suites
from taskagent_platform.serving.gates import report_code_version
from taskagent_platform.settings import Settings

PER_LIST = 20


def write_suite(path: Path) -> None:
    """Writes a suite of ``PER_LIST`` cases in each of the four lists."""
    numbers = range(PER_LIST)
    suite = {
        "tool_selection": [{"input": f"select {n}", "expected_tool": "list_tasks", "category": "q"} for n in numbers],
        "argument_extraction": [
            {"input": f"extract {n}", "expected_tool": "create_task", "expected_args": {"title": str(n)}}
            for n in numbers
        ],
        "multi_tool_chains": [
            {"input": f"chain {n}", "expected_chain": ["create_project", "create_task"]} for n in numbers
        ],
        "abstention": [{"input": f"hello {n}", "category": "small talk"} for n in numbers],
    }
    path.write_text(json.dumps(suite))


def small_domain(folder: Path) -> TaskApiDomain:
    """Returns the Task API with a small suite of its own, in ``folder``."""
    suite = folder / "suite.json"
    write_suite(suite)

    class SmallDomain(TaskApiDomain):
        suites = (suite,)
        robustness_suites = ()

    return SmallDomain()


def make_model(settings: Settings, weights: str = "weights") -> tuple[Path, Manifest]:
    """Makes a merged model; another text of weights is another model."""
    folder = settings.folder("task_api") / "merged_model"
    with new_artifact(folder, kind="merged_model", inputs={}, settings={}, code_version="1") as scratch:
        (scratch / "model.safetensors").write_text(weights)
        (scratch / "config.json").write_text("{}")
        (scratch / "chat_template.jinja").write_text("template")
        (scratch / "README.md").write_text("# card")
    return folder, read_manifest(folder)


def make_report(
    settings: Settings,
    domain: TaskApiDomain,
    model: Manifest,
    *,
    failing: dict[str, int] | None = None,
    change: Callable[[dict[str, Any]], None] = lambda report: None,
    code_version: str | None = None,
) -> Path:
    """Makes the evaluation report of a model, perfect but for what is asked for.

    Args:
        settings: what the evaluation ran with.
        domain: whose suites.
        model: the model's manifest.
        failing: how many cases of a list fail; ``malformed`` counts unreadable calls, ``robustness`` robustness cases.
        change: changes the report's fields before it is written.
        code_version: of the code that evaluated; the present one if None.
    """
    suite, robustness = domain_suites(domain, settings.evaluation.case_limit)
    left = dict(failing or {})
    cases = []
    for case in suite.cases:
        fails = left.get(case.list_name, 0) > 0
        left[case.list_name] = left.get(case.list_name, 0) - 1
        attempted = 0 if case.list_name == "abstention" else 1
        malformed = attempted and left.get("malformed", 0) > 0
        left["malformed"] = left.get("malformed", 0) - attempted
        cases.append(_record(case, passed=not fails, attempted=attempted, valid=0 if malformed else attempted))
    hard = robustness.cases if robustness is not None else ()
    beside = [
        _record(case, passed=number >= left.get("robustness", 0), attempted=0, valid=0)
        for number, case in enumerate(hard)
    ]
    serving = settings.serving
    fields: dict[str, Any] = {
        "domain": domain.name,
        "model_name": domain.name,
        "model_digest": model.digest,
        "endpoint": "http://127.0.0.1:1/v1",
        "suite_digest": suite.digest,
        "suite_files": dict(suite.digests),
        "case_limit": suite.case_limit,
        "metrics": metrics_of(cases, settings.gates),
        "categories": categories_of(cases),
        "verdicts": {},
        "fault_types": {},
        "minefields": 0,
        "extra_reads": 0,
        "latency": Latency(requests=40, p50_ms=100, p95_ms=200, p99_ms=300),
        "latency_budget_ms": settings.gates.latency_p95_ms,
        "latency_target_ms": settings.gates.latency_target_ms,
        "cases": tuple(cases),
        "settings": {
            "profile": settings.profile, "conditions": conditions(settings, domain, Suites(suite, robustness)),
            "max_tokens": serving.max_tokens, "max_turns": settings.evaluation.max_turns,
            **{name: getattr(serving, name) for name in SERVED_WITH},
        },
        "hardware": Hardware(processor="p", cores=1, memory_gib=1, gpus=(), system="s"),
        "started": datetime.now(UTC),
        "robustness": tuple(beside),
        "robustness_digest": robustness.digest if robustness is not None else None,
        "seconds": 1.0,
        "complete": True,
    }  # fmt: skip
    change(fields)
    folder = settings.folder(domain.name) / "eval_report"
    version = code_version or report_code_version(domain)
    with new_artifact(
        folder, kind="eval_report", inputs={"merged_model": model.digest}, settings={}, code_version=version
    ) as scratch:
        save_report(EvalReport(**fields), scratch, settings.gates)
    return folder


def _record(case: Case, *, passed: bool, attempted: int, valid: int) -> CaseRecord:
    return CaseRecord(
        id=case.id, list_name=case.list_name, category=case.category, input=case.input, now="2024-01-15T09:00",
        verdict="right" if passed else "wrong_tool", passed=passed, faults=(), expected=(), got=(), text="",
        attempted=attempted, valid=valid, extra_reads=0, turns=1,
    )  # fmt: skip
