"""The source datasets of a domain: generated, verified, written."""

import random
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from taskagent_platform.artifacts import Manifest, code_version, find_artifact, new_artifact, read_manifest
from taskagent_platform.data.distribution import distribution
from taskagent_platform.data.jsonl import Record, write_jsonl
from taskagent_platform.data.verify import verify
from taskagent_platform.domains.base import Domain
from taskagent_platform.settings import Settings

EXAMPLES_FILE = "examples.jsonl"
_FIRST_DAY = datetime(2023, 1, 1)
_DAYS = 5 * 365
_CODE = ("data", "domains")


def moments(settings: Settings) -> Sequence[datetime]:
    """Returns the moments at which the examples of all sources take place.

    Examples at one moment share their date block, and so a pack; there is a moment for each pack.
    """
    rng = random.Random(settings.seed)
    total = sum(source_count(settings, name) for name in ("structured_outputs", "function_calling", "multi_tool"))
    count = max(2, round(total / settings.training.pack_examples))
    days = rng.sample(range(_DAYS), count)
    return [_FIRST_DAY + timedelta(days=day, minutes=rng.randrange(7 * 60, 21 * 60, 15)) for day in days]


def source_count(settings: Settings, source: str) -> int:
    """Returns how many examples the settings ask of a source. Raises AttributeError for an unknown one."""
    count: int = getattr(settings.data, source)
    return count


def make_source(settings: Settings, domain: Domain, source: str, folder: Path) -> tuple[Manifest, bool]:
    """Generates and verifies one source dataset.

    Returns:
        the artifact's manifest, and whether it was there already.

    Raises:
        PlatformError: an example does not hold; see :func:`~taskagent_platform.data.verify.verify`.
    """
    used = {"seed": settings.seed, "count": source_count(settings, source), "moments": len(moments(settings))}
    version = code_version(*_CODE)
    if found := find_artifact(folder, kind=source, inputs={}, settings=used, code_version=version):
        return found, True
    tools = domain.openai_tools()
    records: list[Record] = []
    for number, example in enumerate(domain.generate(source, used["count"], settings.seed, moments(settings))):
        record = {"messages": example.messages, "tools": tools, "meta": example.meta}
        verify(domain, record, f"{source}, example {number}")
        records.append(record)
    details: dict[str, object] = {}
    with new_artifact(
        folder, kind=source, inputs={}, settings=used, code_version=version, details=details
    ) as scratch:
        write_jsonl(scratch / EXAMPLES_FILE, records)
        details["distribution"] = distribution(domain, records).model_dump()
    return read_manifest(folder, kind=source), False
