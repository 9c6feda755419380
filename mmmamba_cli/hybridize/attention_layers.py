"""Hybrid students: the teacher's attention is copied back into chosen layers, without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmmamba_cli.architecture import ATTENTION, default_mixer
from mmmamba_cli.checkpoint import AnyCheckpoint, Checkpoint, parse_dtype
from mmmamba_cli.checkpoint.hashing import tensor_digest
from mmmamba_cli.errors import RunError
from mmmamba_cli.hybridize.hybrid_product import (
    Hybrid,
    holistic_hybrid,
    in_place_hybrid,
    is_attention,
    mixer_names,
)
from mmmamba_cli.recipe import SCORES_FILE_PREFIX, Recipe, parse_recipe
from mmmamba_cli.runs import Manifest, Parent, ProductSpec, Run, write_product

# The file of scores in a product's name.
FILE_METHOD = "file"
DEFAULT_PLACEMENT = "head-interleaved"


@dataclass(frozen=True)
class LayerSelection:
    """Attention layers chosen by measurement, ascending, and the record for the manifest."""

    layers: tuple[int, ...]
    record: Mapping[str, Any]


def _stages_before_plan(recipe: Recipe) -> tuple[str, ...]:
    """Names of the stages that train every layer, before the recipe's layer plan takes effect."""
    return tuple(stage.name for stage in recipe.stages if stage.layers == "all")


def choose_parent(run: Run, wanted: str | None = None) -> Manifest:
    """The product to start from: `wanted`, else the newest ready student, else the current one.

    The method hybridizes between stages 2 and 3. A linear student is ready if it has done exactly
    the stages of its recipe that train every layer.
    """
    if wanted is not None:
        return run.product(wanted)
    ready = [
        p
        for p in run.products().values()
        if p.stages
        and p.stages == _stages_before_plan(parse_recipe(p.recipe, f"recipe of {p.name}"))
        and not p.attention_layers
    ]
    return ready[-1] if ready else run.product(run.record.current)


def _product_name(layers: Sequence[int], placed: bool) -> str:
    """`linear`, `hybrid-N` for N placed layers, or `hybrid-at-I-J-...` for listed layers."""
    if not layers:
        return "linear"
    return f"hybrid-{len(layers)}" if placed else "hybrid-at-" + "-".join(map(str, layers))


def planned_product_name(recipe: Recipe, layers: Sequence[int]) -> str:
    """Name the product of the recipe's layer plan: `hybrid-8`, `hybrid-8-kl-zero`.

    The name has the measurement that chose the layers, or the placement if not the default.
    """
    plan = recipe.layers
    name = _product_name(layers, isinstance(plan.attention, int))
    if plan.select is not None and layers:
        is_file = plan.select.startswith(SCORES_FILE_PREFIX)
        return f"{name}-{FILE_METHOD if is_file else plan.select}"
    usual = not isinstance(plan.attention, int) or plan.placement == DEFAULT_PLACEMENT
    return name if usual else f"{name}-{plan.placement}"


def hybridize(
    run: Run,
    parent: Manifest,
    layers: Sequence[int],
    name: str,
    *,
    teacher_path: Path | None = None,
    overwrite: bool = False,
    recipe: str | None = None,
    selection: LayerSelection | None = None,
    advance: Callable[[int], None] | None = None,
) -> Manifest:
    """Write product `name`: `parent` with the teacher's attention in exactly the given layers.

    Attention weights are the teacher's in the student's dtype. A layer that becomes linear again
    takes its mixer from the nearest ancestor that has one. `selection` says how the layers were
    chosen, if by measurement. Raises `RunError` if the teacher is not
    the run's, or if no ancestor has a needed mixer.
    """
    if name == parent.name:
        raise RunError(
            f"product {name!r} would be made of itself",
            "name the product to start from with --from",
        )
    student = run.open_any_product(parent.name)
    donors = _mixer_donors(run, parent, student, layers)
    mixers = _planned_mixers(student, layers, donors)
    restored = _restored_layers(mixer_names(student), mixers)
    teacher = run.open_any_teacher(teacher_path) if restored else None
    dtype = parse_dtype(parent.dtype)
    hybrid = (
        holistic_hybrid(student, mixers, dtype)
        if isinstance(student, Checkpoint)
        else in_place_hybrid(student, mixers, donors, dtype)
    )
    spec = ProductSpec(
        name=name,
        made_by="hybridize",
        model=hybrid.model,
        read=_reader(run, student, teacher, donors, hybrid, restored),
        recipe=parent.recipe if recipe is None else recipe,
        parents=lambda: (
            Parent("student", parent.name, parent.content_hash),
            Parent("teacher", run.teacher.path, run.teacher.content_hash),
        ),
        stages=_stages_kept(parent),
        notes=("not yet distilled end to end",),
        selection={} if selection is None else selection.record,
    )
    manifest = write_product(run, spec, overwrite=overwrite, advance=advance)
    run.set_current(name)
    return manifest


def _stages_kept(parent: Manifest) -> tuple[str, ...]:
    """Stages of the parent that stay valid: end-to-end stages do not, since layers change."""
    before = _stages_before_plan(parse_recipe(parent.recipe, f"recipe of {parent.name}"))
    return tuple(stage for stage in parent.stages if stage in before)


def _planned_mixers(
    student: AnyCheckpoint, layers: Sequence[int], donors: Mapping[int, AnyCheckpoint]
) -> tuple[str, ...]:
    """The student's mixers with attention in exactly `layers`, and those of `donors` in theirs."""
    mixers = list(mixer_names(student))
    for layer in layers:
        mixers[layer] = default_mixer(ATTENTION)
    for layer, donor in donors.items():
        mixers[layer] = mixer_names(donor)[layer]
    return tuple(mixers)


def _restored_layers(old: Sequence[str], new: Sequence[str]) -> frozenset[int]:
    """Layers that are attention in the mixers `new` and not in `old`."""
    return frozenset(
        layer
        for layer, (before, after) in enumerate(zip(old, new, strict=True))
        if is_attention(after) and not is_attention(before)
    )


def _mixer_donors(
    run: Run, parent: Manifest, student: AnyCheckpoint, layers: Sequence[int]
) -> dict[int, AnyCheckpoint]:
    """The nearest ancestor with a mixer, for each layer that becomes linear again."""
    missing = [
        layer
        for layer, name in enumerate(mixer_names(student))
        if is_attention(name) and layer not in layers
    ]
    donors: dict[int, AnyCheckpoint] = {}
    ancestors = run.ancestors(parent)
    while missing:
        recorded, ancestor = next(ancestors, (None, None))
        if recorded is None or ancestor is None:
            raise RunError(
                f"no ancestor of {parent.name!r} has a mixer for layers {missing}",
                "start from another product with --from",
            )
        if ancestor.content_hash != recorded.content_hash:
            raise RunError(
                f"product {ancestor.name!r} is not the one {parent.name!r} was made from",
                "it was overwritten since; start from another product with --from",
            )
        opened = run.open_any_product(ancestor.name)
        found = [i for i in missing if not is_attention(mixer_names(opened)[i])]
        donors.update(dict.fromkeys(found, opened))
        missing = [i for i in missing if i not in found]
    return donors


def _reader(
    run: Run,
    student: AnyCheckpoint,
    teacher: AnyCheckpoint | None,
    donors: Mapping[int, AnyCheckpoint],
    hybrid: Hybrid,
    restored: frozenset[int],
) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        layer = hybrid.layer_of(name)
        if layer is None:
            return student.read(name)
        if layer in restored and teacher is not None:
            return _read_verified(run, teacher, name)
        return donors.get(layer, student).read(name)

    return read


def _read_verified(run: Run, teacher: AnyCheckpoint, name: str) -> Tensor:
    """Read a teacher tensor. Raises `RunError` unless the run was seeded from these bytes."""
    digests = run.teacher.digests
    for foreign in teacher.foreign_names(name):
        if tensor_digest(foreign, teacher.source.read(foreign)).hex() != digests.get(foreign):
            raise RunError(
                f"{teacher.path} is not the teacher of {run.folder}: {foreign} differs from the "
                "one it was seeded from",
                "name the right one with --teacher, or seed a new --run from this one",
            )
    return teacher.read(name)
