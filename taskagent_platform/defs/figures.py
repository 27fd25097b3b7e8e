"""Figures for Dagster's pages: tables and plots as Markdown."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> dg.MarkdownMetadataValue:
    """Returns a Markdown table; pipes and line breaks inside the cells are made harmless."""
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
    # The figure is drawn without pyplot, which would look for a display and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
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
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    encoded = base64.b64encode(picture.getvalue()).decode()
    return dg.MetadataValue.md(f"![training and evaluation loss by step](data:image/png;base64,{encoded})")


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
