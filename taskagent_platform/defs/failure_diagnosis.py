"""What the last evaluation says about the training data, and the examples that it asks for.

Both are made on demand, by a job of their own: a gate that blocks the line must not keep its reasons from being looked
into, and what is added to the training data is for the next run to read.
"""

from typing import TYPE_CHECKING, Any

import dagster as dg

from taskagent_platform.artifacts import Manifest, code_version, find_artifact, new_artifact, read_manifest
from taskagent_platform.data.jsonl import Record, read_jsonl
from taskagent_platform.data.targeted import KIND as TARGETED
from taskagent_platform.data.targeted import make_targeted_examples
from taskagent_platform.data.training_dataset import KIND as TRAINING
from taskagent_platform.data.training_dataset import TRAIN_FILE
from taskagent_platform.defs.figures import table
from taskagent_platform.defs.keys import AssetOptions, asset_key, domain_asset
from taskagent_platform.defs.platform import Platform, Stage
from taskagent_platform.defs.retrain import job_name
from taskagent_platform.domains.base import Domain
from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.diagnosis import diagnose, diagnosis_text, load_diagnosis, save_diagnosis
from taskagent_platform.evaluation.report import load_report
from taskagent_platform.serving.gates import REPORT_KIND, judge
from taskagent_platform.training.merge import KIND as MERGED

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

KIND = "failure_diagnosis"


def failure_diagnosis(domain: Domain) -> dg.AssetsDefinition:
    """Builds the asset."""
    options = AssetOptions(
        name=KIND,
        deps=(REPORT_KIND, TRAINING),
        kinds={"python"},
        description="Which tools, arguments, lengths of chains and slices fail significantly more than the rest, how "
        "many training examples of each there are, and what to add.",
        code=("evaluation", "data"),
        on_demand=True,
    )

    @domain_asset(domain, options)
    def diagnosis(context: dg.AssetExecutionContext, platform: Platform) -> "dg.MaterializeResult[None]":
        with platform.stage(context, domain) as stage:
            made_from: dict[str, Any] = {
                "kind": KIND,
                "inputs": {name: stage.upstream(name).digest for name in (REPORT_KIND, TRAINING)},
                "settings": {},
                "code_version": code_version("evaluation", "data"),
            }
            found = find_artifact(stage.folder(), **made_from)
            if found is None:
                made = diagnose(load_report(stage.folder(REPORT_KIND)), _training(stage))
                with new_artifact(stage.folder(), **made_from) as scratch:
                    save_diagnosis(made, scratch)
            made = load_diagnosis(stage.folder())
            stage.say(diagnosis_text(made))
            rows = [
                (
                    finding.pattern, f"{finding.failed}/{finding.total}", f"{finding.rest_failed}/{finding.rest_total}",
                    f"{finding.p_value:.2g}", "yes" if finding.is_significant else "no", finding.faults,
                    "-" if finding.examples is None else finding.examples, finding.wanted,
                )
                for finding in made.findings
            ]  # fmt: skip
            header = ["pattern", "failed", "elsewhere", "p", "clear", "faults", "training examples", "to add"]
            return stage.result(
                found or read_manifest(stage.folder()),
                reused=found is not None,
                failures=made.failures,
                findings=table(header, rows),
            )

    return diagnosis


def targeted_examples(domain: Domain) -> dg.AssetsDefinition:
    """Builds the asset."""
    options = AssetOptions(
        name=TARGETED,
        deps=(KIND,),
        kinds={"python"},
        description="Examples of what the diagnosis asks for, made by the domain's generators, verified and executed; "
        "beside those of earlier rounds. The next training dataset takes them in.",
        code=("data", "domains"),
        on_demand=True,
    )

    @domain_asset(domain, options)
    def examples(context: dg.AssetExecutionContext, platform: Platform) -> "dg.MaterializeResult[None]":
        with platform.stage(context, domain) as stage:
            digest = stage.upstream(KIND).digest
            manifest = _made_for(stage, digest)
            reused = manifest is not None
            if manifest is None and not _passes(stage):
                wanted = load_diagnosis(stage.folder(KIND)).wanted
                manifest = make_targeted_examples(
                    stage.settings, domain, wanted, _training(stage), stage.folder(), diagnosis=digest
                )
            if manifest is None:
                stage.say("Nothing is added: the model passes its gates, or no clear pattern can be made more of.")
                return dg.MaterializeResult(metadata={"new": 0, "profile": stage.settings.profile})
            return stage.result(
                manifest,
                reused=reused,
                new=manifest.details["new"],
                total=manifest.details["total"],
                made=table(["pattern", "examples"], sorted(manifest.details["made"].items())),
            )

    return examples


def diagnose_job(domain: Domain) -> "UnresolvedAssetJobDefinition":
    """Builds the job that looks into the last evaluation and makes examples for the next run."""
    return dg.define_asset_job(
        diagnose_job_name(domain.name),
        selection=dg.AssetSelection.assets(*(asset_key(domain, name) for name in (KIND, TARGETED))),
        description=f"Why the last model of {domain.name} failed, and examples of it for the next run.",
        tags={"domain": domain.name},
    )


def diagnose_job_name(domain: str) -> str:
    """Returns the name of a domain's job, built as the main job's is."""
    return job_name(domain).replace("retrain", "diagnose")


def _passes(stage: Stage) -> bool:
    """Tells whether the gates pass: then the dataset stays as it is, and a run of all assets repeats itself."""
    model = read_manifest(stage.folder(MERGED), kind=MERGED)
    return not judge(stage.settings, stage.domain, model, stage.folder(REPORT_KIND)).refusals


def _training(stage: Stage) -> list[Record]:
    return list(read_jsonl(stage.folder(TRAINING) / TRAIN_FILE))


def _made_for(stage: Stage, diagnosis: str) -> Manifest | None:
    """Returns the present examples' manifest if this diagnosis asked for them already: they are not made twice."""
    try:
        manifest = read_manifest(stage.folder(), kind=TARGETED, verify=True)
    except PlatformError:
        return None
    return manifest if manifest.inputs == {KIND: diagnosis} else None
