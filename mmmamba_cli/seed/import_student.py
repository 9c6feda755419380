"""Import of a student into a run: a published mmMamba, or a native folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from mmmamba_cli.architecture import mixer_spec
from mmmamba_cli.checkpoint import (
    DTYPE_TENSOR,
    Checkpoint,
    TensorHasher,
    check_finite,
    checked_reader,
    combined_hash,
    public_model_name,
)
from mmmamba_cli.errors import CheckpointError, RunError, check_utf8
from mmmamba_cli.model import LINEAR, HolisticVLMConfig
from mmmamba_cli.model.config import INHERITED_FIELDS
from mmmamba_cli.recipe import dump_recipe, load_recipe
from mmmamba_cli.runs.manifest import Manifest, Parent
from mmmamba_cli.runs.product import ProductSpec, holistic_model, write_product
from mmmamba_cli.runs.provenance import Provenance, find_manifest, provenance_of
from mmmamba_cli.runs.run import PRODUCT_NAME, Run, RunRecord, Teacher, recorded_path

IMPORTED_PRODUCT = "imported"
PUBLISHED_RECIPE = "mmmamba-linear"


def import_student(
    run: Run,
    student: Checkpoint,
    teacher: Checkpoint | None = None,
    *,
    name: str = IMPORTED_PRODUCT,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Manifest:
    """Write `student` into the run as product `name` and make it the current one.

    A new run is created; an existing one keeps its teacher. The stages done are read from the
    student (`provenance_of`). `dtype` None keeps the student's. `advance` is called with the number
    of bytes written.

    Raises:
        CheckpointError: if all layers are attention, or the student does not fit the teacher.
        RunError: if the teacher is not the run's, or the product exists and `overwrite` is false.
    """
    if LINEAR not in student.config.layer_types:
        raise CheckpointError(
            f"{student.path} is no student: all its layers are attention",
            f"`mmmamba seed {student.path}` makes one of it",
        )
    if PRODUCT_NAME.fullmatch(name) is None:
        raise RunError(
            f"{name!r} cannot be a product's name", "use letters, digits, '.', '_' and '-'"
        )
    check_utf8(_origin_name(student))
    known = _teacher_of(run, student, teacher)
    before, provenance = find_manifest(student), provenance_of(student)
    with TensorHasher() as hasher:
        spec = ProductSpec(
            name=name,
            made_by="import",
            model=holistic_model(
                student.config,
                student.shapes,
                student,
                dtype or student.dtype(DTYPE_TENSOR),
            ),
            read=checked_reader(student, hasher),
            recipe=_published_recipe(student.config) if before is None else before.recipe,
            hasher=hasher,
            parents=lambda: (
                Parent("origin", _origin_name(student), hasher.result()),
                *(() if known is None else (Parent("teacher", known.path, known.content_hash),)),
            ),
            stages=provenance.stages,
            final=provenance.final,
            metrics={} if before is None else before.metrics,
            notes=_notes(provenance, before),
        )
        manifest = write_product(run, spec, overwrite=overwrite, advance=advance)
    run.write_record(RunRecord(teacher=known, current=name))
    return manifest


def _teacher_of(run: Run, student: Checkpoint, given: Checkpoint | None) -> Teacher | None:
    """The run's teacher, else the given one. Raises unless the student fits it."""
    known = run.record.teacher if run.exists else None
    if known is not None and known.in_place:
        raise RunError(
            f"{run.folder} has students of transformers' own classes, and this is another kind",
            "import into another --run",
        )
    if given is None:
        if known is not None and Path(known.path).exists():
            _check_fit(student, run.open_teacher())
        return known
    _check_fit(student, given)
    found = _digest_teacher(given)
    if known is not None and known.content_hash != found.content_hash:
        raise RunError(
            f"{given.path} is not the teacher of {run.folder}",
            "leave out --teacher, or import into another --run",
        )
    return known or found


def _check_fit(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raise `CheckpointError` unless the teacher is a teacher and the inherited fields agree."""
    if LINEAR in teacher.config.layer_types:
        raise CheckpointError(
            f"{teacher.path} is not a teacher: some of its layers are linear already",
            "give the model the student was made from",
        )
    one, two = student.config, teacher.config
    field = next((f for f in INHERITED_FIELDS if getattr(one, f) != getattr(two, f)), None)
    if field is not None:
        raise CheckpointError(
            f"{student.path} was not made from {teacher.path}: {field} is {getattr(one, field)} in "
            f"the one and {getattr(two, field)} in the other",
            "give the model the student was made from, or leave out --teacher",
        )


def _digest_teacher(teacher: Checkpoint) -> Teacher:
    """The teacher's record: every tensor is checked and hashed."""
    place = recorded_path(teacher.path)
    with TensorHasher() as hasher:
        for name in teacher.source.names:
            tensor = teacher.source.read(name)
            check_finite(tensor, name)
            hasher.submit(name, tensor)
        digests = hasher.digests()
    return Teacher(
        path=place,
        config=None,
        arch=None,
        content_hash=combined_hash(digests),
        digests={name: digest.hex() for name, digest in digests.items()},
    )


def _notes(provenance: Provenance, before: Manifest | None) -> tuple[str, ...]:
    """The student's notes and a note on the import."""
    if before is not None:
        return (*provenance.notes, f"imported: product {before.name!r} of another run")
    return tuple(f"imported: {note}" for note in provenance.notes or ("by a field of its config",))


def _published_recipe(config: HolisticVLMConfig) -> str:
    """The paper's recipe with the student's own layers and mixer."""
    linear = [
        name
        for name, kind in zip(config.mixer_names, config.layer_types, strict=True)
        if kind == LINEAR
    ]
    usual = max(dict.fromkeys(linear), key=linear.count)
    others: dict[str, list[int]] = {}
    for layer, name in enumerate(config.mixer_names):
        if name in linear and name != usual:
            others.setdefault(name, []).append(layer)
    # An option may be left over from a layer that became attention; recipes refuse unread ones.
    read = {option for name in linear for option in mixer_spec(name).options}
    options = asdict(config.mixer_config)
    overrides = {
        "layers.attention": list(config.attention_layers),
        "layers.mixers": others,
        "mixer.kind": usual,
        **{f"mixer.{name}": value for name, value in options.items() if name in read},
    }
    return dump_recipe(load_recipe(PUBLISHED_RECIPE, (), overrides))


def _origin_name(checkpoint: Checkpoint) -> str:
    """The origin of a checkpoint: its Hub id, or its path."""
    return public_model_name(checkpoint.path) or str(checkpoint.path)
