"""BFCL's cases asked of an endpoint, with a stand-in for BFCL's own code."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from taskagent_platform.errors import PlatformError
from taskagent_platform.evaluation.bfcl import (
    RESULT_FILE,
    Bfcl,
    BfclAnswer,
    BfclCase,
    BfclResult,
    BfclVerdict,
    ask_bfcl,
    install_bfcl,
    load_result,
    render_rows,
    rows_of,
)
from taskagent_platform.evaluation.client import Endpoint
from taskagent_platform.settings import load_settings
from taskagent_platform_tests.evaluation.light_server import LightServer
from taskagent_platform_tests.serving.fake_server import serve

TOOLS = ({"type": "function", "function": {"name": "geo_area", "parameters": {"type": "object", "properties": {}}}},)


def case(number: int, category: str = "simple_python", tools: tuple[dict[str, Any], ...] = TOOLS) -> BfclCase:
    messages = ({"role": "user", "content": f"{category} {number}"},)
    return BfclCase(id=f"{category}_{number}", category=category, messages=messages, tools=tools, right=())


class FakeBfcl(Bfcl):
    """Takes exactly one call for right, and none where the category says so."""

    def __init__(self) -> None:
        super().__init__(Path("python"))
        self.seen: list[BfclAnswer] = []

    def check(self, answers: Iterable[BfclAnswer]) -> list[BfclVerdict]:
        self.seen = list(answers)
        good = [len(answer.calls) == (0 if answer.category == "irrelevance" else 1) for answer in self.seen]
        return [BfclVerdict(valid=valid, error_type=None if valid else "wrong", error="") for valid in good]


def ask(server: LightServer, *cases: BfclCase, bfcl: FakeBfcl | None = None) -> BfclResult:
    with serve(server.app) as url:
        return ask_bfcl(bfcl or FakeBfcl(), Endpoint(f"{url}/v1", "m", 64), cases, concurrency=2)


def test_the_checker_gets_the_calls_as_the_model_wrote_them() -> None:
    bfcl = FakeBfcl()
    server = LightServer({"simple_python 0": [[("geo_area", {"side": "2,5"})]]})
    result = ask(server, case(0), case(1), bfcl=bfcl)
    assert [answer.calls for answer in bfcl.seen] == [(("geo_area", '{"side": "2,5"}'),), ()]
    assert [one.passed for one in result.cases] == [True, False]
    assert (result.cases[1].error_type, result.cases[1].text) == ("wrong", "All right.")
    assert [body["tools"] for body in server.bodies] == [list(TOOLS)] * 2
    assert {body["temperature"] for body in server.bodies} == {0.0}


def test_a_case_without_tools_sends_none() -> None:
    server = LightServer({})
    assert ask(server, case(0, "irrelevance", ())).cases[0].passed
    assert "tools" not in server.bodies[0]


def test_a_call_that_cannot_be_read_is_counted_apart() -> None:
    server = LightServer({"irrelevance 0": ['<tool_call>{"name": "geo_area", "argu']})
    [one] = ask(server, case(0, "irrelevance")).cases
    assert (one.passed, one.malformed) == (True, True)


def test_a_case_longer_than_the_context_is_no_answer() -> None:
    server = LightServer({}, failures=[(400, "This model's maximum context length is 4096 tokens.")])
    [one] = ask(server, case(0)).cases
    assert (one.passed, one.too_long, one.malformed) == (False, True, False)
    server = LightServer({}, failures=[(400, "This model's maximum context length is 4096 tokens.")])
    [one] = ask(server, case(0, "irrelevance")).cases
    assert not one.passed, "a refused request is no right abstention"


def test_an_endpoint_that_fails_leaves_no_result() -> None:
    with pytest.raises(PlatformError, match="refuses a request: nope"):
        ask(LightServer({}, failures=[(400, "nope")] * 9), case(0), case(1))


def test_models_are_compared_on_the_cases_that_both_were_asked() -> None:
    right: dict[str, Any] = {f"simple_python {n}": [[("geo_area", {})]] for n in range(10)}
    cases = [case(n) for n in range(10)] + [case(n, "irrelevance") for n in range(4)]
    base = ask(LightServer(right), *cases)
    tuned = ask(LightServer({f"irrelevance {n}": [[("geo_area", {})]] for n in range(4)}), *cases[1:])
    rows = {row.category: row for row in rows_of(base, tuned)}
    assert list(rows) == ["simple_python", "irrelevance", "all"]
    assert (rows["simple_python"].base.correct, rows["simple_python"].base.total) == (9, 9)
    assert (rows["simple_python"].tuned.correct, rows["simple_python"].difference) == (0, -1.0)
    assert rows["simple_python"].p_value == pytest.approx(2 / 2**9)
    assert rows["all"].difference == -1.0
    assert rows["all"].interval.low < -0.6 < 0 > rows["all"].interval.high
    text = render_rows(list(rows.values()), sample=10)
    assert "-100.0" in text
    assert "At most 10 cases of each category" in text


def test_a_result_is_read_again_unless_it_is_damaged(tmp_path: Path) -> None:
    result = ask(LightServer({}), case(0))
    (tmp_path / RESULT_FILE).write_text(result.model_dump_json())
    assert load_result(tmp_path) == result
    (tmp_path / RESULT_FILE).write_text("{")
    with pytest.raises(PlatformError, match="is damaged"):
        load_result(tmp_path)
    with pytest.raises(PlatformError, match="materialize bfcl_report"):
        load_result(tmp_path / "nowhere")


def test_a_sample_is_spread_over_each_category(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [case(n).model_dump() for n in range(10)] + [case(0, "multiple").model_dump()]
    monkeypatch.setattr(Bfcl, "_run", lambda self, command, wanted: given)
    found = Bfcl(Path("python")).cases(("simple_python", "multiple"), sample=2)
    assert [one.id for one in found] == ["simple_python_0", "simple_python_5", "multiple_0"]


@pytest.fixture
def fake_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `uv` that writes down what it is asked and makes the interpreter's file."""
    program = tmp_path / "bin" / "uv"
    program.parent.mkdir()
    log = tmp_path / "asked"
    program.write_text(
        f'#!/bin/sh\necho "$*" >> {log}\nif [ -e {tmp_path}/broken ]; then echo no network >&2; exit 2; fi\n'
        'if [ "$1" = venv ]; then for last; do :; done; mkdir -p "$last/bin"; touch "$last/bin/python"; fi\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path / "home"))
    return log


def test_the_environment_is_made_once_and_without_the_packages_dependencies(fake_uv: Path) -> None:
    settings = load_settings(profile="smoke")
    bfcl = install_bfcl(settings)
    assert bfcl.python.is_relative_to(settings.home)
    assert install_bfcl(settings).python == bfcl.python
    made, installed = fake_uv.read_text().splitlines()
    assert made.startswith("venv ")
    assert "--no-deps bfcl-eval==" in installed


def test_an_environment_that_could_not_be_filled_is_not_taken_for_finished(fake_uv: Path) -> None:
    settings = load_settings(profile="smoke")
    broken = fake_uv.with_name("broken")
    broken.touch()
    with pytest.raises(PlatformError, match=r"could not be installed[\s\S]*no network"):
        install_bfcl(settings)
    broken.unlink()
    install_bfcl(settings)
    assert len(fake_uv.read_text().splitlines()) == 3


def test_without_uv_it_says_so(fake_uv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("taskagent_platform.evaluation.bfcl.PROJECT_ROOT", tmp_path)  # holds no uv of `make env`
    with pytest.raises(PlatformError, match="install uv"):
        install_bfcl(load_settings(profile="smoke"))


def test_a_fault_of_bfcls_code_is_told_with_its_reason(tmp_path: Path) -> None:
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'ImportError: no module' >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(PlatformError, match=r"ImportError: no module.*env"):
        Bfcl(python).check([])


def test_the_checker_gets_its_request_and_its_answer_is_read(tmp_path: Path) -> None:
    python = tmp_path / "python"
    verdict = json.dumps([{"valid": True, "error_type": None, "error": ""}])
    python.write_text(f"#!/bin/sh\ncp \"$2\" {tmp_path}/request\nprintf '%s' '{verdict}' > \"$3\"\n")
    python.chmod(0o755)
    answer = BfclAnswer(id="a", category="multiple", calls=(("f", "{}"),))
    assert Bfcl(python).check([answer]) == [BfclVerdict(valid=True, error_type=None, error="")]
    assert json.loads((tmp_path / "request").read_text()) == {
        "command": "check", "given": [{"id": "a", "category": "multiple", "calls": [["f", "{}"]]}],
    }  # fmt: skip
