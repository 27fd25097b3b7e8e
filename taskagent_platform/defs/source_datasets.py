"""The source datasets: generated from the domain, every example verified and executed."""

import dagster as dg

from taskagent_platform.data.distribution import MIN_FOR_EACH_TOOL, Distribution
from taskagent_platform.data.source import make_source
from taskagent_platform.defs.figures import usage_plot
from taskagent_platform.defs.keys import AssetOptions, domain_asset
from taskagent_platform.defs.platform import Platform
from taskagent_platform.domains.base import Domain


def source_dataset(domain: Domain, source: str) -> dg.AssetsDefinition:
    """Builds the asset of one source."""
    options = AssetOptions(
        name=source,
        deps=(),
        kinds={"python"},
        description=f"Training examples of the source `{source}`, made by the domain's generator. Every call is "
        "validated against its tool's schema and executed on the simulated backend.",
        code=("data", "domains"),
    )

    @domain_asset(domain, options)
    def dataset(context: dg.AssetExecutionContext, platform: Platform) -> "dg.MaterializeResult[None]":
        with platform.stage(context, domain) as stage:
            manifest, reused = make_source(stage.settings, domain, source, stage.folder())
            found = Distribution.model_validate(manifest.details["distribution"])
            return stage.result(
                manifest,
                reused=reused,
                examples=found.total,
                distribution=dg.MetadataValue.md(found.table()),
                tool_usage=usage_plot(found.tool_usage, MIN_FOR_EACH_TOOL),
            )

    return dataset
