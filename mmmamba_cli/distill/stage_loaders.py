"""The data of a stage as batches."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from mmmamba_cli.checkpoint import AnyCheckpoint, InPlaceCheckpoint
from mmmamba_cli.data import (
    HELD_OUT,
    Corpus,
    FoundIndex,
    SampleIndex,
    StepLoader,
    find_index,
    open_corpus,
    read_index,
)
from mmmamba_cli.distill.micro_batches import stage_accumulation
from mmmamba_cli.distributed import World
from mmmamba_cli.errors import DataError, RecipeError, RunError
from mmmamba_cli.processing import TeacherProcessor, TrainingProcessor
from mmmamba_cli.recipe import Data, Recipe, Stage, stage_data
from mmmamba_cli.runs import open_training_processor
from mmmamba_cli.teachers import packing_problem


def build_loaders(
    student: AnyCheckpoint,
    recipe: Recipe,
    stage: Stage,
    world: World,
    log: Callable[[str], None],
    *,
    processes: int | None = None,
    require_packed: bool = False,
) -> tuple[StepLoader, StepLoader | None]:
    """Training batches, and held-out batches if the recipe names a held-out set.

    Batches are the share of this process, of `processes` ones if given, which need not exist.
    A data index of a set is used if there is one. `log` prints a line about it, and about each
    setting of the data that does not apply to the student.

    Rows are bucketed where `data.batching` is packed and the student's cannot be;
    `require_packed` raises an error instead.

    Raises:
        RecipeError: rows cannot be packed.
        RunError: the recipe names no data, or the student has no tokenizer.
        CheckpointError: its processor cannot be opened.
        DataError: data that cannot be opened.
    """
    data = stage_data(recipe.data, stage)
    if isinstance(student, InPlaceCheckpoint):
        data = _for_teachers_processor(data, student, require_packed, log)
    if data.train is None:
        raise RunError(
            "there is nothing to learn from: the recipe's data.train is null",
            "name conversations with --data SOURCE (and --image-root FOLDER), or in the recipe",
        )
    processor = _require_processor(student)
    seed = recipe.seed if data.shuffle_seed is None else data.shuffle_seed
    root = None if data.image_root is None else Path(data.image_root)

    def loader(source: str, stream: str, shuffle: bool, single_pass: bool = False) -> StepLoader:
        corpus, index = _open_data(
            source,
            lambda index: open_corpus(source, root, seed=seed, stream=stream, index=index),
            lambda corpus: find_index(source, corpus, processor, data.max_tiles),
            _index_command(source, data),
            world,
            log,
        )
        return StepLoader(
            corpus,
            processor,
            batch_size=stage.batch_size,
            accumulation=stage_accumulation(stage),
            max_length=stage.max_length or data.max_length,
            batching=data.batching,
            shuffle=shuffle,
            seed=seed,
            max_tiles=data.max_tiles,
            workers=data.workers,
            pin_memory=world.device.type == "cuda",
            rank=world.rank,
            world_size=processes or world.size,
            single_pass=single_pass,
            index=index,
        )

    held_out = None
    if data.held_out is not None:
        held_out = loader(data.held_out, HELD_OUT, False, single_pass=True)
    # Each stage reads a stream of its own, so that no generated sample is read twice.
    return loader(data.train, stage.name, data.shuffle), held_out


def _require_processor(student: AnyCheckpoint) -> TrainingProcessor | TeacherProcessor:
    """The processor of the student's folder. Raises `RunError` and `CheckpointError`."""
    processor = open_training_processor(student)
    if processor is None:
        raise RunError(
            f"{student.path} has no tokenizer, so conversations cannot be read",
            "seed again with --tokenizer FILE",
        )
    return processor


def _index_command(source: str, data: Data) -> str:
    """The command that builds the index which these settings need."""
    words = ["mmmamba", "data", "index", source]
    words += [] if data.image_root is None else ["--image-root", data.image_root]
    words += [] if data.max_tiles is None else ["--max-tiles", str(data.max_tiles)]
    return shlex.join(words)


def _open_data(
    source: str,
    open_source: Callable[[SampleIndex | None], Corpus],
    find: Callable[[Corpus], FoundIndex],
    index_command: str,
    world: World,
    log: Callable[[str], None],
) -> tuple[Corpus, SampleIndex | None]:
    """A source and its data index, None without one that every process can open.

    With an index, only process 0 searches the source for its samples.
    """
    opened: list[Corpus] = []

    def open_and_find() -> FoundIndex:
        opened.append(open_source(None))
        return find(opened[0])

    found = world.run_on_main(open_and_find)
    for reason in found.stale:
        log(f"data index: {reason}; `{index_command}` builds another")
    index = None if found.file is None else _open_index(found.file, world, log)
    return (opened[0] if opened else open_source(index)), index


def _open_index(file: Path, world: World, log: Callable[[str], None]) -> SampleIndex | None:
    index, problem = None, []
    try:
        index = read_index(file)
    except DataError as error:
        problem = [error.message]
    # With an index in some of the processes only, they could plan different batches.
    problems = world.all_gather(problem)
    if problems:
        log(f"data index: not used, {problems[0]}")
        return None
    log(f"data index: {file}, each process prepares only its share of a batch")
    return index


def _for_teachers_processor(
    data: Data, student: InPlaceCheckpoint, require_packed: bool, log: Callable[[str], None]
) -> Data:
    """`data` without the settings that a teacher's own processor or its model does not have."""
    changes: dict[str, object] = {}
    problem = packing_problem(student.config) if data.batching == "packed" else None
    if problem is not None:
        if require_packed:
            raise RecipeError(
                f"data.batching is set to packed, and {problem}",
                "set data.batching to bucketed or padded",
            )
        log(f"data.batching: bucketed in place of packed, since {problem}")
        changes["batching"] = "bucketed"
    if data.max_tiles is not None:
        log("data.max_tiles is ignored: the teacher's processor sets the resolution")
        changes["max_tiles"] = None
    return data.model_copy(update=changes)
