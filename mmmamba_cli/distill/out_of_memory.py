"""The error of a stage that runs out of device memory."""

from __future__ import annotations

from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.errors import DeviceMemoryError
from mmmamba_cli.recipe import Recipe, Stage


def out_of_memory_error(
    stage: Stage, recipe: Recipe, progress: Progress, error: Exception, micro_batches: int
) -> DeviceMemoryError:
    """An error that names the three settings that reduce memory most, with values to try.

    `micro_batches` is their number in the step that failed.
    """
    length = stage.max_length or recipe.data.max_length
    name = f"stages.{stage.name}"
    remedies = []
    # The next larger number of micro batches that divides the batch.
    more = range(2 * micro_batches, stage.batch_size + 1)
    accumulation = next((n for n in more if stage.batch_size % n == 0), None)
    if accumulation is not None:
        remedies.append(f"--set {name}.accumulation={accumulation}")
    if stage.loss == "kl" and stage.checkpointing is not True:
        remedies.insert(0, f"--set {name}.checkpointing=true")
    if stage.precision != "bf16":
        remedies.append(f"--set {name}.precision=bf16")
    remedies.append(f"--set {name}.max_length={max(2, length // 2)}")
    if recipe.data.max_tiles != 1:
        tiles = recipe.data.max_tiles or 12
        remedies.append(f"--set data.max_tiles={max(1, tiles // 2)}")
    remedies.append("or more GPUs with --parallel shard")
    first = str(error).splitlines()[0] if str(error) else "out of memory"
    return DeviceMemoryError(
        f"stage {stage.name} ran out of device memory after step {progress.step}: {first}",
        "what would help most: " + "; ".join(remedies[:3]) + " (accumulation and "
        "checkpointing do not change the result; with the other settings, start again with "
        "--overwrite)",
    )
