"""Tables and plots on Dagster's pages."""

import base64

from taskagent_platform.defs.figures import latency_plot, table
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
