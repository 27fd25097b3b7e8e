"""The skill package: what another team needs to serve and call the deployed model."""

import dagster as dg

from taskagent_platform.defs.keys import AssetOptions, domain_asset
from taskagent_platform.defs.platform import Platform
from taskagent_platform.domains.base import Domain
from taskagent_platform.serving.gates import REPORT_KIND
from taskagent_platform.serving.skill_package import KIND, SKILL_FILE, make_skill_package
from taskagent_platform.training.merge import KIND as MERGED


def skill_package(domain: Domain) -> dg.AssetsDefinition:
    """Builds the asset."""
    options = AssetOptions(
        name=KIND,
        deps=(MERGED, REPORT_KIND, "vllm_endpoint"),
        kinds={"yaml", "docker"},
        description="The model as a skill: YAML with tools and this model's metrics, chat template, tools as JSON, "
        "model card, and a compose service for vLLM.",
        code=("serving", "domains"),
    )

    @domain_asset(domain, options)
    def package(context: dg.AssetExecutionContext, platform: Platform) -> "dg.MaterializeResult[None]":
        with platform.stage(context, domain) as stage:
            manifest, reused = make_skill_package(
                stage.settings, domain, stage.folder(MERGED), stage.folder(REPORT_KIND), stage.folder()
            )
            skill = (stage.folder() / SKILL_FILE).read_text()
            return stage.result(manifest, reused=reused, skill=dg.MetadataValue.md(f"```yaml\n{skill}\n```"))

    return package
