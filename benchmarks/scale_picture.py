"""The picture of a result of scale_distill.py."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

COLOURS = ("#0072b2", "#b35900", "#007a5a")
INK, RULES = "#1c1e21", "#d9dde2"


def draw(result: dict[str, Any], file: Path) -> None:
    """Speed over the part with fewest GPUs, by number of GPUs, a panel for each kind of scaling."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    kinds = ("strong", "weak")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), kinds, strict=True):
        lines = defaultdict(list)
        for row in result["ratios"]:
            if row["scaling"] == kind:
                per = row.get("rows", row.get("rows_per_gpu"))
                base, gpus = row["gpus"]
                key = row["stage"], per, base, row.get("micro_rows", "1")
                lines[key].append((gpus, row["speed_ratio"] * base))
        widest = max((gpus for points in lines.values() for gpus, _ in points), default=2)
        axes.plot([1, widest], [1, widest], color=INK, linewidth=1, linestyle=":", label="linear")
        for (stage, per, base, micro), points in sorted(lines.items()):
            unit = "rows a step" if kind == "strong" else "rows a GPU"
            colour = COLOURS[int(stage.removeprefix("stage")) % len(COLOURS)]
            style = "-" if per <= 8 else "--"
            line = [(base, base), *sorted(points)]
            label = f"{stage}, {per} {unit}"
            label += "" if micro == "auto" else f", {micro} a micro batch"
            axes.plot(*zip(*line, strict=True), style, marker="o", color=colour, label=label)
        axes.set(title=f"{kind} scaling", xlabel="GPUs", xticks=[1, 2, 4, 8][: widest.bit_length()])
        axes.grid(color=RULES)
        axes.legend(fontsize=8, frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.axes[0].set_ylabel("speed, times one GPU")
    figure.savefig(file)
