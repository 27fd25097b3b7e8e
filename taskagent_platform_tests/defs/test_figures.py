"""Tables and plots on Dagster's pages."""

import base64

from taskagent_platform.defs.figures import latency_plot, loss_curve, table, usage_plot
from taskagent_platform.evaluation.latency import Latency
from taskagent_platform.evaluation.load_curve import LoadCurve, LoadPoint


def test_what_a_model_wrote_is_no_markup():
    written = table(["said"], [["![x](http://127.0.0.1/x) <b>a</b> `c` | d\ne"]]).md_str
    assert written is not None
    row = written.splitlines()[-1]
    assert row == "| !\\[x\\](http://127.0.0.1/x) \\<b\\>a\\</b\\> \\`c\\` \\| d e |"


def test_latency_is_drawn_with_and_without_a_load_curve():
    latency = Latency(requests=3, p50_ms=2, p95_ms=3, p99_ms=3, all_ms=(1.0, 2.0, 3.0))
    point = LoadPoint(concurrency=1, requests=3, requests_per_s=1.0, p50_ms=1, p95_ms=2)
    load = LoadCurve(points=(point,), saturated_at=None, ended="time")
    pictures = []
    for curve in (None, load):
        drawn = latency_plot(latency, curve)
        assert drawn is not None
        assert drawn.md_str is not None
        pictures.append(base64.b64decode(drawn.md_str.split("base64,")[1].rstrip(")")))
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] != pictures[1]
    assert latency_plot(None, load) is None


def test_the_losses_of_a_training_are_drawn():
    trained = [{"step": step, "loss": 2.0 / step} for step in (1, 2, 3)]
    evaluated = [*trained, {"step": 3, "eval_loss": 0.9}]
    # A loss of zero has no place on a logarithmic axis.
    drawn = set()
    for history in (trained, evaluated, [*trained, {"step": 4, "loss": 0.0}]):
        picture = loss_curve(history)
        assert picture is not None
        assert picture.md_str is not None
        drawn.add(base64.b64decode(picture.md_str.split("base64,")[1].rstrip(")")))
    assert len(drawn) == 3
    assert all(picture.startswith(b"\x89PNG") for picture in drawn)
    assert loss_curve([]) is None


def test_the_calls_of_each_tool_are_drawn():
    drawn = [usage_plot({"create_task": calls, "delete_task": 0}, least=20) for calls in (40, 50)]
    pictures = [picture.md_str for picture in drawn if picture is not None]
    assert all(str(picture).startswith("![calls of each tool](data:image/png;base64,") for picture in pictures)
    assert len(set(pictures)) == 2
    assert usage_plot({"create_task": 0}, least=20) is None
