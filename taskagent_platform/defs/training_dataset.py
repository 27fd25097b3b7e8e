"""The training dataset and the checks of what it consists of."""

from collections.abc import Iterator

import dagster as dg

from taskagent_platform.data.distribution import MIN_EXAMPLES, MIN_FOR_EACH_TOOL, SINGLE_SHARE, Distribution
from taskagent_platform.data.targeted import KIND as TARGETED
from taskagent_platform.data.targeted import usable_targeted
from taskagent_platform.data.training_dataset import KIND, make_training_dataset
from taskagent_platform.defs.figures import usage_plot
from taskagent_platform.defs.keys import AssetOptions, asset_key, domain_asset
from taskagent_platform.defs.platform import Platform
from taskagent_platform.domains.base import Domain
from taskagent_platform.settings import Settings

_LOW, _HIGH = SINGLE_SHARE
CHECKS = {
    "enough_examples": f"At least {MIN_EXAMPLES} examples.",
    "single_tool_share": f"{_LOW:.0%} to {_HIGH:.0%} of the examples make one call or none, the others several.",
    "every_tool_used": f"At least {MIN_FOR_EACH_TOOL} calls of each tool.",
    "apart_from_evaluation": "No request of the evaluation suites is trained on.",
}


def training_dataset(domain: Domain) -> dg.AssetsDefinition:
    """Builds the asset."""
    options = AssetOptions(
        name=KIND,
        deps=domain.sources,
        kinds={"python"},
        description="All sources together: verified again, without duplicates and without any request of the "
        "evaluation suites, shuffled by seed, a tenth held out by whole date blocks.",
        code=("data", "domains"),
    )

    @domain_asset(domain, options)
    def dataset(context: dg.AssetExecutionContext, platform: Platform) -> "dg.MaterializeResult[None]":
        with platform.stage(context, domain) as stage:
            sources = {name: stage.folder(name) for name in domain.sources}
            if usable_targeted(stage.folder(TARGETED), domain):
                sources[TARGETED] = stage.folder(TARGETED)
            elif stage.folder(TARGETED).exists():
                stage.say(
                    "The targeted examples were made by other code or from another state of the domain and are left "
                    "out; diagnose again."
                )
            manifest, reused = make_training_dataset(stage.settings, domain, sources, stage.folder())
            found = Distribution.model_validate(manifest.details["distribution"])
            stage.say(f"The training dataset:\n{found.table()}")
            return stage.result(
                manifest,
                reused=reused,
                distribution=dg.MetadataValue.md(found.table()),
                tool_usage=usage_plot(found.tool_usage, MIN_FOR_EACH_TOOL),
                **{name: value for name, value in manifest.details.items() if isinstance(value, int)},
            )

    return dataset


def training_dataset_checks(domain: Domain) -> dg.AssetChecksDefinition:
    """Builds the checks of the dataset. All of them block.

    One rule decides on their severity: a size that the settings themselves rule out (the smoke profile asks for
    fewer examples than the smallest sound dataset) is a warning, which blocks nothing; everything else is an error.
    """
    key = asset_key(domain, KIND)
    specs = [
        dg.AssetCheckSpec(name, asset=key, description=description, blocking=True)
        for name, description in CHECKS.items()
    ]

    @dg.multi_asset_check(specs=specs, name=f"{domain.name}__training_dataset_checks", can_subset=True)
    def checks(context: dg.AssetCheckExecutionContext, platform: Platform) -> Iterator[dg.AssetCheckResult]:
        settings = platform.settings()
        manifest = platform.finished(settings, domain, KIND)
        found = Distribution.model_validate(manifest.details["distribution"])
        overlap = manifest.details["overlap"]
        rare = {tool: count for tool, count in found.tool_usage.items() if count < MIN_FOR_EACH_TOOL}
        small = asked_for(settings) < MIN_EXAMPLES
        size_severity = dg.AssetCheckSeverity.WARN if small else dg.AssetCheckSeverity.ERROR
        why = f" The settings ask for {asked_for(settings)} examples, so faults of size only warn." if small else ""
        results = {
            "enough_examples": dg.AssetCheckResult(
                check_name="enough_examples",
                asset_key=key,
                passed=found.total >= MIN_EXAMPLES,
                severity=size_severity,
                description=f"{found.total} examples, at least {MIN_EXAMPLES} are wanted.{why}",
                metadata={"examples": found.total, "wanted": MIN_EXAMPLES},
            ),
            "single_tool_share": dg.AssetCheckResult(
                check_name="single_tool_share",
                asset_key=key,
                passed=_LOW <= found.single_share <= _HIGH,
                severity=size_severity,
                description=f"{found.single_share:.1%} of the examples make one call or none.{why}",
                metadata={"single_tool": round(found.single_share, 4), "multi_tool": round(1 - found.single_share, 4)},
            ),
            "every_tool_used": dg.AssetCheckResult(
                check_name="every_tool_used",
                asset_key=key,
                passed=not rare,
                severity=size_severity,
                description=f"Too few calls: {rare}.{why}" if rare else "Every tool is called often enough.",
                metadata=dict(found.tool_usage),
            ),
            "apart_from_evaluation": dg.AssetCheckResult(
                check_name="apart_from_evaluation",
                asset_key=key,
                passed=not overlap,
                description=f"Trained on and evaluated: {overlap}" if overlap else "No request is in both.",
                metadata={"overlap": len(overlap), "dropped": manifest.details["overlaps_dropped"]},
            ),
        }
        for selected in context.selected_asset_check_keys:
            yield results[selected.name]

    return checks


def asked_for(settings: Settings) -> int:
    """Returns how many examples the settings ask for, all sources together."""
    return settings.data.structured_outputs + settings.data.function_calling + settings.data.multi_tool
