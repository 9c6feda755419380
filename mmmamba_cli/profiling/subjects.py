"""Subjects of a profile: products and the teacher of a run, and checkpoints by path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mmmamba_cli.architecture import slow_decoding_reason
from mmmamba_cli.checkpoint import InPlaceCheckpoint
from mmmamba_cli.errors import DataError, RunError
from mmmamba_cli.inference import quantize
from mmmamba_cli.model import HolisticVLM, HolisticVLMConfig
from mmmamba_cli.profiling.eager_decoder import EagerDecoder
from mmmamba_cli.profiling.fast_decoder import FastDecoder
from mmmamba_cli.profiling.in_place_decoder import InPlaceDecoder
from mmmamba_cli.profiling.interfaces import (
    AS_SHIPPED,
    EAGER,
    GENERATOR,
    GROWING,
    STATIC,
    STATIC_TEACHER,
    STUDENT,
    TRANSFORMERS,
    TUNED,
    Decoder,
    Subject,
    SubjectInfo,
)
from mmmamba_cli.profiling.shared_weights import WeightStore
from mmmamba_cli.recipe import plan_kind
from mmmamba_cli.runs import (
    ResolvedModel,
    Run,
    check_unique_names,
    resolve_path,
    resolve_product,
    resolve_teacher,
)

DECODED_BY_TRANSFORMERS = "models of transformers are decoded by their own class"


def run_subjects(
    store: WeightStore,
    folder: Path,
    products: Sequence[str] = (),
    *,
    teacher: bool | None = None,
    teacher_path: Path | None = None,
    eager: bool = False,
) -> list[Subject]:
    """A run's two teacher baselines and its products, by default the newest of each layer plan.

    Models of transformers are decoded by their own class, also without `eager`.

    Args:
        teacher: whether to include the teacher; None includes it if the run has one.
        teacher_path: where the teacher is, if it has moved.
        eager: decode with PyTorch's kernels, without CUDA graphs.

    Raises:
        RunError: for a missing product or teacher.
    """
    run = Run(folder)
    has_teacher = run.record.teacher is not None
    names = [run.product(name).name for name in dict.fromkeys(products)] or _newest_of_each_plan(
        run
    )
    found: list[Subject] = []
    if has_teacher if teacher is None else teacher:
        found += teacher_subjects(store, folder, teacher_path, eager=eager)
    return found + [
        _checkpoint_subject(store, resolve_product(run, name), STUDENT, eager=eager)
        for name in names
    ]


def teacher_subjects(
    store: WeightStore, folder: Path, moved_to: Path | None = None, *, eager: bool = False
) -> list[Subject]:
    """A run's teacher twice: as shipped, and decoded like the students.

    `eager` decodes the second one eagerly with a static cache. Raises `RunError` if the run has no
    teacher or it is no longer there.
    """
    model = resolve_teacher(Run(folder), moved_to)
    roles = baseline_roles(eager or isinstance(model.opened, InPlaceCheckpoint))
    return [_checkpoint_subject(store, model, role, role, eager=eager) for role in roles]


def path_subjects(
    store: WeightStore, paths: Iterable[Path], *, eager: bool = False
) -> list[Subject]:
    """Checkpoints by path, as students. Raises `CheckpointError`."""
    return [
        _checkpoint_subject(store, resolve_path(path), STUDENT, weights=str(path), eager=eager)
        for path in paths
    ]


def int8_subjects(subjects: Sequence[Subject]) -> list[Subject]:
    """The students among `subjects` with int8 weights, quantized after loading.

    Raises `DataError` for eager students: only `mmmamba_cli.inference` has int8 kernels.
    """
    students = [one for one in subjects if one.info.role == STUDENT]
    for one in students:
        if one.info.eager_reason is not None:
            raise DataError(
                f"{one.name} cannot have int8 weights: {one.info.eager_reason}", "leave out --int8"
            )
    if any(one.info.way == EAGER for one in students):
        raise DataError(
            "int8 weights are decoded by mmmamba's own decoder, not eagerly",
            "leave out --int8 or --eager",
        )
    return [
        Subject(
            f"{one.name} int8",
            replace(one.info, precision="int8"),
            lambda one=one: _quantized(one.build()),  # type: ignore[misc]
        )
        for one in students
    ]


def check_names(subjects: Sequence[Subject]) -> None:
    """Raise `DataError` if two subjects have one name: results are stored by name."""
    check_unique_names(
        [subject.name for subject in subjects],
        ", and numbers stand under that name",
        hint="profile them one after the other, with different --out, or rename a folder",
    )


def baseline_roles(eager: bool) -> tuple[str, str]:
    """The roles of the two teachers of a profile."""
    return (AS_SHIPPED, STATIC_TEACHER if eager else TUNED)


def _checkpoint_subject(
    store: WeightStore,
    model: ResolvedModel,
    role: str,
    name: str | None = None,
    *,
    weights: str | None = None,
    eager: bool,
) -> Subject:
    """A subject with the weights of a checkpoint."""
    if isinstance(model.opened, InPlaceCheckpoint):
        return _in_place_subject(store, model, model.opened, role, name, weights)
    checkpoint = model.checkpoint
    return make_subject(
        name or model.name,
        role,
        checkpoint.config,
        partial(store.load, checkpoint),
        weights or str(checkpoint.path),
        eager=eager,
        content_hash=model.content_hash,
        final=None if model.run is None else model.final,
    )


def _in_place_subject(
    store: WeightStore,
    model: ResolvedModel,
    checkpoint: InPlaceCheckpoint,
    role: str,
    name: str | None,
    weights: str | None,
) -> Subject:
    """A model of transformers, decoded by its own class."""
    # A damaged folder is refused before anything is measured.
    _ = checkpoint.layout
    cache = GROWING if role == AS_SHIPPED else STATIC
    mixers = () if checkpoint.plan is None else checkpoint.plan.mixers
    info = SubjectInfo(
        role,
        cache,
        plan_kind(len(checkpoint.attention_layers), checkpoint.num_layers),
        checkpoint.attention_layers,
        checkpoint.num_layers,
        weights or str(checkpoint.path),
        model.content_hash,
        None if model.run is None else model.final,
        way=TRANSFORMERS,
        mixers=tuple(dict.fromkeys(one for one in mixers if one != "attention")),
        eager_reason=DECODED_BY_TRANSFORMERS,
    )
    return Subject(
        name or model.name, info, lambda: InPlaceDecoder(store.load_in_place(checkpoint), cache)
    )


def make_subject(
    name: str,
    role: str,
    config: HolisticVLMConfig,
    load: Callable[[], HolisticVLM],
    weights: str,
    *,
    eager: bool,
    content_hash: str | None = None,
    final: bool | None = None,
) -> Subject:
    """A subject of a config; `load` gives its model, whose weights `weights` describes."""
    kept, total = config.attention_layers, config.num_hidden_layers
    kind = plan_kind(len(kept), total)
    cache = GROWING if role == AS_SHIPPED else STATIC
    linear = [layer for layer in range(total) if layer not in kept]
    reason = None if eager or role == AS_SHIPPED else slow_decoding_reason(config)
    way = EAGER if eager or role == AS_SHIPPED or reason is not None else GENERATOR
    info = SubjectInfo(
        role,
        cache,
        kind,
        kept,
        total,
        weights,
        content_hash,
        final,
        way=way,
        mixers=tuple(dict.fromkeys(config.mixer_names[layer] for layer in linear)),
        eager_reason=reason,
    )

    def build() -> Decoder:
        return EagerDecoder(load(), cache) if way == EAGER else FastDecoder(load())

    return Subject(name, info, build)


def _quantized(decoder: Decoder) -> Decoder:
    """A decoder of the same model with int8 weights; the given one must not be used again."""
    assert isinstance(decoder, FastDecoder)
    model = decoder.model
    del decoder
    quantize(model)
    return FastDecoder(model)


def _newest_of_each_plan(run: Run) -> list[str]:
    """Names of the newest product of each layer plan; older ones are as fast. Raises `RunError`."""
    plans = {manifest.attention_layers: manifest for manifest in run.products().values()}
    if not plans:
        raise RunError(f"{run.folder} has no product yet", "mmmamba seed makes the first")
    newest = sorted(plans.values(), key=lambda manifest: len(manifest.attention_layers))
    return [manifest.name for manifest in newest]
