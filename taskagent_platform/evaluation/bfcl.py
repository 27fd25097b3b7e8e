"""The Berkeley Function Calling Leaderboard: its single-turn cases asked of an endpoint, judged by its own checker.

Its package holds all data and is no dependency: it lives in an environment of its own under the home folder, made on
first use, and runs there in a process of its own (:mod:`taskagent_platform.evaluation._bfcl_payload`).

Source: S. G. Patil et al., "The Berkeley Function Calling Leaderboard (BFCL): From Tool Use to Agentic Evaluation of
Large Language Models", ICML 2025; package ``bfcl-eval``, Apache-2.0.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.answer import Answer, read_answer
from taskagent_platform.evaluation.client import Endpoint, ask, open_client
from taskagent_platform.evaluation.report import Rate
from taskagent_platform.evaluation.statistics import Interval, mcnemar_exact, paired_difference_interval
from taskagent_platform.settings import PROJECT_ROOT, Settings

PACKAGE = "bfcl-eval==2026.3.23"
"""Pinned: the test of the scorer lists every difference to this version's checker."""
# What its loader and its checker import; its own list of dependencies holds every vendor's client and torch.
_IMPORTED = ("filelock", "tenacity")
CATEGORIES = (
    "simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple", "irrelevance",
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance",
)  # fmt: skip
"""BFCL's single-turn categories."""
RESULT_FILE = "result.json"
_PAYLOAD = Path(__file__).with_name("_bfcl_payload.py")
# pip names a setting by one variable, uv by another.
_PIP_SETTINGS = {"UV_DEFAULT_INDEX": "PIP_INDEX_URL", "UV_INDEX": "PIP_EXTRA_INDEX_URL", "SSL_CERT_FILE": "PIP_CERT"}

Progress = Callable[[int, int], None]
"""Is told how many cases are done, and of how many."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class BfclCase(_Model):
    """One case.

    Attributes:
        id: BFCL's own.
        category: one of :data:`CATEGORIES`.
        messages: what is asked.
        tools: in OpenAI's format, as BFCL sends them; dots in names are underscores.
        right: BFCL's acceptable answers, a call each; empty where only calling or not calling counts.
    """

    id: str
    category: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    right: tuple[dict[str, Any], ...]


class BfclAnswer(_Model):
    """A model's answer to a case.

    Attributes:
        id: the case's.
        category: the case's.
        calls: name and arguments (as text) of each call.
    """

    id: str
    category: str
    calls: tuple[tuple[str, str], ...]


class BfclVerdict(_Model):
    """What BFCL's checker says of an answer.

    Attributes:
        valid: it is right.
        error_type: BFCL's word for what is wrong.
        error: the same for a reader.
    """

    valid: bool
    error_type: str | None
    error: str


class BfclCaseResult(_Model):
    """One case as it was answered.

    Attributes:
        id: the case's.
        category: the case's.
        passed: by BFCL's checker.
        error_type: BFCL's word for what is wrong.
        calls: name and arguments (as text) of each call.
        text: what the model wrote beside them.
        malformed: it attempted a call that cannot be read. BFCL counts that as right where no call is right.
        too_long: the case is longer than the server takes; BFCL was given an answer without calls.
    """

    id: str
    category: str
    passed: bool
    error_type: str | None
    calls: tuple[tuple[str, str], ...]
    text: str
    malformed: bool
    too_long: bool


class BfclResult(_Model):
    """One model's answers.

    Attributes:
        package: the version of BFCL.
        model_name: the name it was asked by.
        sample: the number of cases that each category was cut to; None for all.
        cases: every case asked.
    """

    package: str
    model_name: str
    sample: int | None
    cases: tuple[BfclCaseResult, ...]


class BfclRow(NamedTuple):
    """Two models in one category, or in all of them.

    Attributes:
        category: its name, or ``all``.
        base: the base model's rate.
        tuned: the fine-tuned model's.
        difference: tuned less base.
        interval: the difference's 95 % interval.
        p_value: of the exact McNemar test that both are as good.
    """

    category: str
    base: Rate
    tuned: Rate
    difference: float
    interval: Interval
    p_value: float


class Bfcl:
    """BFCL in its own environment.

    Args:
        python: the environment's interpreter.
    """

    def __init__(self, python: Path) -> None:
        self.python = python

    def cases(self, categories: Sequence[str] = CATEGORIES, sample: int | None = None) -> list[BfclCase]:
        """Reads cases, at most ``sample`` of each category, spread evenly over it."""
        found = [BfclCase.model_validate(case) for case in self._run("cases", list(categories))]
        if sample is None:
            return found
        kept = []
        for category in categories:
            own = [case for case in found if case.category == category]
            count = min(sample, len(own))
            kept += [own[index * len(own) // count] for index in range(count)]
        return kept

    def check(self, answers: Iterable[BfclAnswer]) -> list[BfclVerdict]:
        """Judges answers with BFCL's own checker; returns a verdict for each, in the order given."""
        given = [answer.model_dump() for answer in answers]
        return [BfclVerdict.model_validate(verdict) for verdict in self._run("check", given)]

    def _run(self, command: str, given: Any) -> Any:
        with TemporaryDirectory() as scratch:
            request, answer = Path(scratch) / "request.json", Path(scratch) / "answer.json"
            request.write_text(json.dumps({"command": command, "given": given}), encoding="utf-8")
            # The package makes folders for results beside itself unless it is told another place.
            environment = {**os.environ, "BFCL_PROJECT_ROOT": scratch}
            environment.pop("PYTHONPATH", None)
            done = subprocess.run(
                [str(self.python), str(_PAYLOAD), str(request), str(answer)],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise PlatformError(
                    f"BFCL's own code failed ({last}); delete {self.python.parents[1]} and try again to have it "
                    "installed anew."
                )
            return json.loads(answer.read_text(encoding="utf-8"))


def install_bfcl(settings: Settings) -> Bfcl:
    """Returns BFCL in its own environment, which is made under the home folder on first use.

    Raises:
        PlatformError: uv is missing, or the package cannot be had.
    """
    folder = settings.home / "cache" / "bfcl"
    mark = folder / ".made-of"
    wanted = "\n".join([PACKAGE, *_IMPORTED, sys.version])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not mark.is_file() or mark.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            python = str(folder / "bin" / "python")
            _uv("venv", "--python", sys.executable, "--no-python-downloads", str(folder))
            _uv("pip", "install", "--python", python, "--no-deps", PACKAGE, *_IMPORTED)
            # Written last: an environment without it is made again.
            mark.write_text(wanted)
    return Bfcl(folder / "bin" / "python")


def ask_bfcl(
    bfcl: Bfcl,
    endpoint: Endpoint,
    cases: Sequence[BfclCase],
    *,
    concurrency: int,
    sample: int | None = None,
    on_progress: Progress | None = None,
) -> BfclResult:
    """Asks an endpoint the cases and has BFCL's checker judge the answers.

    The request is the evaluation's own, but for what BFCL sets itself: its messages and its tools, which are not
    strict, so that the server constrains nothing.

    Args:
        bfcl: the checker.
        endpoint: an OpenAI-compatible server.
        cases: what to ask.
        concurrency: requests at once.
        sample: what the cases were cut to; for the record.
        on_progress: is told of every case.

    Raises:
        PlatformError: the endpoint fails. No result is made of a part of the cases.
    """
    answers = asyncio.run(_ask_all(endpoint, cases, concurrency, on_progress))
    given = [
        BfclAnswer(id=case.id, category=case.category, calls=_calls(answer))
        for case, answer in zip(cases, answers, strict=True)
    ]
    results = [
        BfclCaseResult(
            id=case.id,
            category=case.category,
            # What was never asked is no right abstention.
            passed=verdict.valid and answer is not None,
            error_type=verdict.error_type,
            calls=_calls(answer),
            text=answer.text if answer is not None else "",
            malformed=answer is not None and answer.is_malformed,
            too_long=answer is None,
        )
        for case, answer, verdict in zip(cases, answers, bfcl.check(given), strict=True)
    ]
    return BfclResult(package=PACKAGE, model_name=endpoint.model, sample=sample, cases=tuple(results))


def rows_of(base: BfclResult, tuned: BfclResult) -> list[BfclRow]:
    """Compares two models on the cases that both were asked, by category and over all cases."""
    theirs = {case.id: case.passed for case in base.cases}
    pairs = [(case.category, theirs[case.id], case.passed) for case in tuned.cases if case.id in theirs]
    groups = {name: [pair[1:] for pair in pairs if pair[0] == name] for name in CATEGORIES}
    groups["all"] = [pair[1:] for pair in pairs]
    return [_row(name, group) for name, group in groups.items() if group]


def _row(category: str, pairs: Sequence[tuple[bool, bool]]) -> BfclRow:
    total = len(pairs)
    only_base = sum(base and not tuned for base, tuned in pairs)
    only_tuned = sum(tuned and not base for base, tuned in pairs)
    return BfclRow(
        category=category,
        base=Rate.of(sum(base for base, _ in pairs), total),
        tuned=Rate.of(sum(tuned for _, tuned in pairs), total),
        difference=(only_tuned - only_base) / total,
        interval=paired_difference_interval(only_tuned, only_base, total),
        p_value=mcnemar_exact(only_tuned, only_base),
    )


def render_rows(rows: Sequence[BfclRow], sample: int | None) -> str:
    """Renders a comparison as the text that a console shows."""
    header = f"{'category':<24}{'cases':>7}{'base model':>12}{'fine-tuned':>12}{'difference':>12}  95 % interval      p"
    lines = [f"BFCL, single turn ({PACKAGE}), judged by its own checker", "", header, "-" * len(header)]
    for row in rows:
        points = f"{row.difference * 100:+.1f}"
        interval = f"{row.interval.low * 100:+.1f} to {row.interval.high * 100:+.1f}"
        lines.append(
            f"{row.category:<24}{row.base.total:>7}{row.base.rate or 0:>12.1%}{row.tuned.rate or 0:>12.1%}"
            f"{points:>12}  {interval:<16}{row.p_value:>8.2g}"
        )
    lines += ["", "Differences are in points; p is that of the exact McNemar test on the same cases."]
    if sample is not None:
        lines.append(f"At most {sample} cases of each category were asked, not the whole benchmark.")
    return "\n".join(lines) + "\n"


def load_result(folder: Path) -> BfclResult:
    """Reads one model's answers.

    Raises:
        PlatformError: there are none, or they are damaged.
    """
    path = folder / RESULT_FILE
    try:
        return BfclResult.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlatformError(f"There is no BFCL result {path}; materialize bfcl_report.") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise PlatformError(f"{path} is damaged: {error}. Materialize bfcl_report again.") from error


async def _ask_all(
    endpoint: Endpoint, cases: Sequence[BfclCase], concurrency: int, on_progress: Progress | None
) -> list[Answer | None]:
    slots = asyncio.Semaphore(concurrency)
    done = 0

    async with open_client(endpoint) as client:

        async def one(case: BfclCase) -> Answer | None:
            nonlocal done
            async with slots:
                message = await ask(client, endpoint, case.messages, case.tools)
            done += 1
            if on_progress is not None:
                on_progress(done, len(cases))
            return None if message is None else read_answer(message, [tool["function"]["name"] for tool in case.tools])

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(case)) for case in cases]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _calls(answer: Answer | None) -> tuple[tuple[str, str], ...]:
    return () if answer is None else tuple((call.name, call.text) for call in answer.calls)


def _uv(*arguments: str) -> None:
    private = PROJECT_ROOT / ".venv-uv" / "bin" / "uv"  # where `make env` keeps its own
    program = shutil.which("uv") or (str(private) if private.is_file() else None)
    if program is None:
        raise PlatformError("BFCL gets an environment of its own, which uv makes; install uv (`pip install uv`).")
    environment = dict(os.environ)
    for uv_name, pip_name in _PIP_SETTINGS.items():
        if pip_name in os.environ:
            environment.setdefault(uv_name, os.environ[pip_name])
    done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PlatformError(
            f"{PACKAGE} could not be installed; check the network and where packages come from (UV_DEFAULT_INDEX):\n"
            f"{done.stderr.strip()[-800:]}"
        )
