"""What goes wrong more than the rest, whether the training data hold it, and what to add."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from taskagent_platform.data.jsonl import Record
from taskagent_platform.data.pattern import Dimension, Pattern, count_patterns, patterns_of_calls
from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.report import CaseRecord, EvalReport
from taskagent_platform.evaluation.statistics import fisher_exact_greater, holm

DIAGNOSIS_FILE = "diagnosis.json"
TEXT_FILE = "diagnosis.txt"
SIGNIFICANT = 0.05
_FEWEST_FAILURES = 2
_FEWEST_ADDED = 24
_ADDED_SHARE = 0.5
_HIGHEST_SHARE = 0.1
"""No pattern gets more of the training data added than this; one of which every case fails is filled up to it."""


class Finding(BaseModel):
    """How often cases of one pattern fail, compared with all the others.

    Attributes:
        dimension: what the cases have in common: tool, argument, number of calls, slice.
        value: which.
        failed: cases of it that failed.
        total: cases of it.
        rest_failed: other cases that failed.
        rest_total: other cases.
        p_value: of Fisher's exact test that it fails no more than the rest, by Holm's method for so many tests.
        faults: how often each type of fault was found in its failed cases.
        examples: training examples of it; None for a slice, which training data do not know.
        wanted: examples to add.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dimension: Dimension
    value: str
    failed: int
    total: int
    rest_failed: int
    rest_total: int
    p_value: float
    faults: dict[str, int]
    examples: int | None
    wanted: int

    @property
    def pattern(self) -> Pattern:
        """What the cases have in common."""
        return Pattern(self.dimension, self.value)

    @property
    def is_significant(self) -> bool:
        """Whether it fails more than the rest beyond what chance explains."""
        return self.p_value < SIGNIFICANT

    @property
    def sentence(self) -> str:
        """What to do about it."""
        rest = f"{self.rest_failed}/{self.rest_total} elsewhere" if self.rest_total else "there is nothing else"
        said = f"{self.pattern}: {self.failed}/{self.total} fail, {rest} (p = {self.p_value:.2g})."
        if not self.is_significant:
            return said
        if self.examples is None:
            return f"{said} Training data know no slices: write phrasings of this kind."
        return f"{said} {self.examples} training examples; add {self.wanted}."


class Diagnosis(BaseModel):
    """What an evaluation says about the training data.

    Attributes:
        model_digest: the model that was evaluated.
        cases: cases asked, those of the robustness suites included.
        failures: cases that failed.
        fault_types: how often each type of fault was found.
        findings: every pattern with a failed case, the clearest first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_digest: str | None
    cases: int
    failures: int
    fault_types: dict[str, int]
    findings: tuple[Finding, ...]

    @property
    def wanted(self) -> dict[Pattern, int]:
        """How many examples of which pattern to add."""
        return {finding.pattern: finding.wanted for finding in self.findings if finding.wanted}


def diagnose(report: EvalReport, training: Iterable[Record]) -> Diagnosis:
    """Groups an evaluation's failures and compares each group with the rest of the cases.

    Args:
        report: the evaluation.
        training: what the model was trained on.
    """
    records = list(training)
    examples = count_patterns(records)
    groups: dict[Pattern, list[CaseRecord]] = {}
    for case in report.asked:
        for pattern in case_patterns(case):
            groups.setdefault(pattern, []).append(case)
    failures = len(report.failures)
    failed = {pattern: sum(not case.passed for case in cases) for pattern, cases in groups.items()}
    tested = [pattern for pattern in groups if failed[pattern] >= _FEWEST_FAILURES]
    p_values = holm(
        [
            fisher_exact_greater(
                failed[pattern],
                len(groups[pattern]),
                failures - failed[pattern],
                len(report.asked) - len(groups[pattern]),
            )
            for pattern in tested
        ]
    )
    findings = [
        _finding(pattern, groups[pattern], report, p_value, examples, len(records))
        for pattern, p_value in zip(tested, p_values, strict=True)
    ]
    return Diagnosis(
        model_digest=report.model_digest,
        cases=len(report.asked),
        failures=failures,
        fault_types=_fault_types(report.failures),
        findings=tuple(sorted(findings, key=lambda finding: (finding.p_value, -finding.failed, finding.value))),
    )


def case_patterns(case: CaseRecord) -> set[Pattern]:
    """Returns the patterns of what a case asks for."""
    calls = [(str(call["tool"]), list(call.get("arguments") or ())) for call in case.expected]
    return patterns_of_calls(calls) | ({Pattern("slice", case.slice)} if case.slice else set())


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """Renders a diagnosis as text."""
    lines = [f"{diagnosis.failures} of {diagnosis.cases} cases failed."]
    lines += [f"  {name}: {count}" for name, count in diagnosis.fault_types.items()]
    clear = [finding for finding in diagnosis.findings if finding.is_significant]
    lines.append("Fails more than the rest:" if clear else "No pattern fails significantly more than the rest.")
    for finding in clear:
        faults = ", ".join(f"{name} {count}" for name, count in finding.faults.items())
        lines.append(f"  {finding.sentence} Faults: {faults}.")
    return "\n".join(lines) + "\n"


def save_diagnosis(diagnosis: Diagnosis, folder: Path) -> None:
    """Writes a diagnosis into a folder, as JSON and as text."""
    (folder / DIAGNOSIS_FILE).write_text(diagnosis.model_dump_json(indent=1), encoding="utf-8")
    (folder / TEXT_FILE).write_text(diagnosis_text(diagnosis), encoding="utf-8")


def load_diagnosis(folder: Path) -> Diagnosis:
    """Reads what :func:`save_diagnosis` wrote. Raises PlatformError if it is missing or damaged."""
    path = folder / DIAGNOSIS_FILE
    try:
        return Diagnosis.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise PlatformError(f"{path} cannot be used: {error}. Materialize failure_diagnosis again.") from error


def _finding(
    pattern: Pattern,
    cases: list[CaseRecord],
    report: EvalReport,
    p_value: float,
    examples: Mapping[Pattern, int],
    training_size: int,
) -> Finding:
    failed = [case for case in cases if not case.passed]
    known = None if pattern.dimension == "slice" else examples.get(pattern, 0)
    wanted = 0
    if known is not None and p_value < SIGNIFICANT:
        most = max(1, round(training_size * _HIGHEST_SHARE))
        missing = round(most * len(failed) / len(cases)) - known
        wanted = min(max(_FEWEST_ADDED, round(known * _ADDED_SHARE), missing), most)
    return Finding(
        dimension=pattern.dimension,
        value=pattern.value,
        failed=len(failed),
        total=len(cases),
        rest_failed=len(report.failures) - len(failed),
        rest_total=len(report.asked) - len(cases),
        p_value=p_value,
        faults=_fault_types(failed),
        examples=known,
        wanted=wanted,
    )


def _fault_types(cases: Iterable[CaseRecord]) -> dict[str, int]:
    return dict(Counter(fault.type for case in cases for fault in case.faults).most_common())
