"""Evaluation speed: cases a second through vLLM, many at once, against `generate` of transformers, one at a time.

    .venv/bin/python benchmarks/evaluation.py --model .taskagent/cpu/task_api/merged_model

Both contestants ask the same model the same cases of the domain's suites with the same prompt, tools, chat template,
longest answer and greedy decoding; chains are executed on the same backend and every case is scored by the same scorer.
Each runs in a process of its own, one after the other. Loading the model, or starting the server, and one case to warm
up are not timed; both are shown.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from taskagent_platform.domains.base import Domain
from taskagent_platform.domains.registry import find_domain
from taskagent_platform.evaluation.client import (
    CaseRun,
    Endpoint,
    destructive_tools,
    open_client,
    replay_on,
    run_cases,
    tool_schemas,
)
from taskagent_platform.evaluation.scoring import score_case
from taskagent_platform.evaluation.suite import Case, load_suite
from taskagent_platform.serving.server import start_server, stop_server
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform.training._process import payload_environment
from taskagent_platform.training.base_model import prepare_base_model
from taskagent_platform.training.template import render_text

CONTESTANTS = {
    "generate": "transformers generate, one at a time",
    "vllm": "vLLM, many at once",
}
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def main() -> None:
    """Runs both contestants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; the profile's base model, made here, by default")
    parser.add_argument("--profile", default="cpu", help="profile whose serving and evaluation settings are used")
    parser.add_argument("--domain", default="task_api")
    parser.add_argument("--cases", type=int, default=8, help="cases of each list, spread evenly over it")
    parser.add_argument("--base-url", help="an OpenAI-compatible server that serves this model already, with /v1")
    parser.add_argument("--served-name", default="model", help="the model's name on that server")
    parser.add_argument("--only", choices=CONTESTANTS, nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = load_settings(profile=arguments.profile)
    if arguments.contestant:
        print("\n" + json.dumps(compete(arguments, settings)))
        return
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.model is None:
            console.print("Preparing the base model …")
            arguments.model = Path(scratch) / "base_model"
            prepare_base_model(settings, arguments.model)
        results = {}
        for name in arguments.only:
            results[name] = run_contestant(name, arguments)
            figures = results[name]
            console.print(f"{CONTESTANTS[name]}: {figures['cases']} cases in {figures['seconds']:.1f} s")
    console.print(table(results))
    if len(results) == len(CONTESTANTS):
        ratio = results["vllm"]["cases_per_s"] / results["generate"]["cases_per_s"]
        same = sum(results["vllm"]["passed"][case] == passed for case, passed in results["generate"]["passed"].items())
        console.print(f"{ratio:.1f} times as many cases a second; the same verdict in {same} cases")
        results["ratio"] = ratio
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


def run_contestant(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one contestant in a process of its own."""
    command = [sys.executable, __file__, "--contestant", name, "--model", str(arguments.model)]
    command += ["--profile", arguments.profile, "--domain", arguments.domain, "--cases", str(arguments.cases)]
    if arguments.base_url:
        command += ["--base-url", arguments.base_url, "--served-name", arguments.served_name]
    # The platform's allocator settings help whoever computes in this process; a server sets its own environment.
    done = subprocess.run(command, env=payload_environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{CONTESTANTS[name]} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def compete(arguments: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Asks one contestant all cases and returns its figures."""
    domain = find_domain(arguments.domain)
    cases = load_suite(domain.suites, domain).limited(arguments.cases).cases
    begin = time.monotonic()
    if arguments.contestant == "generate":
        client = Generating(arguments.model, settings)
        endpoint = Endpoint("transformers", "model", settings.serving.max_tokens)
        ready = time.monotonic() - begin
        figures = asyncio.run(ask_all(client, endpoint, settings, domain, cases, concurrency=1))
        return {**figures, "ready_s": ready}
    if arguments.base_url:
        endpoint = Endpoint(arguments.base_url, arguments.served_name, settings.serving.max_tokens)
        return {**asyncio.run(ask_server(endpoint, settings, domain, cases)), "ready_s": 0.0}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        server = start_server(
            settings, arguments.model, name="model", log_file=folder / "log", record_file=folder / "record.json"
        )
        try:
            endpoint = Endpoint(server.base_url, server.name, settings.serving.max_tokens)
            return {**asyncio.run(ask_server(endpoint, settings, domain, cases)), "ready_s": server.cold_start_s}
        finally:
            stop_server(server)


async def ask_server(endpoint: Endpoint, settings: Settings, domain: Domain, cases: Sequence[Case]) -> dict[str, Any]:
    """Asks a server, as many cases at once as the evaluation does."""
    async with open_client(endpoint) as client:
        return await ask_all(client, endpoint, settings, domain, cases, concurrency=settings.evaluation.concurrency)


async def ask_all(
    client: Any, endpoint: Endpoint, settings: Settings, domain: Domain, cases: Sequence[Case], *, concurrency: int
) -> dict[str, Any]:
    """Asks all cases, after one to warm up, scores them, and returns the figures; the scoring is timed, too."""
    turns = settings.evaluation.max_turns
    await run_cases(client, endpoint, domain, cases[:1], concurrency=1, max_turns=turns)
    begin = time.monotonic()
    runs = await run_cases(client, endpoint, domain, cases, concurrency=concurrency, max_turns=turns)
    passed = {run.case.id: has_passed(domain, run) for run in runs}
    seconds = time.monotonic() - begin
    return {
        "cases": len(runs),
        "answers": sum(len(run.conversation.answers) for run in runs),
        "seconds": seconds,
        "cases_per_s": len(runs) / seconds,
        "concurrency": concurrency,
        "passed": passed,
    }


def has_passed(domain: Domain, run: CaseRun) -> bool:
    """Scores one case."""
    score = score_case(
        run.case,
        run.conversation,
        tool_schemas(domain),
        destructive=destructive_tools(domain),
        replay=replay_on(domain, run.case),
    )
    return score.passed


class Generating:
    """Answers as an OpenAI client does, by `generate` of transformers: one conversation at a time.

    Args:
        folder: the model's.
        settings: `serving` says in which dtype it computes.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        dtype = getattr(torch, settings.serving.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(self.device).eval()
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    async def create(self, **body: Any) -> Any:
        """Answers one request."""
        import torch

        prompt = render_text(body["messages"], body["tools"], self.tokenizer, add_generation_prompt=True)
        inputs = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=body["max_tokens"], do_sample=False)
        text = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return SimpleNamespace(choices=[SimpleNamespace(message=read_message(text))])


def read_message(text: str) -> SimpleNamespace:
    """Reads the calls of an answer as the server's parser does: one that cannot be read leaves the answer a text."""
    calls = []
    try:
        for number, found in enumerate(_CALL.findall(text)):
            call = json.loads(found)
            function = SimpleNamespace(name=call["name"], arguments=json.dumps(call["arguments"], ensure_ascii=False))
            calls.append(SimpleNamespace(id=f"call_{number}", type="function", function=function))
    except (ValueError, KeyError, TypeError):
        calls = []
    content = text[: text.index("<tool_call>")] if calls else text
    return SimpleNamespace(content=content or None, tool_calls=calls or None)


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Returns the figures side by side."""
    shown = Table(title="Evaluation speed on the same cases")
    for column in ("", "cases/s", "seconds", "answers", "at once", "right", "until ready s"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, figures in results.items():
        shown.add_row(
            CONTESTANTS[name],
            f"{figures['cases_per_s']:.3f}",
            f"{figures['seconds']:.1f}",
            str(figures["answers"]),
            str(figures["concurrency"]),
            f"{sum(figures['passed'].values())}/{figures['cases']}",
            f"{figures['ready_s']:.1f}",
        )
    return shown


if __name__ == "__main__":
    main()
