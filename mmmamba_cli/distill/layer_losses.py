"""Layer losses: each layer runs forward, loss and backward, then is freed before the next one.

Gradients do not cross layers, so peak memory does not grow with depth. The walk follows the
decoder's own path (`embed`, blocks, `embedding_to_language`), and both mixers read the same normed
hidden state. Legend: B batch, T columns, D hidden size, H heads, P head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmmamba_cli.architecture import MixerSpec
from mmmamba_cli.data import Batch
from mmmamba_cli.distill.picture_density import density_weights
from mmmamba_cli.distill.teacher_student import TeacherStudent
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.prepared_inputs import PreparedInputs, stack_tiles
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.ops.backends import upcast


@dataclass(frozen=True)
class LayerInputs:
    """One layer of both models, and its inputs."""

    teacher: Block
    student: Block
    hidden: Tensor  # (B, T, D)
    normed: Tensor  # (B, T, D), input of the mixer
    columns: SequenceLayout
    # (B, T), the weight of each column; None for 1.
    weights: Tensor | None = None

    def masked_sum(self, values: Tensor) -> Tensor:
        """Sum (B, T, ...) over all columns except padding, times their weights."""
        mask, weights = self.columns.mask, self.weights
        inner = [1] * (values.dim() - 2)
        if weights is not None:
            values = values * weights.view(*weights.shape, *inner)
        if mask is not None:
            values = values.masked_fill(~mask.view(*mask.shape, *inner), 0)
        return values.sum()


class LayerLoss(Protocol):
    """The distance between a layer of the student and the same layer of the teacher."""

    def depends_on(self, name: str, mixer: MixerSpec) -> bool:
        """Whether the loss depends on the parameter `name` of a block with this mixer."""
        ...

    def depends_on_part_of(self, name: str, mixer: MixerSpec) -> bool:
        """Whether it depends on some elements of the parameter only."""
        ...

    def units_per_token(self, block: Block) -> int:
        """Number of loss elements per token; the loss is the mean over all of them."""
        ...

    def __call__(self, layer: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
        """The summed loss, and the (B, T, H * P) outputs of both mixers before W_O."""
        ...


@dataclass(frozen=True)
class LayerwiseLoss:
    """An `Objective`: `scale` times the mean over layers of the mean loss of each layer."""

    loss: LayerLoss
    # Trainable layers, numbered through both stacks.
    layers: tuple[int, ...]
    # The model, "teacher" or "student", whose mixer outputs feed the next layer.
    inputs: str
    scale: float
    # The mixer of each layer of the student.
    mixers: tuple[MixerSpec, ...]
    # Whether columns are weighted by the density of pictures at the input of their stack.
    weights_pictures: bool = False
    layer_local: bool = True

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(f"layer {layer}" for layer in self.layers)

    def depends_on(self, name: str) -> bool:
        layer, inner = self._split(name)
        return layer is not None and self.loss.depends_on(inner, self.mixers[layer])

    def depends_on_part_of(self, name: str) -> bool:
        layer, inner = self._split(name)
        return layer is not None and self.loss.depends_on_part_of(inner, self.mixers[layer])

    def _split(self, name: str) -> tuple[int | None, str]:
        """The trainable layer of a parameter, None for others, and its name in the block."""
        parts = name.split(".")
        if parts[:2] != ["model", "layers"] or int(parts[2]) not in self.layers:
            return None, name
        return int(parts[2]), ".".join(parts[3:])

    def count_units(self, pair: TeacherStudent, batch: Batch) -> Tensor:
        first = pair.teacher.model.num_embedding_layers
        in_embedding, in_language = count_stack_tokens(pair, batch)
        blocks = pair.student.model.blocks
        units = []
        for layer in self.layers:
            tokens = in_embedding if layer < first else in_language
            units.append(tokens * self.loss.units_per_token(blocks[layer]))
        return torch.tensor(units, dtype=torch.float64)

    def term_weights(self, units: Tensor) -> Tensor:
        return self.scale / len(self.layers) / units.clamp(min=1)

    def loss_sums(self, pair: TeacherStudent, batch: Batch, weights: Tensor | None) -> Tensor:
        source = pair.teacher.model if self.inputs == "teacher" else pair.student.model
        prompt = pair.prepare(batch)
        factors = None if weights is None else weights.tolist()
        losses: list[Tensor] = []
        with torch.no_grad(), pair.autocast():
            hidden = source.embed(prompt)
            weigher = _StackWeights(pair, prompt) if self.weights_pictures else None
            column_weights = None if weigher is None else weigher.at_input(hidden)
        for index, block in enumerate(source.blocks):
            # One autocast context per layer: it keeps bf16 copies of master weights until it exits.
            with torch.no_grad(), pair.autocast():
                if index == source.num_embedding_layers and prompt.embedding_layout is not None:
                    hidden = source.embedding_to_language(hidden, prompt)
                    column_weights = None if weigher is None else weigher.at_language(hidden)
                layer = self._layer_inputs(pair, index, hidden, prompt, column_weights)
                if index not in self.layers:
                    mixed = block.mixer.mix(layer.normed, layer.columns)
                else:
                    factor = None if factors is None else factors[len(losses)]
                    loss, mixed = self._forward_backward(layer, factor)
                    losses.append(loss)
                hidden = block.after_mixer(hidden, block.mixer.o_proj(mixed))
            del layer, mixed
        return torch.stack(losses).double()

    def _layer_inputs(
        self,
        pair: TeacherStudent,
        index: int,
        hidden: Tensor,
        prompt: PreparedInputs,
        column_weights: Tensor | None,
    ) -> LayerInputs:
        teacher, student = pair.teacher.model.blocks[index], pair.student.model.blocks[index]
        norm = (teacher if self.inputs == "teacher" else student).mixer_norm
        columns = prompt.language_layout
        if prompt.embedding_layout is not None and index < pair.teacher.model.num_embedding_layers:
            columns = prompt.embedding_layout
        return LayerInputs(teacher, student, hidden, norm(hidden), columns, column_weights)

    def _forward_backward(self, layer: LayerInputs, factor: float | None) -> tuple[Tensor, Tensor]:
        """Compute the summed loss and, with `factor`, the gradients of their product.

        Returns the loss and the mixer output that feeds the next layer, both detached.
        """
        with torch.set_grad_enabled(factor is not None):
            loss, teacher_mixed, student_mixed = self.loss(layer)
            if factor is not None:
                loss.backward(torch.full_like(loss, factor))
        return loss.detach(), teacher_mixed if self.inputs == "teacher" else student_mixed.detach()


class _StackWeights:
    """Weights (B, T) of the columns of each stack, by the density of pictures at its input."""

    def __init__(self, pair: TeacherStudent, prompt: PreparedInputs):
        self._prompt = prompt
        self._tiles = stack_tiles(pair.teacher.config, prompt)

    def at_input(self, hidden: Tensor) -> Tensor:
        """Of the first stack, whose input is `hidden` (B, T, D)."""
        layout = self._prompt.embedding_layout
        if layout is None:
            return self.at_language(hidden)
        return density_weights(hidden, _present(self._tiles[0]), layout.seq_idx)

    def at_language(self, hidden: Tensor) -> Tensor:
        """Of the language stack, whose input is `hidden` (B, T, D)."""
        layout = self._prompt.language_layout
        return density_weights(hidden, _present(self._tiles[1]), layout.seq_idx)


def _present(tiles: Tensor | None) -> list[Tensor]:
    return [] if tiles is None else [tiles]


def count_stack_tokens(pair: TeacherStudent, batch: Batch) -> tuple[int, int]:
    """Count the columns, without padding, of the embedding stack and of the language stack.

    Pass the batch on the CPU: counting on a GPU synchronizes.
    """
    ids, real = batch.input_ids, batch.token_mask
    tokens = int(real.sum())
    vision, pixels = pair.teacher.config.vision_config, batch.pixel_values
    has_pixels = pixels is not None and pixels.shape[0] > 0
    # Pictures of a generated corpus are drawn when the batch moves to its device.
    has_images = vision is not None and (has_pixels or batch.drawings is not None)
    if not has_images or vision.pixel_shuffle != "post":
        return tokens, tokens
    image_tokens = int((real & (ids == vision.image_token_id)).sum())
    return tokens + (vision.merge**2 - 1) * image_tokens, tokens


@dataclass(frozen=True)
class MatrixOrientation:
    """A `LayerLoss`: squared distance between rows of the mixing matrices, mean over (B, T, H).

    The first step of MOHAWK (Bick et al., arXiv 2408.10189): the squared Frobenius distance between
    the T x T mixing matrices of each head, here per row, so that sequences of unequal length are
    weighted by tokens. Memory grows with T^2.

    The mixing matrix is made of queries, keys and decay. It does not depend on W_V, the value
    channels of the convolution, the gate or the gated norm; `MixerSpec.matrix_parameters` lists the
    parameters of each mixer that it depends on.
    """

    def depends_on(self, name: str, mixer: MixerSpec) -> bool:
        return in_mixer(name, mixer.matrix_parameters)

    def depends_on_part_of(self, name: str, mixer: MixerSpec) -> bool:
        return in_mixer(name, mixer.partial_matrix_parameters)

    def units_per_token(self, block: Block) -> int:
        return block.mixer.num_heads

    def __call__(self, layer: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            teacher_mixed = layer.teacher.mixer.mix(layer.normed, layer.columns)
            student_mixed = layer.student.mixer.mix(layer.normed, layer.columns)
            expected = layer.teacher.mixer.mixing_matrix(layer.normed, layer.columns)
        actual = layer.student.mixer.mixing_matrix(layer.normed, layer.columns)
        rows = (actual - expected).square().sum(-1).transpose(1, 2)
        return layer.masked_sum(rows), teacher_mixed, student_mixed


@dataclass(frozen=True)
class MixerMSE:
    """A `LayerLoss`: mean squared error between mixer outputs before W_O, over (B, T, H * P).

    Stages 1 and 2 of mmMamba (arXiv 2502.13145).
    """

    def depends_on(self, name: str, mixer: MixerSpec) -> bool:
        return name.startswith("mixer.") and not name.startswith("mixer.o_proj.")

    def depends_on_part_of(self, name: str, mixer: MixerSpec) -> bool:
        return False

    def units_per_token(self, block: Block) -> int:
        return block.mixer.num_heads * block.mixer.head_dim

    def __call__(self, layer: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            teacher_mixed = layer.teacher.mixer.mix(layer.normed, layer.columns)
        student_mixed = layer.student.mixer.mix(layer.normed, layer.columns)
        # The subtraction promotes the teacher's side, without a copy.
        difference = upcast(student_mixed) - teacher_mixed
        return layer.masked_sum(difference.square()), teacher_mixed, student_mixed


@dataclass(frozen=True)
class HiddenAlignment:
    """A `LayerLoss`: mean squared error between layer outputs (residual and MLP), over (B, T, D).

    The second step of MOHAWK (Bick et al., arXiv 2408.10189). The norm before the mixer gets no
    gradient: it produces the hidden state that both mixers read.
    """

    def depends_on(self, name: str, mixer: MixerSpec) -> bool:
        return name.startswith(("mixer.", "mlp_norm.", "mlp."))

    def depends_on_part_of(self, name: str, mixer: MixerSpec) -> bool:
        return False

    def units_per_token(self, block: Block) -> int:
        return block.mixer.o_proj.out_features

    def __call__(self, layer: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
        teacher, student = layer.teacher, layer.student
        with torch.no_grad():
            teacher_mixed = teacher.mixer.mix(layer.normed, layer.columns)
            expected = teacher.after_mixer(layer.hidden, teacher.mixer.o_proj(teacher_mixed))
        student_mixed = student.mixer.mix(layer.normed, layer.columns)
        actual = student.after_mixer(layer.hidden, student.mixer.o_proj(student_mixed))
        difference = upcast(actual) - expected
        return layer.masked_sum(difference.square()), teacher_mixed, student_mixed


def in_mixer(name: str, parameters: tuple[str, ...], part: str = "mixer") -> bool:
    """Whether `name` within a layer is one of the mixer's `parameters`, or inside of one.

    `part` is the name of the mixer in the layer.
    """
    return any(f"{name}.".startswith(f"{part}.{parameter}.") for parameter in parameters)
