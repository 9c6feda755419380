"""Loss curves of a stage as a picture, where matplotlib is installed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mmmamba_cli.distill.metrics import METRICS, read_metrics

PICTURE = "losses.png"


def plot_losses(folder: Path) -> Path | None:
    """Draw `losses.png` beside the folder's metrics.jsonl; None without matplotlib or metrics.

    Left the loss and the held-out loss over the steps, right the terms (layers) of the last step.
    """
    rows = list(read_metrics(folder / METRICS))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not rows:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curves(left, rows)
    _terms(right, rows[-1]["terms"])
    figure.savefig(folder / PICTURE, dpi=120)
    return folder / PICTURE


def _curves(axes: Any, rows: list[dict[str, Any]]) -> None:
    values = [(row["step"], _number(row["loss"])) for row in rows]
    axes.plot(*zip(*values, strict=True), linewidth=1, label="training")
    held_out = [(r["step"], _number(r["held_out/loss"])) for r in rows if "held_out/loss" in r]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", markersize=3, label="held out")
        axes.legend()
    if all(value > 0 for _, value in values):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)


def _terms(axes: Any, terms: dict[str, Any]) -> None:
    names = [name.removeprefix("layer ") for name in terms]
    axes.bar(names, [_number(value) for value in terms.values()])
    axes.set(xlabel="layer" if len(names) > 2 else "term", ylabel="mean loss at the last step")
    axes.grid(alpha=0.3, axis="y")


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) and math.isfinite(value) else math.nan
