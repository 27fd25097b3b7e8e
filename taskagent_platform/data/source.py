"""The source datasets of a domain: generated, verified, written."""

import random
from collections.abc import Sequence
from datetime import datetime, timedelta
from math import ceil
from pathlib import Path

from taskagent_platform.artifacts import Manifest, find_artifact, new_artifact, read_manifest
from taskagent_platform.data.distribution import distribution
from taskagent_platform.data.jsonl import Record, write_jsonl
from taskagent_platform.data.verify import verify
from taskagent_platform.domains.base import Domain
from taskagent_platform.domains.version import version_with
from taskagent_platform.settings import Settings

EXAMPLES_FILE = "examples.jsonl"
_FIRST_DAY = datetime(2023, 1, 1)
_DAYS = 5 * 365
_CODE = ("data", "domains")


def moments(settings: Settings, domain: Domain, source: str) -> Sequence[datetime]:
    """Returns the moments at which a source's examples take place, in turn.

    Examples at one moment share their date block, and so a pack. All sources draw on the same moments, as many as
    there are packs, and each goes on where the one before it stopped: no moment has more examples than a pack holds.
    """
    rng = random.Random(settings.seed)
    counts = [source_count(settings, name) for name in domain.sources]
    total = max(2, ceil(sum(counts) / settings.training.pack_examples))
    days = rng.sample(range(_DAYS), total)
    drawn = [_FIRST_DAY + timedelta(days=day, minutes=rng.randrange(6 * 60, 24 * 60, 15)) for day in days]
    before = sum(counts[: domain.sources.index(source)]) % total
    return drawn[before:] + drawn[:before]


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
    times = moments(settings, domain, source)
    used = {"seed": settings.seed, "count": source_count(settings, source), "moments": list(map(str, times))}
    version = version_with(domain, *_CODE)
    if found := find_artifact(folder, kind=source, inputs={}, settings=used, code_version=version):
        return found, True
    tools = domain.openai_tools()
    records: list[Record] = []
    for number, example in enumerate(domain.generate(source, source_count(settings, source), settings.seed, times)):
        record = {"messages": example.messages, "tools": tools, "meta": example.meta}
        verify(domain, record, f"{source}, example {number}")
        records.append(record)
    details: dict[str, object] = {}
    with new_artifact(folder, kind=source, inputs={}, settings=used, code_version=version, details=details) as scratch:
        write_jsonl(scratch / EXAMPLES_FILE, records)
        details["distribution"] = distribution(domain, records).model_dump()
    return read_manifest(folder, kind=source), False
