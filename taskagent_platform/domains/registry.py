"""The domains that are installed: every package may offer some under the entry-point group ``taskagent.domains``."""

from importlib.metadata import EntryPoint, entry_points

from taskagent_platform.domains.base import Domain
from taskagent_platform.errors import PlatformError

GROUP = "taskagent.domains"
"""An entry point of this group has the domain's name and points at a :class:`Domain` object."""


def domains() -> dict[str, Domain]:
    """Returns every installed domain by name, in the order of the names.

    Raises:
        PlatformError: one of them cannot be used; names it and its package.
    """
    return {name: _load(found) for name, found in sorted(_installed().items())}


def find_domain(name: str) -> Domain:
    """Returns an installed domain.

    Raises:
        PlatformError: there is none of that name, or it cannot be used.
    """
    installed = _installed()
    if name not in installed:
        known = ", ".join(sorted(installed)) or "none is installed; run `make env`"
        raise PlatformError(f"There is no domain {name!r}; there are: {known}.")
    return _load(installed[name])


def _installed() -> dict[str, EntryPoint]:
    installed: dict[str, EntryPoint] = {}
    for found in entry_points(group=GROUP):
        other = installed.setdefault(found.name, found)
        # The same package can be met twice, as a checkout and as what was installed from it.
        if other.value != found.value:
            raise PlatformError(
                f"Two packages offer a domain {found.name!r}: {_package(other)} and {_package(found)}; uninstall one."
            )
    return installed


def _load(found: EntryPoint) -> Domain:
    where = f"The domain {found.name!r} of {_package(found)} ({found.value})"
    try:
        domain = found.load()
    except Exception as error:  # the package is somebody else's code, which may raise anything
        raise PlatformError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(domain, Domain):
        raise PlatformError(f"{where} is a {type(domain).__name__}, not a Domain object.")
    if domain.name != found.name:
        raise PlatformError(f"{where} calls itself {domain.name!r}; the entry point must have the same name.")
    return domain


def _package(found: EntryPoint) -> str:
    return f"the package {found.dist.name}" if found.dist is not None else "an unknown package"
