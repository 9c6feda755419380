"""Layer losses on the running model: hooks on the forward pass of a transformers class.

The family's own forward pass walks the layers without gradients. A hook on each trainable layer
runs the other model's part on the same input, computes the loss and its gradients, and releases
them, so peak memory does not grow with depth. Legend: B batch, T columns, D hidden size, H heads,
P head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mmmamba_cli.architecture import mixer_spec
from mmmamba_cli.data import ModelBatch
from mmmamba_cli.distill.host_copies import copy_without_wait
from mmmamba_cli.distill.in_place_pair import InPlacePair
from mmmamba_cli.distill.layer_losses import in_mixer
from mmmamba_cli.distill.picture_density import density_weights
from mmmamba_cli.distill.student_layers import StudentLayers
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.ops.backends import upcast
from mmmamba_cli.teachers.anatomy import ATTENTION_NAME, text_decoder
from mmmamba_cli.teachers.picture_grids import picture_grids

# The norm that makes the input of both mixers, and so gets no gradient.
INPUT_NORM = "input_layernorm."

# Computes the errors (B, T, ...) of a layer, with their graph.
Errors = Callable[[], Tensor]
# Called with the errors once in each forward pass; computes their sum and its gradients.
OnCall = Callable[[Errors], None]


@dataclass(frozen=True)
class LayerPair:
    """A decoder layer of both models; `source` is that of the model which runs."""

    teacher: Any
    student: Any
    source: Any

    @property
    def attention(self) -> Any:
        """The teacher's attention."""
        return getattr(self.teacher, ATTENTION_NAME)

    @property
    def mixer(self) -> Any:
        """The student's mixer."""
        return getattr(self.student, ATTENTION_NAME)

    @property
    def source_mixer(self) -> Any:
        return getattr(self.source, ATTENTION_NAME)

    @property
    def teacher_runs(self) -> bool:
        return self.source is self.teacher


class HookedLoss(Protocol):
    """The distance between a layer of the student and the same layer of the teacher.

    `reads_matrix` tells whether it reads the weights of attention.
    """

    @property
    def reads_matrix(self) -> bool: ...

    def depends_on(self, name: str, mixer: str) -> bool:
        """Whether the loss depends on the parameter `name` of a layer with the mixer `mixer`."""
        ...

    def depends_on_part_of(self, name: str, mixer: str) -> bool:
        """Whether it depends on some elements of the parameter only."""
        ...

    def units_per_token(self, mixer: Any) -> int:
        """Number of loss elements per token, by the student's mixer."""
        ...

    def hook(self, layer: LayerPair, on_call: OnCall) -> Sequence[Any]:
        """Hook the layers so that each forward pass calls `on_call`; return the handles.

        A forward pass raises `MmmambaError` if the teacher lacks what the loss compares.
        """
        ...


@dataclass(frozen=True)
class HookedLayerLoss:
    """An `Objective`: `scale` times the mean over layers of the mean loss of each layer."""

    loss: HookedLoss
    # Trainable layers of the text decoder.
    layers: tuple[int, ...]
    # The model, "teacher" or "student", that runs.
    inputs: str
    scale: float
    student: StudentLayers
    # Whether columns are weighted by the density of pictures at the text decoder's input.
    weights_pictures: bool = False
    layer_local: bool = True

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(f"layer {layer}" for layer in self.layers)

    def depends_on(self, name: str) -> bool:
        layer, inner = self._split(name)
        return layer is not None and self.loss.depends_on(inner, self.student.mixers[layer])

    def depends_on_part_of(self, name: str) -> bool:
        layer, inner = self._split(name)
        return layer is not None and self.loss.depends_on_part_of(inner, self.student.mixers[layer])

    def _split(self, name: str) -> tuple[int | None, str]:
        """The trainable layer of a parameter, None for others, and its name in the layer."""
        layer, inner = self.student.layer_part(name)
        return (layer if layer in self.layers else None), inner

    def count_units(self, pair: InPlacePair, batch: ModelBatch) -> Tensor:
        layers, tokens = text_decoder(pair.student).layers, int(batch.token_mask.sum())
        mixers = (getattr(layers[index], ATTENTION_NAME) for index in self.layers)
        units = [tokens * self.loss.units_per_token(mixer) for mixer in mixers]
        return torch.tensor(units, dtype=torch.float64)

    def term_weights(self, units: Tensor) -> Tensor:
        return self.scale / len(self.layers) / units.clamp(min=1)

    def loss_sums(self, pair: InPlacePair, batch: ModelBatch, weights: Tensor | None) -> Tensor:
        source = pair.teacher if self.inputs == "teacher" else pair.student
        teacher, student, running = (
            text_decoder(model).layers for model in (pair.teacher, pair.student, source)
        )
        padding = ~batch.token_mask
        factors = None if weights is None else weights.tolist()
        # On the device: reading a loss would wait for the GPU in each layer.
        losses: dict[int, Tensor] = {}
        prepared = pair.prepare(batch)
        column_weights: list[Tensor] = []

        def accumulate(term: int, errors: Errors) -> None:
            with torch.set_grad_enabled(factors is not None):
                values = errors()
                inner = [1] * (values.dim() - 2)
                mask = padding.view(*padding.shape, *inner)
                for column in column_weights:
                    values = values * column.view(*column.shape, *inner)
                loss = values.masked_fill(mask, 0).sum()
                if factors is not None:
                    loss.backward(torch.full_like(loss, factors[term]))
            losses[term] = loss.detach()

        with ExitStack() as stack, torch.no_grad(), pair.autocast(cache_enabled=False):
            stack.enter_context(_mixers_follow(pair))
            if self.loss.reads_matrix:
                stack.enter_context(_attention_weights(pair))
            if self.weights_pictures:
                grids = [
                    copy_without_wait(grid, padding.device)
                    for grid in picture_grids(source.config, prepared.on_host)
                ]
                keep = partial(_keep_weights, column_weights, grids, batch.seq_idx)
                hook = running[0].register_forward_pre_hook(keep, with_kwargs=True)
                stack.callback(hook.remove)
            for term, index in enumerate(self.layers):
                layer = LayerPair(teacher[index], student[index], running[index])
                for handle in self.loss.hook(layer, partial(accumulate, term)):
                    stack.callback(handle.remove)
            pair.last_hidden(source, prepared)
        return torch.stack([losses[term] for term in range(len(self.layers))]).double()


def _keep_weights(
    kept: list[Tensor],
    grids: Sequence[Tensor],
    seq_idx: Tensor | None,
    _: Any,
    args: tuple[Any, ...],
    kwargs: Any,
) -> None:
    """Put the weights of the columns into `kept`, by the input (B, T, D) of the first layer."""
    hidden = args[0] if args else kwargs["hidden_states"]
    kept[:] = [density_weights(hidden, grids, seq_idx)]


@contextmanager
def _mixers_follow(pair: InPlacePair) -> Iterator[None]:
    """Let the student's mixers see padding and packing of the teacher's calls."""
    teacher = pair.teacher
    context: Any = pair.mixers[0].context
    modules = {id(one): one for one in (teacher.base_model, text_decoder(teacher))}
    detach = context.attach(*modules.values())
    try:
        yield
    finally:
        detach()


@contextmanager
def _attention_weights(pair: InPlacePair) -> Iterator[None]:
    """Let attention of both text decoders return its weights, which only "eager" does."""
    configs = [text_decoder(model).config for model in (pair.teacher, pair.student)]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


@dataclass(frozen=True)
class _AttentionCall:
    """The arguments of a call of `self_attn`."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The normed hidden state (B, T, D) that both mixers read."""
        hidden: Tensor = self.kwargs["hidden_states"] if not self.args else self.args[0]
        return hidden

    def layout(self, mixer: Any) -> SequenceLayout:
        """The columns as the student's mixer sees them."""
        angles = self.kwargs.get("position_embeddings")
        if angles is None and len(self.args) > 1:
            angles = self.args[1]
        layout: SequenceLayout = mixer.context.layout(
            self.hidden, angles, uses_rope=mixer.uses_rope
        )
        return layout


@dataclass(frozen=True)
class HookedMixerMSE:
    """A `HookedLoss`: mean squared error between mixer outputs before W_O, over (B, T, H * P).

    Stages 1 and 2 of mmMamba (arXiv 2502.13145).
    """

    reads_matrix: bool = False

    def depends_on(self, name: str, mixer: str) -> bool:
        return name.startswith(f"{ATTENTION_NAME}.") and ".o_proj." not in name

    def depends_on_part_of(self, name: str, mixer: str) -> bool:
        return False

    def units_per_token(self, mixer: Any) -> int:
        return int(mixer.num_heads * mixer.head_dim)

    def hook(self, layer: LayerPair, on_call: OnCall) -> Sequence[Any]:
        target: list[Tensor] = []

        def keep_target(_: Any, args: tuple[Any, ...]) -> None:
            target[:] = args

        def run(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call = _AttentionCall(args, kwargs)

            def errors() -> Tensor:
                if not layer.teacher_runs:
                    with torch.no_grad():
                        layer.attention(*args, **kwargs)
                mixed = layer.mixer.mix(call.hidden, call.layout(layer.mixer))
                return (upcast(mixed) - target.pop()).square()

            on_call(errors)

        return (
            layer.attention.o_proj.register_forward_pre_hook(keep_target),
            layer.source_mixer.register_forward_hook(run, with_kwargs=True),
        )


@dataclass(frozen=True)
class HookedMatrixOrientation:
    """A `HookedLoss`: squared distance between rows of mixing matrices, mean over (B, T, H).

    See `MatrixOrientation`. The teacher's matrix is the softmax of its attention.
    """

    reads_matrix: bool = True

    def depends_on(self, name: str, mixer: str) -> bool:
        return in_mixer(name, mixer_spec(mixer).matrix_parameters, ATTENTION_NAME)

    def depends_on_part_of(self, name: str, mixer: str) -> bool:
        return in_mixer(name, mixer_spec(mixer).partial_matrix_parameters, ATTENTION_NAME)

    def units_per_token(self, mixer: Any) -> int:
        return int(mixer.num_heads)

    def hook(self, layer: LayerPair, on_call: OnCall) -> Sequence[Any]:
        def run(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call = _AttentionCall(args, kwargs)

            def errors() -> Tensor:
                with torch.no_grad():
                    found = output if layer.teacher_runs else layer.attention(*args, **kwargs)
                expected = found[1]
                if expected is None:
                    raise MmmambaError(
                        "the teacher's attention does not return its weights, which loss "
                        "matrix-orientation compares",
                        "take loss: mixer-mse",
                    )
                actual = layer.mixer.mixing_matrix(call.hidden, call.layout(layer.mixer))
                return (actual - expected.to(actual)).square().sum(-1).transpose(1, 2)

            on_call(errors)

        return (layer.source_mixer.register_forward_hook(run, with_kwargs=True),)


@dataclass(frozen=True)
class HookedHiddenAlignment:
    """A `HookedLoss`: mean squared error between layer outputs (residual and MLP), over (B, T, D).

    See `HiddenAlignment`. The student's layer runs whole, with its own norm before the mixer.
    """

    reads_matrix: bool = False

    def depends_on(self, name: str, mixer: str) -> bool:
        return not name.startswith(INPUT_NORM)

    def depends_on_part_of(self, name: str, mixer: str) -> bool:
        return False

    def units_per_token(self, mixer: Any) -> int:
        return int(mixer.o_proj.out_features)

    def hook(self, layer: LayerPair, on_call: OnCall) -> Sequence[Any]:
        def run(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            def errors() -> Tensor:
                with torch.no_grad():
                    expected = output if layer.teacher_runs else layer.teacher(*args, **kwargs)
                # A call of the module would call this hook again if the student runs.
                actual = layer.student.forward(*args, **kwargs)
                return (upcast(_hidden(actual)) - _hidden(expected)).square()

            on_call(errors)

        return (layer.source.register_forward_hook(run, with_kwargs=True),)


def _hidden(output: Any) -> Tensor:
    """The hidden state in the output of a decoder layer, a tuple in older releases."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
