"""Losses of one layer at a time: forward, loss, backward and release, then the next layer.

No gradient crosses layers, so nothing of a layer outlives its turn, and memory does not grow with
depth. The walk is the decoder's own path (`embed`, blocks, `bridge`); teacher outputs are captured
around the mixer, whose input is the normed hidden state. Legend: B batch, T columns, D hidden size.

Stages 1 and 2: the student's mixer imitates the teacher's attention, layer by layer.

Mean squared error between the mixers' outputs, both before W_O (mmMamba, arXiv 2502.13145).

Matrix orientation: the mixing matrices of student and teacher, for short sequences.

The first step of MOHAWK (Bick et al., arXiv 2408.10189): the squared Frobenius distance of the two
T x T matrices of a head, here per row, so that sequences of unequal length weigh by their tokens.
Memory grows with T^2.

Hidden-state alignment: outputs of whole layers, student against teacher.

The second step of MOHAWK (Bick et al., arXiv 2408.10189), as a mean squared error over elements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mmmamba_cli.data import Batch
from mmmamba_cli.distill.teacher_student import Pair
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.prepared_inputs import PreparedInputs
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.ops.backends import upcast

# Parameters that a mixer's output before W_O depends on.
MIX_PARAMETERS = (
    "mixer.q_proj",
    "mixer.k_proj",
    "mixer.v_proj",
    "mixer.g_proj",
    "mixer.dt_proj",
    "mixer.conv1d",
    "mixer.A_log",
    "mixer.dt_bias",
    "mixer.D",
    "mixer.g_norm",
    "mixer.q_norm",
    "mixer.k_norm",
)


@dataclass(frozen=True)
class Layer:
    """One layer of both models and what it reads."""

    teacher: Block
    student: Block
    hidden: Tensor  # (B, T, D)
    normed: Tensor  # (B, T, D), the mixer's input
    columns: SequenceLayout

    def masked_sum(self, values: Tensor) -> Tensor:
        """Sum of (B, T, ...) over everything but padding."""
        mask = self.columns.mask
        if mask is not None:
            values = values.masked_fill(~mask.view(*mask.shape, *[1] * (values.dim() - 2)), 0)
        return values.sum()


class LayerLoss(Protocol):
    """How far a layer of the student is from the teacher's."""

    @property
    def reached(self) -> tuple[str, ...]:
        """Names, or their first parts, inside a block, of parameters that the loss depends on."""
        ...

    @property
    def reached_in_part(self) -> tuple[str, ...]:
        """Those of which it depends on some elements only."""
        ...

    def units(self, block: Block) -> int:
        """Units per token that the mean is taken over."""
        ...

    def __call__(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """The summed loss, and both mixers' outputs before W_O, (B, T, H * P)."""
        ...


@dataclass(frozen=True)
class Layerwise:
    """An `Objective`: `scale` times the mean over layers of each layer's mean loss."""

    loss: LayerLoss
    # Layers that learn, counted through both stacks.
    layers: tuple[int, ...]
    # Whose mixer outputs go on into the next layer.
    inputs: str
    scale: float
    layer_local: bool = True

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(f"layer {layer}" for layer in self.layers)

    def reaches(self, name: str) -> bool:
        return self._is_one_of(name, self.loss.reached)

    def reaches_part(self, name: str) -> bool:
        return self._is_one_of(name, self.loss.reached_in_part)

    def _is_one_of(self, name: str, inner_names: tuple[str, ...]) -> bool:
        parts = name.split(".")
        if parts[:2] != ["model", "layers"] or int(parts[2]) not in self.layers:
            return False
        inner = ".".join(parts[3:])
        return any(f"{inner}.".startswith(f"{prefix}.") for prefix in inner_names)

    def count(self, pair: Pair, batch: Batch) -> Tensor:
        first = pair.teacher.model.num_embedding_layers
        in_embedding, in_language = count_tokens(pair, batch)
        blocks = pair.student.model.blocks
        units = [
            (in_embedding if layer < first else in_language) * self.loss.units(blocks[layer])
            for layer in self.layers
        ]
        return torch.tensor(units, dtype=torch.float64)

    def weigh(self, units: Tensor) -> Tensor:
        return self.scale / len(self.layers) / units.clamp(min=1)

    def sums(self, pair: Pair, batch: Batch, weights: Tensor | None) -> Tensor:
        source = pair.teacher.model if self.inputs == "teacher" else pair.student.model
        prompt = prepare(pair, batch)
        found: list[Tensor] = []
        with torch.no_grad(), pair.autocast():
            hidden = source.embed(prompt)
        for index, block in enumerate(source.blocks):
            # A context a layer: autocast keeps its bf16 copies of the master weights to its end.
            with torch.no_grad(), pair.autocast():
                if index == source.num_embedding_layers and prompt.embedding_layout is not None:
                    hidden = source.embedding_to_language(hidden, prompt)
                layer = self._layer(pair, index, hidden, prompt)
                if index not in self.layers:
                    mixed = block.mixer.mix(layer.normed, layer.columns)
                else:
                    weight = None if weights is None else float(weights[len(found)])
                    loss, mixed = self._learn(layer, weight)
                    found.append(loss)
                hidden = block.after_mixer(hidden, block.mixer.o_proj(mixed))
            del layer, mixed
        return torch.stack(found).double().cpu()

    def _layer(self, pair: Pair, index: int, hidden: Tensor, prompt: PreparedInputs) -> Layer:
        teacher, student = pair.teacher.model.blocks[index], pair.student.model.blocks[index]
        norm = (teacher if self.inputs == "teacher" else student).mixer_norm
        return Layer(teacher, student, hidden, norm(hidden), _columns(pair, prompt, index))

    def _learn(self, layer: Layer, weight: float | None) -> tuple[Tensor, Tensor]:
        """The summed loss of a layer, its gradients added, and the mixer output that goes on."""
        with torch.set_grad_enabled(weight is not None):
            loss, taught, learned = self.loss(layer)
            if weight is not None:
                (loss * weight).backward()
        return loss.detach(), taught if self.inputs == "teacher" else learned.detach()


def prepare(pair: Pair, batch: Batch) -> PreparedInputs:
    """What the stacks of either model see of a batch; teacher and student agree on it."""
    prompt = pair.teacher.model.prepare(
        batch.input_ids, batch.pixel_values, batch.attention_mask, batch.seq_idx
    )
    if batch.segments is None:
        return prompt
    embedding = prompt.embedding_layout
    # Where patches stand in the place of image tokens, the embedding stack has columns of its own.
    if embedding is not None and prompt.expansion is None:
        embedding = replace(embedding, precomputed_segments=batch.segments)
    language = replace(prompt.language_layout, precomputed_segments=batch.segments)
    return replace(prompt, embedding_layout=embedding, language_layout=language)


def count_tokens(pair: Pair, batch: Batch) -> tuple[int, int]:
    """Columns that are not padding, of the embedding stack and of the language stack.

    The batch may be on the CPU; on a GPU, its counts would have to be waited for.
    """
    mask, ids = batch.attention_mask, batch.input_ids
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    tokens = int(real.sum())
    vision, pixels = pair.teacher.config.vision_config, batch.pixel_values
    has_pictures = vision is not None and pixels is not None and pixels.shape[0] > 0
    if not has_pictures or vision.pixel_shuffle != "post":
        return tokens, tokens
    image_tokens = int((real & (ids == vision.image_token_id)).sum())
    return tokens + (vision.merge**2 - 1) * image_tokens, tokens


def _columns(pair: Pair, prompt: PreparedInputs, layer: int) -> SequenceLayout:
    if prompt.embedding_layout is not None and layer < pair.teacher.model.num_embedding_layers:
        return prompt.embedding_layout
    return prompt.language_layout


@dataclass(frozen=True)
class MixerMSE:
    """A `LayerLoss`: mean over the elements of (B, T, H * P)."""

    reached: tuple[str, ...] = MIX_PARAMETERS
    reached_in_part: tuple[str, ...] = ()

    def units(self, block: Block) -> int:
        return block.mixer.num_heads * block.mixer.head_dim

    def __call__(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            taught = layer.teacher.mixer.mix(layer.normed, layer.columns)
        learned = layer.student.mixer.mix(layer.normed, layer.columns)
        difference = upcast(learned) - upcast(taught)
        return layer.masked_sum(difference.square()), taught, learned


@dataclass(frozen=True)
class MatrixOrientation:
    """A `LayerLoss`: mean over tokens and heads of the squared distance of matrix rows.

    A mixing matrix is made of queries, keys and the decay. Neither the values nor what follows the
    read-out are in it: W_V, the gate, the gated norm, D, and the convolution's channels of values.
    """

    reached: tuple[str, ...] = (
        "mixer.q_proj",
        "mixer.k_proj",
        "mixer.dt_proj",
        "mixer.conv1d",
        "mixer.A_log",
        "mixer.dt_bias",
        "mixer.q_norm",
        "mixer.k_norm",
    )
    reached_in_part: tuple[str, ...] = ("mixer.conv1d",)

    def units(self, block: Block) -> int:
        return block.mixer.num_heads

    def __call__(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            taught = layer.teacher.mixer.mix(layer.normed, layer.columns)
            learned = layer.student.mixer.mix(layer.normed, layer.columns)
            expected = layer.teacher.mixer.mixing_matrix(layer.normed, layer.columns)
        actual = layer.student.mixer.mixing_matrix(layer.normed, layer.columns)
        rows = (actual - expected).square().sum(-1).transpose(1, 2)
        return layer.masked_sum(rows), taught, learned


@dataclass(frozen=True)
class HiddenAlignment:
    """A `LayerLoss`: mean over the elements of (B, T, D), residual connections and MLP included.

    The norm before the mixer makes the hidden state that both mixers read, and gets no gradient.
    """

    reached: tuple[str, ...] = (*MIX_PARAMETERS, "mixer.o_proj", "mlp_norm", "mlp")
    reached_in_part: tuple[str, ...] = ()

    def units(self, block: Block) -> int:
        return block.mixer.o_proj.out_features

    def __call__(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        teacher, student = layer.teacher, layer.student
        with torch.no_grad():
            taught = teacher.mixer.mix(layer.normed, layer.columns)
            expected = teacher.after_mixer(layer.hidden, teacher.mixer.o_proj(taught))
        learned = student.mixer.mix(layer.normed, layer.columns)
        actual = student.after_mixer(layer.hidden, student.mixer.o_proj(learned))
        difference = upcast(actual) - upcast(expected)
        return layer.masked_sum(difference.square()), taught, learned
