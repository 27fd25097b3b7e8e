"""Targeted examples: more of what a model gets wrong, made by the domain's own generators, verified, and kept.

They are read by the next training dataset. Every set holds the earlier ones too, so that what one round mends the next
one does not unlearn.
"""

from collections.abc import Collection, Iterator, Mapping
from math import floor
from pathlib import Path

from taskagent_platform.artifacts import Manifest, new_artifact, read_manifest
from taskagent_platform.data.distribution import MIN_EXAMPLES, SINGLE_SHARE, Distribution, distribution
from taskagent_platform.data.jsonl import Record, read_jsonl, write_jsonl
from taskagent_platform.data.pattern import Pattern, patterns_of
from taskagent_platform.data.source import EXAMPLES_FILE, moments, source_count
from taskagent_platform.data.training_dataset import overlap, request_key
from taskagent_platform.data.verify import verify
from taskagent_platform.domains.base import Domain
from taskagent_platform.domains.version import version_with
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import Settings

KIND = "targeted_examples"
_CODE = ("data", "domains")
_BATCHES = 12
"""Seeds that are tried before a pattern counts as one that the domain's generators do not make."""
_HIGHEST_MULTI_SHARE = 1 - SINGLE_SHARE[0] - 0.01


def usable_targeted(folder: Path, domain: Domain) -> bool:
    """Tells whether a folder holds targeted examples that the present code and state of the domain made."""
    try:
        return read_manifest(folder, kind=KIND, verify=True).code_version == version_with(domain, *_CODE)
    except PlatformError:
        return False


def targeted_digest(folder: Path, domain: Domain) -> str | None:
    """Returns the digest of the targeted examples that the next training dataset takes in; None if there are none."""
    return read_manifest(folder).digest if usable_targeted(folder, domain) else None


def make_targeted_examples(
    settings: Settings,
    domain: Domain,
    wanted: Mapping[Pattern, int],
    training: Collection[Record],
    folder: Path,
    *,
    diagnosis: str,
) -> Manifest | None:
    """Makes and verifies examples of patterns, beside those made before.

    Args:
        settings: seed and moments.
        domain: whose generators.
        wanted: how many examples of each pattern; patterns that no generator can aim at (slices) are left out.
        training: what the model was trained on; no request of it is made again.
        folder: where the artifact goes.
        diagnosis: digest of the diagnosis that asks for them.

    Returns:
        the manifest; ``details.made`` counts the new examples by pattern, ``details.total`` all of them. None if there
        is nothing to add: then nothing changes.

    Raises:
        PlatformError: an example does not hold.
    """
    kept = list(read_jsonl(folder / EXAMPLES_FILE)) if usable_targeted(folder, domain) else []
    seen = {request_key(record) for record in (*training, *kept)}
    left = {pattern: count for pattern, count in wanted.items() if pattern.dimension != "slice" and count > 0}
    made: dict[str, int] = {str(pattern): 0 for pattern in left}
    room = _room_for_multi(distribution(domain, list(training)))
    new: list[Record] = []

    def take(record: Record, reserved: int) -> bool:
        """Takes an example that is wanted; returns whether it only lacks the room that is reserved for others."""
        nonlocal room
        fitting = [pattern for pattern in patterns_of(record) if left.get(pattern)]
        if not fitting or request_key(record) in seen:
            return False
        calls = sum(len(message.get("tool_calls") or []) for message in record["messages"])
        if calls > 1 and room <= (0 if any(map(_is_chain, fitting)) else reserved):
            return room > 0
        verify(domain, record, f"{KIND}, example {len(new)}")
        if overlap(domain, [record]):
            return False
        seen.add(request_key(record))
        record["meta"]["source"] = KIND
        new.append(record)
        room -= calls > 1
        for pattern in fitting:
            made[str(pattern)] += 1
            left[pattern] -= 1
            if not left[pattern]:
                del left[pattern]
        return False

    # What room there is belongs first to the chains that are wanted for their length, which nothing else can teach;
    # what no generator filled is for the others.
    waiting: dict[str, Record] = {}
    for record in _candidates(settings, domain, round_number=len(kept)):
        if not left:
            break
        if take(record, reserved=sum(left[pattern] for pattern in left if _is_chain(pattern))):
            waiting.setdefault(request_key(record), record)
    for record in waiting.values():
        take(record, reserved=0)
    if not new:
        return None
    details: dict[str, object] = {"made": made, "new": len(new), "total": len(kept) + len(new)}
    used = {"seed": settings.seed, "wanted": {str(pattern): count for pattern, count in wanted.items()}}
    with new_artifact(
        folder,
        kind=KIND,
        inputs={"failure_diagnosis": diagnosis},
        settings=used,
        code_version=version_with(domain, *_CODE),
        details=details,
    ) as scratch:
        write_jsonl(scratch / EXAMPLES_FILE, [*kept, *new])
    return read_manifest(folder, kind=KIND)


def _candidates(settings: Settings, domain: Domain, *, round_number: int) -> Iterator[Record]:
    """Yields fresh examples of all sources in turn, batch after batch, each batch with a seed of its own."""
    tools = domain.openai_tools()
    for batch in range(1, _BATCHES + 1):
        seed = settings.seed + 7919 * (round_number + 1) + batch
        for source in domain.sources:
            times = moments(settings, domain, source)
            for example in domain.generate(source, source_count(settings, source), seed, times):
                yield {"messages": example.messages, "tools": tools, "meta": dict(example.meta)}


def _is_chain(pattern: Pattern) -> bool:
    """Tells whether a pattern is a number of calls above one."""
    return pattern.dimension == "calls" and int(pattern.value) > 1


def _room_for_multi(present: Distribution) -> int:
    """Returns how many examples of several calls may be added before the dataset loses its balance."""
    if present.total < MIN_EXAMPLES:
        return MIN_EXAMPLES
    free = (_HIGHEST_MULTI_SHARE * present.total - present.multi_tool) / (1 - _HIGHEST_MULTI_SHARE)
    return max(0, floor(free))
