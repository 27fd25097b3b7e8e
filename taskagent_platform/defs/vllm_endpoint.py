"""The endpoint: the evaluated model becomes the champion, if its gates let it."""

from collections.abc import Mapping

import dagster as dg
from pydantic import Field

from taskagent_platform.defs.figures import table
from taskagent_platform.defs.keys import AssetOptions, domain_asset
from taskagent_platform.defs.platform import Platform
from taskagent_platform.domains.base import Domain
from taskagent_platform.errors import PlatformError
from taskagent_platform.launchers.routes import COMPUTE_TAG, GPU_POOL, ROUTE_TAG
from taskagent_platform.serving.active import endpoint_url
from taskagent_platform.serving.deployments import deploy
from taskagent_platform.serving.gates import REPORT_KIND
from taskagent_platform.training.merge import KIND as MERGED

NAME = "vllm_endpoint"


class EndpointConfig(dg.Config):
    """The one thing to say about a deployment."""

    override_reason: str | None = Field(
        default=None,
        description="Deploys although the gates refuse, for this written reason. It goes into the audit log and onto "
        "the endpoint's metadata. Leave it empty.",
    )


def vllm_endpoint(domain: Domain) -> dg.AssetsDefinition:
    """Builds the asset."""
    options = AssetOptions(
        name=NAME,
        deps=(MERGED, REPORT_KIND),
        kinds={"vllm"},
        description="The served champion. Trusts no check: it reads the report of exactly this model again and refuses "
        "where a gate is missing, stale, unfinished or failed. The server that was evaluated is promoted as it runs; "
        "the champion before stays ready for `taskagent rollback`.",
        code=("serving",),
        pool=GPU_POOL,
    )

    @domain_asset(domain, options)
    def endpoint(
        context: dg.AssetExecutionContext, platform: Platform, config: EndpointConfig
    ) -> "dg.MaterializeResult[None]":
        with platform.stage(context, domain) as stage:
            _refuse_foreign_route(context.run.tags)
            deployed = deploy(
                stage.settings,
                domain,
                stage.folder(MERGED),
                stage.folder(REPORT_KIND),
                override_reason=config.override_reason or None,
                on_progress=stage.say,
            )
            gates = [(g.name, g.value, g.target, "PASS" if g.passed else "FAIL") for g in deployed.gates]
            url = endpoint_url(stage.settings)
            overridden = {"override_reason": deployed.override_reason, "refusals": "\n".join(deployed.refusals)}
            stage.say(f"{deployed.model_name} {deployed.model_digest[:12]} is served at {url}.")
            return dg.MaterializeResult(
                metadata={
                    "endpoint": dg.MetadataValue.url(url),
                    "model_name": deployed.model_name,
                    "model_digest": deployed.model_digest,
                    "model_server": dg.MetadataValue.url(deployed.base_url),
                    "deployed_by": deployed.deployed_by,
                    "gates": table(("gate", "measured", "target", "result"), gates),
                    **(overridden if deployed.override_reason else {}),
                },
                data_version=dg.DataVersion(deployed.model_digest),
            )

    return endpoint


def _refuse_foreign_route(tags: Mapping[str, str]) -> None:
    """Raises PlatformError where gateway and model server would end with the container that the run is in."""
    route = tags.get(ROUTE_TAG, "").partition(":")[2]
    if route not in ("", "local"):
        raise PlatformError(
            f"A run on the route {route} deploys nothing, because gateway and model server would end with it: "
            f"materialize vllm_endpoint on the machine that is to serve, by a run with the tag {COMPUTE_TAG}: cpu, "
            "where the launcher's CPU side is local."
        )
