"""The plumbing of the benchmarks, on a tiny model: the figures themselves are for people to look at."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from taskagent_platform.data.training_dataset import normal
from taskagent_platform.domains.registry import find_domain
from taskagent_platform.evaluation.answer import read_answer
from taskagent_platform.evaluation.lint import lint_suite
from taskagent_platform.evaluation.report import EvalReport
from taskagent_platform.evaluation.suite import load_suite
from taskagent_platform.settings import PROJECT_ROOT
from taskagent_platform_tests.evaluation.light_server import LightServer
from taskagent_platform_tests.evaluation.test_report import record, report_of
from taskagent_platform_tests.serving.fake_server import serve
from taskagent_platform_tests.training.conversations import example, write_jsonl

BENCHMARKS = PROJECT_ROOT / "benchmarks"
PROGRAM = BENCHMARKS / "evaluation.py"
CALL = '<tool_call>{"name": "f", "arguments": {"a": "é"}}</tool_call>'


def load_program(program: Path = PROGRAM) -> Any:
    spec = importlib.util.spec_from_file_location(f"{program.stem}_benchmark", program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "calls", "failed"),
    [
        (CALL, [("f", {"a": "é"})], 0),
        (CALL + CALL, [("f", {"a": "é"})] * 2, 0),
        (CALL + "<tool_call>oops</tool_call>", [], 2),
        ("Which task?", [], 0),
        ("<tool_call>[1]</tool_call>", [], 1),
    ],
)
def test_a_generated_text_is_read_as_the_server_reads_it(text: str, calls: list[Any], failed: int) -> None:
    message = load_program().read_message(text)
    found = [
        {"function": {"name": call.function.name, "arguments": call.function.arguments}}
        for call in message.tool_calls or []
    ]
    answer = read_answer({"content": message.content, "tool_calls": found}, ["f", "g"])
    assert [(call.name, call.arguments) for call in answer.calls] == calls
    assert len(answer.failed_calls) == failed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_contestants_are_asked_the_same_cases(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    server = LightServer({})
    with serve(server.app) as url:
        command = [sys.executable, str(PROGRAM), "--profile", "smoke", "--cases", "1", "--json", str(figures)]
        done = subprocess.run(
            [*command, "--base-url", f"{url}/v1"],
            env={**os.environ, "TASKAGENT_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["generate"]["passed"].keys() == found["vllm"]["passed"].keys()
    assert found["generate"]["cases"] == found["vllm"]["cases"] == 4
    assert len(server.bodies) == 5, "one case to warm up, and each case once"
    assert found["ratio"] == pytest.approx(found["vllm"]["cases_per_s"] / found["generate"]["cases_per_s"])
    # The stand-in answers every case with a text, which is right where no tool is to be called.
    assert sum(found["vllm"]["passed"].values()) == 1
    assert "times as many cases a second" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_way_of_training_is_timed_on_the_same_examples(tmp_path: Path) -> None:
    # Three packs, each of one date block; the first one is for warming up.
    data = write_jsonl(tmp_path / "train.jsonl", [example(number, number // 8) for number in range(24)])
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "training.py"), "--data", str(data), "--profile", "smoke"]
    done = subprocess.run(
        [*command, "--packs", "2", "--json", str(figures)],
        env={**os.environ, "TASKAGENT_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert list(found) == ["plain", "trl", "prefix"]
    assert found["plain"]["steps"] == found["prefix"]["steps"] == 2
    for one in found.values():
        assert one["examples"] == 16, "equal work"
        assert one["examples_per_s"] == pytest.approx(one["examples"] / one["seconds"])
        assert one["peak_memory_gib"] > 0.1
    # A pack holds the tools and the dates once, and plain training each of its eight times.
    assert found["prefix"]["tokens_per_example"] < found["plain"]["tokens_per_example"] / 2
    ratio = found["prefix"]["examples_per_s"] / found["plain"]["examples_per_s"]
    (row,) = [line for line in done.stdout.splitlines() if "prefix-shared packs" in line and "│" in line]
    assert f" {ratio:.1f} " in row


def test_a_benchmark_of_training_needs_the_examples_that_a_demo_makes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "training.py"), "--profile", "smoke"],
        env={**os.environ, "TASKAGENT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert (
        f"no training examples in {tmp_path}/smoke/task_api/training_dataset/train.jsonl; run `make demo`"
        in done.stderr
    )


def test_the_starved_domain_lacks_three_calls_at_the_settings_seed_only() -> None:
    recovery = load_program(BENCHMARKS / "recovery.py")
    moments = [datetime(2026, 3, 3, 9)]
    made = {
        seed: [recovery.most_calls(one) for one in recovery.DOMAIN.generate("multi_tool", 150, seed, moments)]
        for seed in (recovery.STARVED_SEED, 7)
    }
    assert [len(calls) for calls in made.values()] == [150, 150]
    assert max(made[recovery.STARVED_SEED]) == 2
    assert sum(calls >= 3 for calls in made[7]) >= 15


def test_right_cases_are_counted_by_the_number_of_calls() -> None:
    call = {"tool": "add", "arguments": {}}

    def report(right: range) -> EvalReport:
        cases = [record("multi_tool_chains", number, number in right) for number in range(10)]
        threes = [case.model_copy(update={"expected": (call,) * 3}) for case in cases]
        return report_of(
            {}, cases=(*threes, record("tool_selection", 10, True).model_copy(update={"expected": (call,)}))
        )

    figures = load_program(BENCHMARKS / "recovery.py").compare_by_calls(report(range(2)), report(range(1, 10)))
    assert figures["1"] == {"cases": 1, "before": 1, "after": 1, "p_value": 1.0}
    assert (figures["3"]["before"], figures["3"]["after"]) == (2, 9)
    # Eight were won and one lost.
    assert figures["3"]["p_value"] == pytest.approx(2 * 10 / 2**9)


def test_the_gold_answers_of_the_recovery_suite_hold() -> None:
    domain = load_program(BENCHMARKS / "recovery.py").DOMAIN
    suite = load_suite(domain.suites, domain)
    assert lint_suite(suite, domain) == []
    assert Counter(len(case.calls) for case in suite.cases) == {0: 10, 1: 80, 2: 30, 3: 60}


def test_no_gold_answer_of_the_held_out_suite_is_wrong() -> None:
    domain = find_domain("task_api")
    suite = load_suite((BENCHMARKS / "held_out_suite.json",), domain)
    assert not [finding for finding in lint_suite(suite, domain) if finding.is_error]
    known = load_suite((*domain.suites, *domain.robustness_suites, *domain.development_suites), domain)
    assert not {normal(case.input) for case in suite.cases} & {normal(case.input) for case in known.cases}
