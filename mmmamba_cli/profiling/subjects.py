"""Subjects: products of a run and its teacher, any checkpoint, architectures without weights.

Weights of several models in memory at once, every tensor that two of them share held once.

Subjects are measured in turn, so all of them want to be loaded. Teacher and student have the same
MLPs, norms, token table and head, which is most of a model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from mmmamba_cli.architecture import parameter_shapes
from mmmamba_cli.checkpoint import (
    Checkpoint,
    hovle,
    stored_dtype,
)
from mmmamba_cli.checkpoint.tensor_io import cast
from mmmamba_cli.devices import require_memory, translate_out_of_memory
from mmmamba_cli.errors import DataError, RunError
from mmmamba_cli.inference import quantize
from mmmamba_cli.model import LINEAR, HolisticVLM, HolisticVLMConfig
from mmmamba_cli.profiling.eager_decoder import EagerDecoder
from mmmamba_cli.profiling.fast_decoder import FastDecoder
from mmmamba_cli.profiling.interfaces import (
    AS_SHIPPED,
    EAGER,
    GENERATOR,
    GROWING,
    STATIC,
    STATIC_TEACHER,
    STUDENT,
    TUNED,
    Decoder,
    Subject,
    SubjectInfo,
)
from mmmamba_cli.recipe import place_attention, plan_kind
from mmmamba_cli.recipe.problems import join_or, suggest
from mmmamba_cli.runs import (
    ResolvedModel,
    Run,
    check_unique_names,
    pick_placement,
    resolve_path,
    resolve_product,
    resolve_teacher,
)

# Bounds of softplus^-1(dt) that decay neither at once nor never.
STEP_BIAS = (-6.0, -2.0)


class WeightStore:
    """Builds models on one device in one dtype; forgets a tensor when no model has it any more."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._parameters: WeakValueDictionary[tuple[str, str], nn.Parameter] = WeakValueDictionary()

    def load(self, checkpoint: Checkpoint) -> HolisticVLM:
        """The model of a checkpoint. Raises `OutOfMemory`, and `CheckpointError` as reading does.

        Tensors that no forward uses, as a HoVLE's second token table, are not read.
        """
        return self._model(checkpoint.config, str(checkpoint.path), checkpoint.read)

    def random(self, config: HolisticVLMConfig, family: str, seed: int) -> HolisticVLM:
        """A model with random weights that depend on their names alone; raises `OutOfMemory`.

        Models of one `family` share what they have in common, as teacher and student do.
        """
        shapes = parameter_shapes(config)
        return self._model(config, family, lambda name: self._noise(name, shapes[name], seed))

    def _model(
        self, config: HolisticVLMConfig, owner: str, read: Callable[[str], Tensor]
    ) -> HolisticVLM:
        def build() -> HolisticVLM:
            with torch.device("meta"):
                model = HolisticVLM(config)
            for name in parameter_shapes(config):
                place, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(place), leaf, self._take(owner, name, read))
            if config.tie_word_embeddings:
                model.tie_weights()
            return model.eval()

        return translate_out_of_memory(build)

    def _take(self, owner: str, name: str, read: Callable[[str], Tensor]) -> nn.Parameter:
        """The parameter of that name: its owner's, else another's that is equal, else a new one."""
        held = self._parameters.get((owner, name))
        if held is not None:
            return held
        tensor = read(name)
        dtype = stored_dtype(name, self.dtype)
        require_memory(self.device, tensor.numel() * dtype.itemsize, name)
        placed = nn.Parameter(cast(tensor, dtype, name, self.device), requires_grad=False)
        for (_, other), parameter in list(self._parameters.items()):
            same = other == name and parameter.shape == placed.shape
            if same and torch.equal(parameter, placed):
                placed = parameter
                break
        self._parameters[owner, name] = placed
        return placed

    def _noise(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Values of such sizes that every part of a model matters to its logits.

        Drawn on the device, in the dtype they will have: billions would take a CPU a minute.
        """
        device, dtype = self.device, stored_dtype(name, self.dtype)
        rng = torch.Generator(device).manual_seed((seed << 32) ^ zlib.crc32(name.encode()))
        if "norm" in name or name.endswith("A_log"):
            return torch.ones(shape, device=device, dtype=dtype)
        values = torch.empty(shape, device=device, dtype=dtype)
        if name.endswith("dt_bias"):
            return values.uniform_(*STEP_BIAS, generator=rng)
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0]
        return values.normal_(std=fan_in**-0.5, generator=rng)


# A quarter of the layers, as the paper's hybrid.
HYBRID_SHARE = 4
PLACEMENT = "head-interleaved"

_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def architectures() -> dict[str, dict[str, Any]]:
    """Configs by name, for `random_subjects`: HoVLE as published, and one for a laptop."""
    large = hovle.ARCHITECTURES["hovle-2.6b"]
    small = {**large, "force_image_size": 224}
    small["embedding_config"] = {
        **large["embedding_config"],
        **_SMALL,
        "num_hidden_layers": 2,
        "image_size": 224,
        "img_context_token_id": 2046,
        "llm_vocab_size": 2048,
        "llm_hidden_size": 256,
    }
    small["llm_config"] = {
        **large["llm_config"],
        **_SMALL,
        "num_hidden_layers": 6,
        "vocab_size": 2048,
    }
    return {"hovle-2.6b": large, "hovle-8m": small}


def weight_store(device: str | None = None, dtype: str = "auto") -> WeightStore:
    """Where subjects of one profile are loaded to; dtype "auto" is bf16 on CUDA, fp32 on a CPU.

    Raises `CheckpointError` for a device or dtype that is not known or not there.
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
    """A run's teacher, both ways, and products; without names the newest of each layer plan.

    `teacher` None is as the run has one: students may be imported without. `eager`: with PyTorch's
    own kernels, launched one by one. Raises `RunError` for a product that is not there, or a
    teacher that has moved.
    """
    run = Run(folder)
    has_teacher = run.record.teacher is not None
    names = [run.product(name).name for name in dict.fromkeys(products)] or _newest(run)
    found: list[Subject] = []
    if has_teacher if teacher is None else teacher:
        found += teacher_subjects(store, folder, teacher_path, eager=eager)
    return found + [
        _opened(store, resolve_product(run, name), STUDENT, eager=eager) for name in names
    ]


def teacher_subjects(
    store: WeightStore, folder: Path, moved_to: Path | None = None, *, eager: bool = False
) -> list[Subject]:
    """A run's teacher as shipped, and decoded as the students are.

    `eager`: the second is eager too, with a static cache. Raises `RunError` if the run has no
    teacher, or it is no longer there.
    """
    model = resolve_teacher(Run(folder), moved_to)
    return [_opened(store, model, role, role, eager=eager) for role in _baselines(eager)]


def path_subjects(
    store: WeightStore, paths: Iterable[Path], *, eager: bool = False
) -> list[Subject]:
    """Any checkpoints, as students. Raises `CheckpointError`."""
    return [
        _opened(store, resolve_path(path), STUDENT, weights=str(path), eager=eager)
        for path in paths
    ]


def random_subjects(
    store: WeightStore,
    name: str,
    attention: Sequence[int] | None = None,
    *,
    teacher: bool = True,
    seed: int = 0,
    eager: bool = False,
) -> list[Subject]:
    """An architecture without weights: its teacher, and a student for each count of attention.

    None is the linear student and the one with a quarter of the layers. Raises `DataError` for a
    name that is not known, `RecipeError` for more attention than there are layers.
    """
    known = architectures()
    if name not in known:
        raise DataError(
            f"no architecture is called {name}: give {join_or(sorted(known))}{suggest(name, known)}"
        )
    full = hovle.to_config(known[name], f"architecture {name}")
    layers = full.num_hidden_layers
    counts = (0, layers // HYBRID_SHARE) if attention is None else dict.fromkeys(attention)
    plans = [(role, role, full) for role in _baselines(eager)] if teacher else []
    for count in counts:
        kept = place_attention(PLACEMENT, count, layers)
        title = "linear" if count == 0 else f"hybrid-{count}"
        plans.append((title, STUDENT, _with_attention(full, kept)))
    return [
        _subject(
            title,
            role,
            config,
            partial(store.random, config, name, seed),
            "random",
            eager=eager,
        )
        for title, role, config in plans
    ]


def int8_subjects(subjects: Sequence[Subject]) -> list[Subject]:
    """The students among `subjects` once more, their weights made int8 after loading.

    Raises `DataError` for eager ones: only `mmmamba_cli.inference` has kernels for such weights.
    """
    students = [one for one in subjects if one.info.role == STUDENT]
    if any(one.info.way == EAGER for one in students):
        raise DataError(
            "int8 weights are decoded by mmmamba's own decoder, not eagerly",
            "leave out --int8 or --eager",
        )
    return [
        Subject(
            f"{one.name} int8",
            replace(one.info, precision="int8"),
            lambda one=one: _made_int8(one.build()),  # type: ignore[misc]
        )
        for one in students
    ]


def check_names(subjects: Sequence[Subject]) -> None:
    """Raise `DataError` if two subjects have one name, under which results stand."""
    check_unique_names(
        [subject.name for subject in subjects],
        ", and numbers stand under that name",
        hint="profile them one after the other, with different --out, or rename a folder",
    )


def _baselines(eager: bool) -> tuple[str, str]:
    return (AS_SHIPPED, STATIC_TEACHER if eager else TUNED)


def _opened(
    store: WeightStore,
    model: ResolvedModel,
    role: str,
    name: str | None = None,
    *,
    weights: str | None = None,
    eager: bool,
) -> Subject:
    """A subject whose weights are those of a checkpoint."""
    checkpoint = model.checkpoint
    return _subject(
        name or model.name,
        role,
        checkpoint.config,
        partial(store.load, checkpoint),
        weights or str(checkpoint.path),
        eager=eager,
        content_hash=model.content_hash,
        final=None if model.run is None else model.final,
    )


def _subject(
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
    kept, total = config.attention_layers, config.num_hidden_layers
    kind = plan_kind(len(kept), total)
    cache = GROWING if role == AS_SHIPPED else STATIC
    way = EAGER if eager or role == AS_SHIPPED else GENERATOR
    info = SubjectInfo(role, cache, kind, kept, total, weights, content_hash, final, way)

    def build() -> Decoder:
        return EagerDecoder(load(), cache) if way == EAGER else FastDecoder(load())

    return Subject(name, info, build)


def _made_int8(decoder: Decoder) -> Decoder:
    """The same over int8 weights; what it held itself is let go."""
    assert isinstance(decoder, FastDecoder)
    model = decoder.model
    del decoder
    quantize(model)
    return FastDecoder(model)


def _with_attention(full: HolisticVLMConfig, kept: Sequence[int]) -> HolisticVLMConfig:
    config = HolisticVLMConfig.from_dict(full.to_dict())
    config.layer_types = [
        kind if layer in kept else LINEAR for layer, kind in enumerate(full.layer_types)
    ]
    return config


def _newest(run: Run) -> list[str]:
    """Names of the newest product of each layer plan: the others are as fast. Raises `RunError`."""
    plans = {manifest.attention_layers: manifest for manifest in run.products().values()}
    if not plans:
        raise RunError(f"{run.folder} has no product yet", "mmmamba seed makes the first")
    newest = sorted(plans.values(), key=lambda manifest: len(manifest.attention_layers))
    return [manifest.name for manifest in newest]
