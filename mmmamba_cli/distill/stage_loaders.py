"""The data of a stage as batches."""

from __future__ import annotations

from pathlib import Path

from mmmamba_cli.checkpoint import AnyCheckpoint, InPlaceCheckpoint
from mmmamba_cli.checkpoint.checkpoint import NOT_YET_HINT, NOT_YET_IN_PLACE
from mmmamba_cli.data import HELD_OUT, StepLoader, open_corpus
from mmmamba_cli.distributed import World
from mmmamba_cli.errors import CheckpointError, RunError
from mmmamba_cli.recipe import Recipe, Stage, stage_data
from mmmamba_cli.runs import open_processor


def build_loaders(
    student: AnyCheckpoint, recipe: Recipe, stage: Stage, world: World
) -> tuple[StepLoader, StepLoader | None]:
    """Training batches, and held-out batches if the recipe names a held-out set."""
    data = stage_data(recipe.data, stage)
    if data.train is None:
        raise RunError(
            "there is nothing to learn from: the recipe's data.train is null",
            "name conversations with --data SOURCE (and --image-root FOLDER), or in the recipe",
        )
    if isinstance(student, InPlaceCheckpoint):
        raise CheckpointError(f"{student.path} {NOT_YET_IN_PLACE}", NOT_YET_HINT)
    processor = open_processor(student)
    if processor is None:
        raise RunError(
            f"{student.path} has no tokenizer, so conversations cannot be read",
            "seed again with --tokenizer FILE",
        )

    seed = recipe.seed if data.shuffle_seed is None else data.shuffle_seed
    root = None if data.image_root is None else Path(data.image_root)

    def loader(source: str, stream: str, shuffle: bool, single_pass: bool = False) -> StepLoader:
        return StepLoader(
            open_corpus(source, root, seed=seed, stream=stream),
            processor,
            batch_size=stage.batch_size,
            accumulation=stage.accumulation,
            max_length=stage.max_length or data.max_length,
            batching=data.batching,
            shuffle=shuffle,
            seed=seed,
            max_tiles=data.max_tiles,
            workers=data.workers,
            pin_memory=world.device.type == "cuda",
            rank=world.rank,
            world_size=world.size,
            single_pass=single_pass,
        )

    held_out = None
    if data.held_out is not None:
        held_out = loader(data.held_out, HELD_OUT, False, single_pass=True)
    # Each stage reads a stream of its own, so that no generated sample is read twice.
    return loader(data.train, stage.name, data.shuffle), held_out
