"""Names in the asset graph: every domain has the same stages, under its own prefix."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import dagster as dg

from taskagent_platform.artifacts import code_version
from taskagent_platform.domains.base import Domain

OWNER = "team:tool-calling"


def asset_key(domain: Domain, name: str) -> dg.AssetKey:
    """Returns the key of a domain's asset, for example ``task_api/eval_report``."""
    return dg.AssetKey([domain.name, name])


class AssetOptions(NamedTuple):
    """What every asset of a domain declares.

    Attributes:
        name: the stage, which is also the name of its folder.
        deps: stages that it is made from.
        kinds: what it is made with; at most three, shown as icons.
        description: Markdown, shown in the catalogue.
        code: the sub-packages that decide what it is, for Dagster's staleness marks.
        pool: ``GPU_POOL`` where it computes on the accelerator; None for the others.
        on_demand: whether it looks into a model or is for the next run; a group of its own keeps it out of the main
            job, and out of what "Materialize all" makes in the domain's group.
    """

    name: str
    deps: Iterable[str]
    kinds: set[str]
    description: str
    code: tuple[str, ...]
    pool: str | None = None
    on_demand: bool = False


def domain_asset(
    domain: Domain, options: AssetOptions, check_specs: Sequence[dg.AssetCheckSpec] = ()
) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """Returns the decorator that makes a function one of a domain's assets.

    Args:
        domain: whose asset; its name is the prefix of the key, and the group.
        options: what it declares.
        check_specs: checks that the function itself evaluates.
    """
    return dg.asset(
        key=asset_key(domain, options.name),
        deps=[asset_key(domain, dep) for dep in options.deps],
        group_name=f"{domain.name}_on_demand" if options.on_demand else domain.name,
        kinds=options.kinds,
        owners=[OWNER],
        tags={"domain": domain.name},
        description=options.description,
        code_version=code_version(*options.code)[:16],
        check_specs=check_specs,
        pool=options.pool,
    )
