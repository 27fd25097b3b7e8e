"""Figures for Dagster's pages: tables and plots as Markdown."""

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg

from taskagent_platform.evaluation.latency import Latency
from taskagent_platform.evaluation.load_curve import LoadCurve

_MARKUP = re.compile(r"[\\`*\[\]<>|]")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> dg.MarkdownMetadataValue:
    """Returns a Markdown table; what a cell holds is shown as it is, not read as Markdown or HTML."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return dg.MetadataValue.md("\n".join(lines))


def loss_curve(history: Sequence[Mapping[str, Any]]) -> dg.MarkdownMetadataValue | None:
    """Returns the training and evaluation loss over the steps as a picture; None without a single loss.

    Args:
        history: progress records of a training, see :func:`~taskagent_platform.training.fine_tune.fine_tune`.
    """
    trained = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if not trained:
        return None
    figure = _figure()
    axes = figure.add_subplot()
    axes.plot(*zip(*trained, strict=True), label="training loss", linewidth=1.2)
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", label="evaluation loss", markersize=3.5)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if all(loss > 0 for _, loss in [*trained, *evaluated]):
        axes.set_yscale("log")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    return _picture(figure, "training and evaluation loss by step")


def latency_plot(latency: Latency | None, load: LoadCurve | None) -> dg.MarkdownMetadataValue | None:
    """Returns how long single requests took, and throughput and latency by concurrency, as a picture.

    Args:
        latency: of single requests.
        load: the load curve; without it only the single requests are drawn.

    Returns:
        None where no request's time is known.
    """
    if latency is None or not latency.all_ms:
        return None
    figure = _figure()
    panels = figure.subplots(1, 2 if load is not None else 1, squeeze=False)[0]
    panels[0].hist(latency.all_ms, bins=min(20, len(latency.all_ms)))
    panels[0].axvline(latency.p95_ms, linestyle="--", color="black", label=f"p95 {latency.p95_ms:.0f} ms")
    panels[0].set_xlabel("single request, ms")
    panels[0].set_ylabel("requests")
    panels[0].legend()
    if load is not None:
        at_once = [point.concurrency for point in load.points]
        panels[1].plot(at_once, [point.requests_per_s for point in load.points], "o-")
        panels[1].set_xscale("log", base=2)
        panels[1].set_xlabel("requests at once")
        panels[1].set_ylabel("requests/s")
        panels[1].grid(visible=True, alpha=0.25)
    return _picture(figure, "latency of single requests and throughput by concurrency")


def usage_plot(usage: Mapping[str, int], least: int) -> dg.MarkdownMetadataValue | None:
    """Returns how often each tool is called in a dataset, as a picture; None for one without a call.

    Args:
        usage: calls by tool.
        least: the fewest calls that a tool should have, drawn as a line.
    """
    if not any(usage.values()):
        return None
    figure = _figure(height=1 + 0.3 * len(usage))
    axes = figure.add_subplot()
    names = sorted(usage, key=lambda name: usage[name])
    bars = axes.barh(names, [usage[name] for name in names])
    axes.bar_label(bars, padding=3)
    axes.margins(x=0.1)
    axes.axvline(least, linestyle="--", color="black", linewidth=1, label=f"at least {least} in the whole dataset")
    axes.set_xlabel("calls")
    axes.legend(loc="lower right")
    return _picture(figure, "calls of each tool")


def _figure(height: float = 3.0) -> Any:
    # Drawn without pyplot, which would look for a display and keep every figure alive.
    from matplotlib.figure import Figure

    return Figure(figsize=(7, height), layout="constrained")


def _picture(figure: Any, title: str) -> dg.MarkdownMetadataValue:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    encoded = base64.b64encode(picture.getvalue()).decode()
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{encoded})")


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return _MARKUP.sub(r"\\\g<0>", text).replace("\n", " ")
