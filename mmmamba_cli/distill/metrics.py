"""Metrics of a stage: `metrics.jsonl`, TensorBoard files and a plot of the losses.

TensorBoard and matplotlib are optional.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmmamba_cli.checkpoint.atomic_writes import atomic_write_text

if TYPE_CHECKING:
    from mmmamba_cli.distill.trainer import StepResult

METRICS = "metrics.jsonl"
LOSS_PLOT = "losses.png"


def read_metrics(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics file, up to a line that a crash cut short."""
    if not file.is_file():
        return
    with file.open(encoding="utf-8-sig") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                return


def metrics_row(result: StepResult) -> dict[str, Any]:
    """A step as a row of `metrics.jsonl`; held-out metrics are named `held_out/...`."""
    row = {
        "step": result.step,
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "gradient_norm": result.gradient_norm,
        "tokens": result.tokens,
        "tokens_per_second": round(result.tokens_per_second, 1),
        "terms": dict(result.terms),
    }
    if result.memory_gib is not None:
        row["memory_gib"] = round(result.memory_gib, 3)
    if result.bad:
        row["bad_samples"] = list(result.bad)
    if result.skipped is not None:
        row["skipped"] = result.skipped
    if result.held_out is not None:
        row |= {f"held_out/{key}": value for key, value in result.held_out.as_dict().items()}
        row["held_out/bad_samples"] = list(result.held_out.bad)
    return row


class MetricsLog:
    """Appends to `metrics.jsonl` in `folder` and to TensorBoard files in `board`.

    Rows after `resumed_step` are removed first.
    """

    def __init__(self, folder: Path, resumed_step: int, board: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / METRICS
        kept = [row for row in read_metrics(self.file) if row["step"] <= resumed_step]
        atomic_write_text(self.file, "".join(_line(row) for row in kept))
        self._handle = self.file.open("a", encoding="utf-8")
        self._board = _tensorboard(board, resumed_step)

    def write(self, row: Mapping[str, Any]) -> None:
        self._handle.write(_line(row))
        self._handle.flush()
        if self._board is not None:
            for key, value in row.items():
                if isinstance(value, int | float) and key != "step":
                    self._board.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self._handle.close()
        if self._board is not None:
            self._board.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({key: nonfinite_as_text(value) for key, value in row.items()}) + "\n"


def nonfinite_as_text(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: nonfinite_as_text(inner) for key, inner in value.items()}
    return value


def _tensorboard(folder: Path, resumed_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=resumed_step + 1)


def plot_losses(folder: Path) -> Path | None:
    """Plot `losses.png` beside the folder's `metrics.jsonl`; None without matplotlib or metrics.

    Left: training and held-out loss by step. Right: the terms (layers) of the last step.
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
    _plot_curves(left, rows)
    _plot_terms(right, rows[-1]["terms"])
    figure.savefig(folder / LOSS_PLOT, dpi=120)
    return folder / LOSS_PLOT


def _plot_curves(axes: Any, rows: list[dict[str, Any]]) -> None:
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


def _plot_terms(axes: Any, terms: dict[str, Any]) -> None:
    names = [name.removeprefix("layer ") for name in terms]
    axes.bar(names, [_number(value) for value in terms.values()])
    axes.set(xlabel="layer" if len(names) > 2 else "term", ylabel="mean loss at the last step")
    axes.grid(alpha=0.3, axis="y")


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) and math.isfinite(value) else math.nan
