"""The finished agent, asked the domain's own requests through the OpenAI Agents SDK."""

from collections.abc import Iterator

import dagster as dg

from taskagent_platform.agent.session import agent_smoke as run_smoke
from taskagent_platform.defs.figures import table
from taskagent_platform.defs.keys import AssetOptions, asset_key, domain_asset
from taskagent_platform.defs.platform import Platform
from taskagent_platform.domains.base import Domain
from taskagent_platform.settings import GateSettings

NAME = "agent_smoke"
CHECK = "calls_the_right_tools"


def agent_smoke(domain: Domain) -> dg.AssetsDefinition:
    """Builds the asset."""
    options = AssetOptions(
        name=NAME,
        deps=("vllm_endpoint",),
        kinds={"openai"},
        description="The domain's own requests, asked of the endpoint through the OpenAI Agents SDK with function "
        "tools on a simulated backend: what was called, and what the agent said.",
        code=("agent", "domains"),
    )

    key = asset_key(domain, NAME)
    spec = dg.AssetCheckSpec(
        CHECK,
        asset=key,
        description="Each request calls exactly the tool that it is for. A warning where the settings let models "
        "through that choose tools worse than the specification wants.",
        blocking=True,
    )

    @domain_asset(domain, options, [spec])
    def smoke(context: dg.AssetExecutionContext, platform: Platform) -> Iterator["dg.MaterializeResult[None]"]:
        with platform.stage(context, domain) as stage:
            report = run_smoke(stage.settings, domain)
            rows = [
                (result.request, result.expected, ", ".join(result.called) or "no tool", result.answer)
                for result in report.results
            ]
            wrong = [result.request for result in report.results if not result.passed]
            lowered = stage.settings.gates.tool_selection < GateSettings().tool_selection
            judged = dg.AssetCheckResult(
                check_name=CHECK,
                asset_key=key,
                passed=report.passed,
                severity=dg.AssetCheckSeverity.WARN if lowered else dg.AssetCheckSeverity.ERROR,
                description=f"Wrong tools for: {'; '.join(wrong)}." if wrong else "Every request called its tool.",
            )
            yield dg.MaterializeResult(
                check_results=[judged],
                metadata={
                    "requests": table(("request", "expected tool", "called", "answer"), rows),
                    "passed": f"{sum(result.passed for result in report.results)}/{len(report.results)}",
                    "model_digest": report.model_digest or "not stated by the endpoint",
                },
            )

    return smoke
