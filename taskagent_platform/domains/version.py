"""What a domain consists of, wherever it is installed: whatever was made from an older state of it is out of date."""

import inspect
from functools import cache
from pathlib import Path

from taskagent_platform.artifacts import code_version, digest_of, file_digest
from taskagent_platform.domains.base import Domain


def domain_version(domain: Domain) -> str:
    """Returns a digest of a domain's own files: those of the package that defines it, and its suites.

    A domain that is defined in a module of no package consists of this module.
    """
    source = Path(inspect.getfile(type(domain)))
    in_package = (source.parent / "__init__.py").is_file()
    files = sorted(source.parent.rglob("*")) if in_package else [source]
    own = [path for path in files if path.is_file() and "__pycache__" not in path.parts]
    suites = (*domain.suites, *domain.robustness_suites, *domain.development_suites)
    return digest_of([file_digest(path) for path in (*own, *suites)])


@cache
def version_with(domain: Domain, *parts: str) -> str:
    """Returns the version of a domain and of the platform's code that works with it, as this process found them.

    What is edited while a run goes on concerns the next one.

    Args:
        domain: the domain.
        parts: sub-packages of the platform, see :func:`~taskagent_platform.artifacts.code_version`.
    """
    return digest_of([domain_version(domain), code_version(*parts)])
