"""The base model, as a folder that training and serving read."""

import dagster as dg

from taskagent_platform.artifacts import code_version, find_artifact
from taskagent_platform.defs.keys import AssetOptions, domain_asset
from taskagent_platform.defs.platform import Platform
from taskagent_platform.domains.base import Domain
from taskagent_platform.training.base_model import KIND, base_model_settings, prepare_base_model


def base_model(domain: Domain) -> dg.AssetsDefinition:
    """Builds the asset."""
    options = AssetOptions(
        name=KIND,
        deps=(),
        kinds={"pytorch", "huggingface"},
        description="The model that is fine-tuned: weights, tokenizer, our chat template, generation settings.",
        code=("training",),
    )

    @domain_asset(domain, options)
    def model(context: dg.AssetExecutionContext, platform: Platform) -> "dg.MaterializeResult[None]":
        with platform.stage(context, domain) as stage:
            folder = stage.folder()
            found = find_artifact(
                folder,
                kind=KIND,
                inputs={},
                settings=base_model_settings(stage.settings),
                code_version=code_version("training"),
            )
            manifest = found or prepare_base_model(stage.settings, folder)
            return stage.result(manifest, reused=found is not None, **manifest.details)

    return model
