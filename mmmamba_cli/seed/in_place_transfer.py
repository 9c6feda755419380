"""Step 1 for other teachers: the teacher's tensors and those of the mixers, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.checkpoint import (
    InPlaceCheckpoint,
    TensorHasher,
    combined_hash,
)
from mmmamba_cli.checkpoint.in_place_checkpoint import student_layers
from mmmamba_cli.errors import CheckpointError, MmmambaError, RecipeError
from mmmamba_cli.recipe import (
    CALIBRATED,
    Recipe,
    attention_layers,
    dump_recipe,
    layer_mixers,
    mixer_options,
)
from mmmamba_cli.runs import Manifest, Parent, ProductSpec, Run, Teacher, write_product
from mmmamba_cli.runs.in_place_product import in_place_model, new_tensors
from mmmamba_cli.runs.run import recorded_path
from mmmamba_cli.seed.initial_values import PROJECTIONS, initial_value
from mmmamba_cli.seed.weight_transfer import SEED_PRODUCT, orphaned_products, start_run
from mmmamba_cli.teachers import (
    ExpectedTensor,
    StudentPlan,
    anatomy_of,
    bidirectional_warning,
    new_value,
    student_config,
)

SCRATCH = "scratch"


def in_place_plan(teacher: InPlaceCheckpoint, recipe: Recipe) -> StudentPlan:
    """The mixers of a student before attention is restored, and their options.

    Raises:
        RecipeError: a mixer or attention of a layer that the teacher lacks, or an init that needs
            HoVLE.
        MmmambaError: options that the teacher cannot have.
    """
    if recipe.mixer.init == CALIBRATED:
        raise RecipeError(
            f"mixer.init is {CALIBRATED}, which a student in place of a transformers model cannot "
            "have yet",
            "use inherit+mimic",
        )
    # The layers of a later stage: a count that does not fit is refused before anything is written.
    attention_layers(recipe.layers, teacher.num_layers)
    mixers = layer_mixers(recipe.mixer.kind, recipe.layers.mixers, teacher.num_layers)
    return StudentPlan(tuple(mixers), mixer_options(recipe.mixer))


def in_place_config(
    teacher: InPlaceCheckpoint, recipe: Recipe, *, allow_bidirectional: bool = False
) -> Any:
    """The config of a teacher's student.

    Raises:
        CheckpointError: the teacher is a student, or it cannot be converted.
        RecipeError, MmmambaError: see `in_place_plan`.
    """
    if teacher.is_student:
        raise CheckpointError(
            f"{teacher.path} is not a teacher: some of its layers have mixers already",
            "give the model that it was made from",
        )
    # Refuses what cannot be converted before the recipe is compared with it.
    anatomy_of(teacher.config)
    warning = bidirectional_warning(teacher.config)
    if warning is not None and not allow_bidirectional:
        raise MmmambaError(warning, "convert it nevertheless with --allow-bidirectional")
    plan = in_place_plan(teacher, recipe)
    return student_config(teacher.config, plan, allow_bidirectional=True)


def seed_in_place(
    run: Run,
    teacher: InPlaceCheckpoint,
    recipe: Recipe,
    *,
    dtype: torch.dtype,
    overwrite: bool = False,
    discard: bool = False,
    allow_bidirectional: bool = False,
    advance: Callable[[int], None] | None = None,
    hasher: TensorHasher | None = None,
) -> Manifest:
    """Start `run` with a student of a transformers model. See `seed_student`.

    The student's tensors are the teacher's, under their names on disk, and those that the mixers
    add. A head that repeats the token table it is tied to is left out.

    Raises:
        CheckpointError: the teacher cannot be converted, is not complete, or has NaN or infinity.
        MmmambaError: image tokens attend in both directions, and `allow_bidirectional` is false.
        RunError: see `seed_student`.
    """
    others = orphaned_products(run, overwrite, discard)
    place = recorded_path(teacher.path)
    config = in_place_config(teacher, recipe, allow_bidirectional=allow_bidirectional)
    repeated = _repeated_names(teacher)
    warning = bidirectional_warning(teacher.config)
    with hasher or TensorHasher() as teacher_hasher:
        for name, other in repeated.items():
            _check_equal(teacher, teacher_hasher, name, other)
        spec = ProductSpec(
            name=SEED_PRODUCT,
            made_by="seed",
            model=in_place_model(config, teacher, dtype, _stored_names(teacher)),
            read=_reader(teacher, teacher_hasher, recipe, new_tensors(config)),
            recipe=dump_recipe(recipe),
            # Called after every tensor is read and hashed.
            hasher=teacher_hasher,
            parents=lambda: (Parent("teacher", str(teacher.path), teacher_hasher.result()),),
            notes=() if warning is None else (warning,),
        )
        manifest = write_product(run, spec, overwrite=overwrite, advance=advance)
        digests = teacher_hasher.digests()
    record = Teacher(
        path=place,
        config=None,
        arch=None,
        content_hash=combined_hash(digests),
        digests={name: digest.hex() for name, digest in digests.items()},
        in_place=True,
    )
    start_run(run, record, others)
    return manifest


def seed_in_place_bytes(
    teacher: InPlaceCheckpoint,
    recipe: Recipe,
    dtype: torch.dtype,
    *,
    allow_bidirectional: bool = False,
) -> int:
    """Bytes that `seed_in_place` writes; raises what it raises for teacher and recipe."""
    config = in_place_config(teacher, recipe, allow_bidirectional=allow_bidirectional)
    model = in_place_model(config, teacher, dtype, _stored_names(teacher))
    return sum(info.nbytes for info in model.tensors.values())


def _stored_names(teacher: InPlaceCheckpoint) -> dict[str, str]:
    """The teacher's tensors that its student has: name in the model by name on disk."""
    repeated = _repeated_names(teacher)
    return {n: own for n, own in teacher.layout.names.items() if n not in repeated}


def _repeated_names(teacher: InPlaceCheckpoint) -> dict[str, str]:
    """Names on disk of tied tensors, and that of the tensor which each of them repeats."""
    on_disk = {own: name for name, own in teacher.layout.names.items()}
    tied = teacher.layout.tied.items()
    return {name: on_disk[own] for name, own in tied if own in on_disk}


def _check_equal(teacher: InPlaceCheckpoint, hasher: TensorHasher, name: str, other: str) -> None:
    """Hash tensor `name`; raise `CheckpointError` unless it equals `other`, which it is tied to."""
    tensor = hasher.submit(name, teacher.read(name))
    if not torch.equal(tensor, teacher.read(other)):
        raise CheckpointError(
            f"{teacher.path}: tie_word_embeddings is true, but {name} differs from {other}",
            "set tie_word_embeddings to false in its config.json, or remove that tensor",
        )


def _reader(
    teacher: InPlaceCheckpoint,
    hasher: TensorHasher,
    recipe: Recipe,
    new: Mapping[str, ExpectedTensor],
) -> Callable[[str], Tensor]:
    """A function that returns a student's tensor: the teacher's, checked and hashed, or a new one.

    With init scratch, projections of mixers are random and norms of q and k are the teacher's.
    """
    init, seed = recipe.mixer.init, recipe.seed
    layers = student_layers(teacher) if init == SCRATCH else {}
    mixers = in_place_plan(teacher, recipe).mixers

    def read(name: str) -> Tensor:
        if name not in new:
            tensor = hasher.submit(name, teacher.read(name), check=True)
            part = ".".join(teacher.layout.names[name].split(".")[-2:])
            if name in layers and part.split(".")[0] in PROJECTIONS:
                layer = layers[name]
                own = f"layers.{layer}.mixer.{part}"
                return initial_value(own, tuple(tensor.shape), mixers[layer], init, seed)
            return tensor
        one = new[name]
        assert one.mixer is not None and one.layer is not None and one.part is not None
        mimic = init == "inherit+mimic"
        return new_value(one.mixer, one.layer, one.part, one.shape, mimic=mimic, seed=seed)

    return read
