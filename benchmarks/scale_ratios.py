"""Speed of distillation on several GPUs over that on the fewest: strong and weak scaling."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

# Relative difference of losses that rounding may make.
TOLERANCE = 1e-4


def ratios(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Speed of each part over the part with fewest GPUs, in strong and in weak scaling."""
    strong, weak = defaultdict(list), defaultdict(list)
    modes = {part["parallel"] for part in parts.values() if part["gpus"] > 1}
    for part in parts.values():
        # A part of an older file had one row in a micro batch.
        micro = str(part.get("micro_rows", 1))
        # One process has nothing to divide, and is the base of every mode.
        for mode in modes if part["gpus"] == 1 else [part["parallel"]]:
            strong[part["stage"], part["rows"], mode, micro].append(part)
            weak[part["stage"], part["rows"] // part["gpus"], mode, micro].append(part)
    found = []
    for kind, groups in (("strong", strong), ("weak", weak)):
        for (stage, rows, parallel, micro), members in sorted(groups.items()):
            first, *others = sorted(members, key=lambda one: one["gpus"])
            for one in others:
                ratio = one["tokens_per_second"] / first["tokens_per_second"]
                row = {
                    "scaling": kind,
                    "stage": stage,
                    "parallel": parallel,
                    "micro_rows": micro,
                    "rows" if kind == "strong" else "rows_per_gpu": rows,
                    "gpus": [first["gpus"], one["gpus"]],
                    "speed_ratio": round(ratio, 3),
                    "efficiency": round(ratio * first["gpus"] / one["gpus"], 3),
                }
                if kind == "strong":
                    row["loss_difference"] = difference(first["losses"], one["losses"])
                    row["same_losses"] = row["loss_difference"] < TOLERANCE
                found.append(row)
    return found


def difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Largest relative difference of the losses that both have."""
    pairs = zip(first, second, strict=False)
    return max(abs(a - b) / abs(a) for a, b in pairs)
