"""Subjects of a profile, and the weight store that shares equal tensors between them.

Repeats alternate between the subjects, so all of them are loaded at once. Teacher and student share
MLPs, norms, token embedding and head, which is most of a model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmmamba_cli.architecture import parameter_shapes, slow_decoding_reason
from mmmamba_cli.checkpoint import (
    Checkpoint,
    InPlaceCheckpoint,
    load_in_place_model,
    stored_dtype,
)
from mmmamba_cli.checkpoint.tensor_io import cast
from mmmamba_cli.devices import require_memory, translate_out_of_memory
from mmmamba_cli.distill.in_place_pair import replace_parameters
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
from mmmamba_cli.recipe import plan_kind
from mmmamba_cli.runs import (
    ResolvedModel,
    Run,
    check_unique_names,
    pick_placement,
    resolve_path,
    resolve_product,
    resolve_teacher,
)

DECODED_BY_TRANSFORMERS = "models of transformers are decoded by their own class"
# Bounds of softplus^-1(dt) for which a state decays neither at once nor not at all.
DT_BIAS_RANGE = (-6.0, -2.0)


class WeightStore:
    """Models on one device in one dtype; equal tensors of several models are stored once.

    A tensor is freed with the last model that uses it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        # By owner, name and shape, which depends on the mixer of a layer.
        self._parameters: WeakValueDictionary[tuple[object, ...], nn.Parameter] = (
            WeakValueDictionary()
        )
        # Models of transformers by path.
        self._in_place: WeakValueDictionary[str, PreTrainedModel] = WeakValueDictionary()

    def load(self, checkpoint: Checkpoint) -> HolisticVLM:
        """Load the model of a checkpoint. Raises `OutOfMemory` and `CheckpointError`.

        Tensors that the forward does not use, for example HoVLE's second token embedding, are not
        read.
        """
        return self._build(checkpoint.config, str(checkpoint.path), checkpoint.read)

    def load_in_place(self, checkpoint: InPlaceCheckpoint) -> PreTrainedModel:
        """Load a model of transformers. Raises `OutOfMemory` and `CheckpointError`.

        A parameter that equals one of another model is stored once, after both were in memory.
        """
        key = str(checkpoint.path)
        held = self._in_place.get(key)
        if held is not None:
            return held
        elements = sum(prod(shape) for shape in checkpoint.shapes.values())
        require_memory(self.device, elements * self.dtype.itemsize, f"the model {key}")
        model = translate_out_of_memory(
            lambda: load_in_place_model(
                checkpoint, device=self.device, dtype=self.dtype, frozen=True
            )
        )
        others = [dict(other.named_parameters()) for other in self._in_place.values()]

        def shared(name: str, parameter: nn.Parameter) -> nn.Parameter:
            found = (other[name] for other in others if name in other)
            return next((one for one in found if _are_equal(one, parameter)), parameter)

        replace_parameters(model, shared)
        self._in_place[key] = model
        return model

    def random(self, config: HolisticVLMConfig, family: str, seed: int) -> HolisticVLM:
        """Build a model with random weights that depend on seed and tensor name only.

        Models of one `family` share equal tensors, as teacher and student do. Raises `OutOfMemory`.
        """
        shapes = parameter_shapes(config)
        return self._build(
            config, family, lambda name: self._random_tensor(name, shapes[name], seed)
        )

    def _build(
        self, config: HolisticVLMConfig, owner: str, read: Callable[[str], Tensor]
    ) -> HolisticVLM:
        def build() -> HolisticVLM:
            with torch.device("meta"):
                model = HolisticVLM(config)
            for name, shape in parameter_shapes(config).items():
                place, _, leaf = name.rpartition(".")
                parameter = self._parameter((owner, name, shape), name, read)
                setattr(model.get_submodule(place), leaf, parameter)
            if config.tie_word_embeddings:
                model.tie_weights()
            return model.eval()

        return translate_out_of_memory(build)

    def _parameter(
        self, key: tuple[object, ...], name: str, read: Callable[[str], Tensor]
    ) -> nn.Parameter:
        """The parameter under that key, an equal one of another owner, or a new one."""
        held = self._parameters.get(key)
        if held is not None:
            return held
        tensor = read(name)
        dtype = stored_dtype(name, self.dtype)
        require_memory(self.device, tensor.numel() * dtype.itemsize, name)
        placed = nn.Parameter(cast(tensor, dtype, name, self.device), requires_grad=False)
        for (_, other, _), parameter in list(self._parameters.items()):
            same = other == name and parameter.shape == placed.shape
            if same and torch.equal(parameter, placed):
                placed = parameter
                break
        self._parameters[key] = placed
        return placed

    def _random_tensor(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Random values scaled so that every layer contributes to the logits.

        They are drawn on the device in the final dtype: a CPU would take a minute for billions.
        """
        device, dtype = self.device, stored_dtype(name, self.dtype)
        rng = torch.Generator(device).manual_seed((seed << 32) ^ zlib.crc32(name.encode()))
        if "norm" in name or name.endswith("A_log"):
            return torch.ones(shape, device=device, dtype=dtype)
        values = torch.empty(shape, device=device, dtype=dtype)
        if name.endswith("dt_bias"):
            return values.uniform_(*DT_BIAS_RANGE, generator=rng)
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0]
        return values.normal_(std=fan_in**-0.5, generator=rng)


def _are_equal(a: nn.Parameter, b: nn.Parameter) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def weight_store(device: str | None = None, dtype: str = "auto") -> WeightStore:
    """The weight store of one profile; dtype "auto" is bf16 on CUDA, fp32 on a CPU.

    Raises `MmmambaError` for an unavailable device, `CheckpointError` for an unknown dtype.
    """
    return WeightStore(*pick_placement(device, dtype))


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
