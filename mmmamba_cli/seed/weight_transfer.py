"""Step 1: transfer of a trained teacher's weights to a linear student, tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mmmamba_cli.architecture import (
    Architecture,
    mixer_spec,
    parameter_shapes,
    tile_options_problem,
)
from mmmamba_cli.checkpoint import Checkpoint, TensorHasher, checked_reader, combined_hash
from mmmamba_cli.errors import CheckpointError, RecipeError, RunError
from mmmamba_cli.model import LINEAR, HolisticVLMConfig
from mmmamba_cli.recipe import (
    CALIBRATED,
    Recipe,
    attention_layers,
    dump_recipe,
    layer_mixers,
    mixer_options,
)
from mmmamba_cli.runs import (
    Manifest,
    Parent,
    ProductSpec,
    Run,
    RunRecord,
    Teacher,
    holistic_model,
    write_product,
)
from mmmamba_cli.runs.run import recorded_path
from mmmamba_cli.seed.calibration_walk import CalibratedStart, calibrate
from mmmamba_cli.seed.initial_values import INHERITED_PARAMETERS, initial_value

SEED_PRODUCT = "seed"


def student_config(teacher: HolisticVLMConfig, recipe: Recipe) -> HolisticVLMConfig:
    """The teacher's config with the recipe's mixers and their options.

    Raises:
        RecipeError: a mixer or attention of a layer that the teacher lacks, or taps inside tiles
            that it lacks.
    """
    # The layers of a later stage: a count that does not fit is refused before anything is written.
    attention_layers(recipe.layers, teacher.num_hidden_layers)
    mixers = layer_mixers(recipe.mixer.kind, recipe.layers.mixers, teacher.num_hidden_layers)
    options = mixer_options(recipe.mixer).stored()
    problem = tile_options_problem(replace(Architecture.from_config(teacher), mixer=options))
    if problem is not None:
        raise RecipeError(problem)
    return HolisticVLMConfig.from_dict(
        {
            **teacher.to_dict(),
            "layer_types": [mixer_spec(name).layer_type for name in mixers],
            "mixers": mixers,
            "mixer": options,
        }
    )


def seed_student(
    run: Run,
    teacher: Checkpoint,
    recipe: Recipe,
    *,
    dtype: torch.dtype,
    overwrite: bool = False,
    discard: bool = False,
    config_file: Path | None = None,
    arch: str | None = None,
    advance: Callable[[int], None] | None = None,
    hasher: TensorHasher | None = None,
) -> Manifest:
    """Start `run` with a student seeded from `teacher`. See `ProductSpec` and `write_product`.

    Every tensor of the teacher is read once, checked for NaN and infinity, and hashed. `overwrite`
    replaces the run's seed, and `discard` also removes its other products. With `init: calibrated`
    the teacher is first read layer by layer, with samples of the recipe's data (`calibrate`).
    `hasher` may hash the teacher already (`TensorHasher.submit_ahead`); it is closed.

    Raises:
        RecipeError, DataError: calibration lacks samples.
        RunError: if the run has products and `overwrite` is false, or has products besides the seed
            and `discard` is false; if the path of the teacher is not UTF-8.
    """
    if LINEAR in teacher.config.layer_types:
        raise CheckpointError(
            f"{teacher.path} is not a teacher: some of its layers are linear already",
            "it is a student already: `mmmamba import` takes it into a run",
        )
    others = orphaned_products(run, overwrite, discard)
    place = recorded_path(teacher.path)
    config_place = None if config_file is None else recorded_path(config_file)
    config = student_config(teacher.config, recipe)
    kept = {n: s for n, s in teacher.shapes.items() if n.startswith("unused.")}
    shapes = {**parameter_shapes(config), **kept}
    start = _calibrated_start(teacher, recipe, config, shapes)
    with hasher or TensorHasher() as teacher_hasher:
        spec = ProductSpec(
            name=SEED_PRODUCT,
            made_by="seed",
            model=holistic_model(config, shapes, teacher, dtype),
            read=_reader(
                teacher, checked_reader(teacher, teacher_hasher), recipe, config, shapes, start
            ),
            recipe=dump_recipe(recipe),
            # Called after every tensor is read and hashed.
            hasher=teacher_hasher,
            parents=lambda: (Parent("teacher", str(teacher.path), teacher_hasher.result()),),
            notes=(
                *(f"assumed, not read: {field}" for field in teacher.assumed),
                *(() if start is None else (start.note,)),
            ),
            metrics={} if start is None else start.metrics,
            data={} if start is None else {"calibration": start.samples.digests.as_dict()},
        )
        manifest = write_product(run, spec, overwrite=overwrite, advance=advance)
        digests = teacher_hasher.digests()
    record = Teacher(
        path=place,
        config=config_place,
        arch=arch,
        content_hash=combined_hash(digests),
        digests={name: digest.hex() for name, digest in digests.items()},
    )
    start_run(run, record, others)
    return manifest


def orphaned_products(run: Run, overwrite: bool, discard: bool) -> list[str]:
    """Products besides the seed, which a new seed removes.

    Raises:
        RunError: the run has products and `overwrite` is false, or has others than the seed and
            `discard` is false.
    """
    others = [name for name in run.products() if name != SEED_PRODUCT]
    if run.products() and not overwrite:
        raise RunError(
            f"{run.folder} already has products ({', '.join(run.products())})",
            "start over with --overwrite, or choose another --run",
        )
    if others and not discard:
        raise RunError(
            f"{run.folder} has products that a new seed would orphan: {', '.join(others)}",
            "choose another --run to keep them, or remove them with --overwrite --discard",
        )
    return others


def start_run(run: Run, teacher: Teacher, orphans: Sequence[str]) -> None:
    """Record the teacher of a run whose seed is written, and remove `orphans`."""
    # Products of the old seed have lost their parent.
    for name in orphans:
        shutil.rmtree(run.product_folder(name))
    run.write_record(RunRecord(teacher=teacher, current=SEED_PRODUCT))


def _calibrated_start(
    teacher: Checkpoint,
    recipe: Recipe,
    config: HolisticVLMConfig,
    shapes: dict[str, tuple[int, ...]],
) -> CalibratedStart | None:
    """The fitted parameters of `init: calibrated`; None for the other ones, which read no data."""
    if recipe.mixer.init != CALIBRATED:
        return None
    read = _reader(teacher, teacher.read, recipe, config, shapes, None)
    return calibrate(teacher, config, recipe, read)


def _reader(
    teacher: Checkpoint,
    read_teacher: Callable[[str], Tensor],
    recipe: Recipe,
    config: HolisticVLMConfig,
    shapes: dict[str, tuple[int, ...]],
    start: CalibratedStart | None,
) -> Callable[[str], Tensor]:
    """A function that returns a student tensor: the teacher's, a calibrated or an initial one."""
    init, seed = recipe.mixer.init, recipe.seed

    def read(name: str) -> Tensor:
        if name in teacher:
            tensor = read_teacher(name)
            if init != "scratch" or not name.endswith(INHERITED_PARAMETERS):
                return tensor
        calibrated = None if start is None else start.value(name)
        if calibrated is not None:
            return calibrated
        mixer = config.mixer_names[int(name.split(".")[2])]
        return initial_value(name, shapes[name], mixer, init, seed)

    return read
