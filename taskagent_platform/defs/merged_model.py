"""The merged model: what is served, and the check that it answers as base and adapter do."""

import dagster as dg

from taskagent_platform.artifacts import code_version, find_artifact
from taskagent_platform.defs.keys import AssetOptions, asset_key, domain_asset
from taskagent_platform.defs.platform import Platform
from taskagent_platform.domains.base import Domain
from taskagent_platform.launchers.routes import GPU_POOL
from taskagent_platform.training.base_model import KIND as BASE
from taskagent_platform.training.fine_tune import KIND as ADAPTER
from taskagent_platform.training.merge import KIND, merge, merge_settings


def merged_model(domain: Domain) -> dg.AssetsDefinition:
    """Builds the asset."""
    options = AssetOptions(
        name=KIND,
        deps=(BASE, ADAPTER),
        kinds={"pytorch", "huggingface"},
        description="Base model and adapter as one: safetensors, tokenizer, chat template and generation settings, "
        "as vLLM serves them.",
        code=("training",),
        pool=GPU_POOL,
    )

    @domain_asset(domain, options)
    def model(context: dg.AssetExecutionContext, platform: Platform) -> "dg.MaterializeResult[None]":
        with platform.stage(context, domain) as stage:
            inputs = {name: stage.upstream(name, verify=True).digest for name in (BASE, ADAPTER)}
            found = find_artifact(
                stage.folder(),
                kind=KIND,
                inputs=inputs,
                settings=merge_settings(stage.settings),
                code_version=code_version("training"),
            )
            manifest = found or merge(
                stage.settings,
                stage.folder(BASE),
                stage.folder(ADAPTER),
                stage.folder(),
                inputs,
                lambda record: stage.say(f"Merging: {record.get('stage', record)}"),
            )
            card = (stage.folder() / "README.md").read_text()
            return stage.result(
                manifest,
                reused=found is not None,
                model_card=dg.MetadataValue.md(card.split("---\n", 2)[-1]),
                **{name: value for name, value in manifest.details.items() if name != "seconds"},
            )

    return model


def merged_model_checks(domain: Domain) -> dg.AssetChecksDefinition:
    """Builds the check of the merge, which blocks."""
    key = asset_key(domain, KIND)

    @dg.asset_check(
        asset=key,
        name="answers_as_base_and_adapter",
        description="On held-out conversations the merged model's logits equal those of base + adapter.",
        blocking=True,
    )
    def check(platform: Platform) -> dg.AssetCheckResult:
        details = platform.finished(platform.settings(), domain, KIND).details
        difference, tolerance = details["logit_difference"], details["logit_tolerance"]
        return dg.AssetCheckResult(
            passed=difference <= tolerance,
            description=f"The largest difference of a logit is {difference:.1e} of the largest logit; "
            f"{tolerance:.0e} is allowed.",
            metadata={name: details[name] for name in ("logit_difference", "logit_tolerance", "argmax_agreement")},
        )

    return check
