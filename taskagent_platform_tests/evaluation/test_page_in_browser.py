"""The report's page as a browser shows it: its filters work, what a model wrote does nothing, nothing is cut off.

Needs Debian's package `chromium`.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Dialog, Page, Request, sync_playwright

from taskagent_platform.evaluation.page import render_page
from taskagent_platform.evaluation.report import EvalReport, FaultRecord, gate_results
from taskagent_platform_tests.evaluation.test_page import HOSTILE, failed, hostile_report
from taskagent_platform_tests.evaluation.test_report import GATES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def report() -> EvalReport:
    """Three failures: what a hostile model wrote, one of a robustness suite, and one with a very long answer."""
    made = hostile_report()
    hard = failed(1, verdict="abstained", slice="typos", input="shwo them", id="hard")
    fault = FaultRecord(type="wrong_value", sentence="add.room = 'a'; right is 'b'.", tool="add", argument="room")
    long = failed(
        2,
        id="long", list_name="argument_extraction", verdict="wrong_arguments", input="add it", faults=(fault,),
        expected=({"tool": "add", "arguments": {"room": "b"}},), got=({"tool": "add", "arguments": {"room": "a"}},),
        messages=({"role": "assistant", "content": "x" * 5000}, {"role": "tool", "content": "needle " * 2000}),
    )  # fmt: skip
    return made.model_copy(update={"cases": (*made.cases, long), "robustness": (hard,)})


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "Chromium is not installed: apt-get install chromium (see CONTRIBUTING.md)."
    with sync_playwright() as program:
        started = program.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """The page, watched: at the end nothing was asked for but itself, and nothing complained or spoke up."""
    made = report()
    file = tmp_path / "report.html"
    file.write_text(render_page(made, gate_results(made, GATES)))
    shown = browser.new_page()
    asked: list[str] = []
    said: list[str] = []

    def on_request(request: Request) -> None:
        asked.append(request.url)

    def on_dialog(dialog: Dialog) -> None:
        said.append(dialog.message)
        dialog.dismiss()

    shown.on("request", on_request)
    shown.on("dialog", on_dialog)
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.goto(file.as_uri())
    yield shown
    assert asked == [file.as_uri()]
    assert said == []
    shown.close()


def shown_cases(page: Page) -> list[str]:
    assert page.locator("#shown").inner_text() == f"{page.locator('#cases details:visible').count()} of 3 shown"
    return [text.split()[0] for text in page.locator("#cases details:visible summary").all_inner_texts()]


def test_what_a_hostile_model_wrote_is_shown_and_does_nothing(page: Page) -> None:
    assert page.title() == f"Evaluation of {HOSTILE}"
    page.locator("#cases summary").first.click()
    assert page.locator("#cases details").first.inner_text().count(HOSTILE) >= 5
    assert page.locator("img").count() == 0


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        ({"list": "argument_extraction"}, ["long"]),
        ({"suite": "robustness"}, ["hard"]),
        ({"suite": "gated", "verdict": "wrong_arguments"}, ["long"]),
        ({"faults": "wrong_value"}, ["long"]),
        ({"tools": "add"}, ["long"]),
        ({"verdict": "abstained", "list": "argument_extraction"}, []),
    ],
)
def test_failures_are_filtered(page: Page, chosen: dict[str, str], left: list[str]) -> None:
    assert len(shown_cases(page)) == 3
    for name, value in chosen.items():
        page.locator(f"[data-filter={name}]").select_option(value)
    assert shown_cases(page) == left
    for name in chosen:
        page.locator(f"[data-filter={name}]").select_option("")
    assert len(shown_cases(page)) == 3


def test_failures_are_found_by_any_of_their_words(page: Page) -> None:
    page.locator("[data-filter=text]").fill("NEEDLE")
    assert shown_cases(page) == ["long"]
    page.locator("[data-filter=text]").fill("shwo")
    assert shown_cases(page) == ["hard"]


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for summary in page.locator("#cases summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    tall = page.locator("#cases pre").evaluate_all("found => Math.max(...found.map(one => one.clientHeight))")
    assert tall < 400, "a long message scrolls in itself"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    contrasts = page.evaluate(_CONTRASTS)
    assert min(contrasts) >= 4.5, "the least that WCAG asks for"


# Of the page's text, its verdicts and its notes against the canvas, as the browser computes them.
_CONTRASTS = """() => {
  const luminance = (color) => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map((value) => value / 255)
      .map((value) => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const canvas = document.createElement("p");
  canvas.style.color = "canvas";
  document.body.append(canvas);
  const behind = luminance(getComputedStyle(canvas).color);
  canvas.remove();
  return [...document.querySelectorAll("body, .pass, .fail, nav a")].map((found) => {
    const front = luminance(getComputedStyle(found).color);
    return (Math.max(front, behind) + 0.05) / (Math.min(front, behind) + 0.05);
  });
}"""
