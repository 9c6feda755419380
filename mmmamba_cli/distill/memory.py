"""What to say when the device's memory is too small for a stage."""

from __future__ import annotations

from mmmamba_cli.distill.state import Progress
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.recipe import Recipe, Stage


def out_of_memory(
    stage: Stage, recipe: Recipe, progress: Progress, error: Exception
) -> MmmambaError:
    """An error that names the three settings that would help most, with values to try."""
    length = stage.max_length or recipe.data.max_length
    name = f"stages.{stage.name}"
    remedies = []
    parts = _next_divisor(stage.batch_size, stage.accumulation)
    if parts is not None:
        remedies.append(f"--set {name}.accumulation={parts}")
    if stage.precision != "bf16":
        remedies.append(f"--set {name}.precision=bf16")
    remedies.append(f"--set {name}.max_length={max(2, length // 2)}")
    if recipe.data.max_tiles != 1:
        tiles = recipe.data.max_tiles or 12
        remedies.append(f"--set data.max_tiles={max(1, tiles // 2)}")
    remedies.append("or shard over more GPUs with torchrun")
    first = str(error).splitlines()[0] if str(error) else "out of memory"
    return MmmambaError(
        f"stage {stage.name} ran out of device memory after step {progress.step}: {first}",
        "what would help most: " + "; ".join(remedies[:3]) + " (accumulation changes no result; "
        "the others make the saved state another one, so begin anew with --overwrite)",
    )


def _next_divisor(batch: int, parts: int) -> int | None:
    """The next larger number of equal parts of a batch, or None."""
    return next((n for n in range(max(parts * 2, parts + 1), batch + 1) if batch % n == 0), None)
