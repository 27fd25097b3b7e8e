"""The training dataset: all sources together, without duplicates, apart from every evaluation input, split."""

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from taskagent_platform.artifacts import Manifest, find_artifact, new_artifact, read_manifest
from taskagent_platform.data.distribution import distribution
from taskagent_platform.data.jsonl import Record, read_jsonl, write_jsonl
from taskagent_platform.data.source import EXAMPLES_FILE
from taskagent_platform.data.verify import verify
from taskagent_platform.domains.base import Domain
from taskagent_platform.domains.version import version_with
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import Settings

TRAIN_FILE = "train.jsonl"
EVALUATION_FILE = "evaluation.jsonl"
KIND = "training_dataset"
_NOT_WORDS = re.compile(r"\W+")


def make_training_dataset(
    settings: Settings, domain: Domain, sources: Mapping[str, Path], folder: Path
) -> tuple[Manifest, bool]:
    """Aggregates the sources, drops duplicates and requests of the suites, shuffles by seed and holds a tenth out.

    Whole date blocks are held out, so that the evaluation loss is measured on dates never trained on and so that
    the packs of the rest stay full.

    Args:
        settings: ``seed`` and ``data.evaluation_share`` are used.
        domain: verifies the examples.
        sources: folder of each source dataset, by name.
        folder: where the artifact goes.

    Returns:
        the manifest (``details.distribution`` holds the report, ``details.overlap`` the evaluation inputs still
        found among the requests: none), and whether it was there already.

    Raises:
        PlatformError: a source is not finished, or one of its lines is wrong; names file, line and field.
    """
    inputs = {name: read_manifest(path, kind=name, verify=True).digest for name, path in sources.items()}
    used = {"seed": settings.seed, "evaluation_share": settings.data.evaluation_share}
    version = version_with(domain, "data", "domains")
    if found := find_artifact(folder, kind=KIND, inputs=inputs, settings=used, code_version=version):
        return found, True
    records: dict[str, Record] = {}
    repeated = 0
    for name, path in sources.items():
        for number, record in enumerate(read_jsonl(path / EXAMPLES_FILE), start=1):
            verify(domain, record, f"{name}/{EXAMPLES_FILE}, line {number}")
            repeated += request_key(record) in records
            records.setdefault(request_key(record), record)
    repeats = set(overlap(domain, records.values()))
    kept = {key: record for key, record in records.items() if not asked_in(record) & repeats}
    train, held_out = split(list(kept.values()), settings.data.evaluation_share, settings.seed)
    if not held_out or not train:
        raise PlatformError("The sources hold too few examples to hold a tenth out; raise data.* in the settings.")
    details: dict[str, object] = {
        "distribution": distribution(domain, [*train, *held_out]).model_dump(),
        "train": len(train),
        "evaluation": len(held_out),
        "duplicates_dropped": repeated,
        "overlaps_dropped": len(records) - len(kept),
        "overlap": overlap(domain, kept.values()),
    }
    with new_artifact(
        folder, kind=KIND, inputs=inputs, settings=used, code_version=version, details=details
    ) as scratch:
        write_jsonl(scratch / TRAIN_FILE, train)
        write_jsonl(scratch / EVALUATION_FILE, held_out)
    return read_manifest(folder, kind=KIND), False


def split(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Returns (train, held out), both shuffled by seed; examples of one moment stay on one side."""
    rng = random.Random(seed)
    nows = sorted({record["meta"]["now"] for record in records})
    rng.shuffle(nows)
    held = set(nows[: max(1, round(len(nows) * share))])
    shuffled = rng.sample(records, len(records))
    return (
        [record for record in shuffled if record["meta"]["now"] not in held],
        [record for record in shuffled if record["meta"]["now"] in held],
    )


def request_key(record: Record) -> str:
    """Returns what makes two examples the same request: the user's words without case and punctuation."""
    return " | ".join(normal(m["content"]) for m in record["messages"] if m["role"] == "user")


def normal(text: str) -> str:
    """Returns a text without case, punctuation and extra spaces."""
    return _NOT_WORDS.sub(" ", text.casefold()).strip()


def asked_in(record: Record) -> set[str]:
    """Returns every request of an example, without case and punctuation."""
    return {normal(message["content"]) for message in record["messages"] if message["role"] == "user"}


def overlap(domain: Domain, records: Iterable[Record]) -> list[str]:
    """Returns the inputs of any of the domain's suites, normalised, that a training request repeats."""
    asked = set().union(*map(asked_in, records))
    files = (*domain.suites, *domain.robustness_suites, *domain.development_suites)
    suites = [json.loads(path.read_text()) for path in files]
    inputs = {normal(case["input"]) for suite in suites for cases in suite.values() for case in cases}
    return sorted(asked & inputs)
