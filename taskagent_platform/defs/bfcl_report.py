"""What fine-tuning costs in generality: the base model and the fine-tuned one on BFCL's single-turn categories.

Made on demand, by a job of its own: it judges no deployment and takes long.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from taskagent_platform.artifacts import code_version, find_artifact, new_artifact, read_manifest
from taskagent_platform.defs.eval_report import model_server
from taskagent_platform.defs.figures import table
from taskagent_platform.defs.keys import AssetOptions, asset_key, domain_asset
from taskagent_platform.defs.platform import Platform, Stage
from taskagent_platform.defs.retrain import job_name
from taskagent_platform.domains.base import Domain
from taskagent_platform.evaluation.bfcl import (
    PACKAGE,
    RESULT_FILE,
    BfclResult,
    BfclRow,
    ask_bfcl,
    install_bfcl,
    load_result,
    render_rows,
    rows_of,
)
from taskagent_platform.evaluation.client import Endpoint
from taskagent_platform.launchers.routes import GPU_POOL
from taskagent_platform.training.base_model import KIND as BASE
from taskagent_platform.training.base_model import published_model
from taskagent_platform.training.merge import KIND as MERGED

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

KIND = "bfcl_report"
TEXT_FILE = "report.txt"
_RESULT_KIND = "bfcl_result"
_CODE = tuple(f"evaluation/{name}.py" for name in ("_bfcl_payload", "answer", "bfcl", "client"))
_SERVING = ("dtype", "speculation", "max_tokens", "max_model_len")


def bfcl_report(domain: Domain) -> dg.AssetsDefinition:
    """Builds the asset."""
    options = AssetOptions(
        name=KIND,
        deps=(BASE, MERGED),
        kinds={"vllm"},
        description="The base model and the fine-tuned one, served alike, on the single-turn categories of the "
        "Berkeley Function Calling Leaderboard, judged by its own checker from its own package. "
        "It gates nothing: it shows what a narrow fine-tuning costs in generality.",
        code=_CODE,
        on_demand=True,
        pool=GPU_POOL,
    )

    @domain_asset(domain, options)
    def report(context: dg.AssetExecutionContext, platform: Platform) -> "dg.MaterializeResult[None]":
        with platform.stage(context, domain) as stage:
            base, tuned = (_result(stage, name) for name in (BASE, MERGED))
            made_from: dict[str, Any] = {
                "kind": KIND,
                "inputs": {name: read_manifest(_result_folder(stage, name)).digest for name in (BASE, MERGED)},
                "settings": {},
                "code_version": code_version(*_CODE),
            }
            rows = rows_of(base, tuned)
            text = render_rows(rows, tuned.sample)
            found = find_artifact(stage.folder(), **made_from)
            if found is None:
                with new_artifact(stage.folder(), **made_from) as scratch:
                    (scratch / TEXT_FILE).write_text(text, encoding="utf-8")
            stage.say("\n" + text)
            return stage.result(
                found or read_manifest(stage.folder()),
                reused=found is not None,
                package=PACKAGE,
                cases_of_each_category=tuned.sample or "all",
                difference_points=round(rows[-1].difference * 100, 1),
                categories=_rows_table(rows),
                unreadable_answers=table(
                    ["model", "cases", "calls that cannot be read", "too long for the server"],
                    [_unreadable(name, result) for name, result in (("base model", base), ("fine-tuned", tuned))],
                ),
                text=dg.MetadataValue.path(stage.folder() / TEXT_FILE),
            )

    return report


def bfcl_job(domain: Domain) -> "UnresolvedAssetJobDefinition":
    """Builds the job that makes the report of the models that are there."""
    return dg.define_asset_job(
        job_name(domain.name).replace("retrain", "bfcl"),
        selection=dg.AssetSelection.assets(asset_key(domain, KIND)),
        description=f"Base and fine-tuned model of {domain.name} on an external benchmark.",
        tags={"domain": domain.name},
    )


def _result(stage: Stage, name: str) -> BfclResult:
    """Returns a model's answers, those of an earlier run where model, settings and code are the same."""
    model = stage.upstream(name)
    folder = _result_folder(stage, name)
    settings = stage.settings
    made_from: dict[str, Any] = {
        "kind": _RESULT_KIND,
        "inputs": {name: model.digest},
        "settings": {
            "package": PACKAGE,
            "sample": settings.bfcl.sample,
            **{field: getattr(settings.serving, field) for field in _SERVING},
        },
        "code_version": code_version(*_CODE, "serving/server.py"),
    }
    if find_artifact(folder, **made_from) is None:
        with new_artifact(folder, **made_from) as scratch:
            measured = _measure(stage, name)
            (scratch / RESULT_FILE).write_text(measured.model_dump_json(indent=1), encoding="utf-8")
    return load_result(folder)


def _measure(stage: Stage, name: str) -> BfclResult:
    settings = stage.settings
    stage.say(f"Preparing {PACKAGE} in its own environment.")
    bfcl = install_bfcl(settings)
    cases = bfcl.cases(sample=settings.bfcl.sample)

    def on_progress(done: int, total: int) -> None:
        stage.observe({"what": name, "cases_done": done, "cases": total}, now=done == total)

    # What training added to the base model without teaching it would be held against it.
    folder = published_model(stage.folder(name))
    with model_server(stage, folder, read_manifest(folder)) as server:
        return ask_bfcl(
            bfcl,
            Endpoint(server.base_url, server.name, settings.serving.max_tokens),
            cases,
            concurrency=settings.evaluation.concurrency,
            sample=settings.bfcl.sample,
            on_progress=on_progress,
        )


def _result_folder(stage: Stage, name: str) -> Path:
    return stage.folder("bfcl_results") / name


def _rows_table(rows: list[BfclRow]) -> dg.MarkdownMetadataValue:
    header = ["category", "cases", "base model", "fine-tuned", "difference", "95 % interval", "McNemar p"]
    return table(
        header,
        [
            (
                row.category, row.base.total, f"{row.base.rate or 0:.1%}", f"{row.tuned.rate or 0:.1%}",
                f"{row.difference * 100:+.1f} points",
                f"{row.interval.low * 100:+.1f} to {row.interval.high * 100:+.1f}", f"{row.p_value:.2g}",
            )
            for row in rows
        ],
    )  # fmt: skip


def _unreadable(name: str, result: BfclResult) -> tuple[str, int, int, int]:
    cases = result.cases
    return name, len(cases), sum(case.malformed for case in cases), sum(case.too_long for case in cases)
