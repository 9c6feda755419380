"""Estimate of the device memory of a stage, from shapes, the recipe and the size of a batch.

Weights, gradients and moments are exact. Activations are counted for fused kernels from what each
part of a step keeps for its backward pass. Legend: B rows, T columns of a micro batch, D hidden
size, a bytes of an activation.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass

from mmmamba_cli.architecture import StackConfig
from mmmamba_cli.distill.kl_loss import LOGITS_PER_CHUNK
from mmmamba_cli.distill.stage_shapes import StageShapes, num_elements, tensor_bytes
from mmmamba_cli.recipe import Stage

FP32_BYTES, BF16_BYTES = 4, 2
MOMENTS = 2
# Outputs of both mixers, their difference, its square, and the gradients of these two, in fp32.
LOSS_BYTES = 16
# Of an element of a chunk of logits: both models' logits, in fp32 too, log-probabilities, products
# and their gradients.
LOGIT_BYTES = 32
# Matrices (T, T) of each head that `matrix-orientation` holds in fp32.
MATRICES = 6
# Gradients of the activations of a recomputed layer, as a share of them.
GRADIENT_SHARE = 0.5

HOW_COMPUTED = (
    "weights, gradients and moments: from the shapes of all tensors; a frozen tensor that no stage "
    "has trained is the teacher's own",
    "activations: an estimate for fused kernels, of the largest micro batch; plain PyTorch, as on "
    "a CPU, takes up to four times as much. Not counted: the vision tower's, and what the process "
    "and CUDA take",
)


@dataclass(frozen=True)
class MicroBatchSize:
    """The size of the largest micro batch of a process.

    `rows` and `columns` with padding; `scored` columns have a target in a `kl` stage.
    """

    rows: int
    columns: int
    scored: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one process that holds all trainable parameters (no shards)."""

    frozen_weights: int
    master_weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def estimate_memory(
    shapes: StageShapes, stage: Stage, size: MicroBatchSize, trained_before: Collection[str] = ()
) -> StageMemory:
    """The device memory of a stage at its peak.

    Args:
        shapes: of teacher and student, with the layer plan of the stage.
        size: of the largest micro batch.
        trained_before: parameters that earlier stages have trained, whose values are no longer the
            teacher's.
    """
    trainable, lora = shapes.trainable(stage)
    learning = set(trainable) - set(lora)
    frozen = shapes.student.keys() - learning
    own = {name for name in frozen if name in shapes.new or name in trained_before}
    wide = FP32_BYTES if stage.precision == "fp32" else BF16_BYTES
    held = tensor_bytes(shapes.teacher, shapes.teacher, shapes.small, wide)
    held += tensor_bytes(shapes.student, own, shapes.small, wide)
    elements = num_elements(shapes.student, learning) + adapter_elements(shapes, stage, lora)
    gradients = FP32_BYTES * elements
    activations = _activations(shapes, stage, size)
    if stage.loss == "kl":
        # No gradients exist while the first micro batch computes its logits. `auto` may have more.
        waiting = gradients if stage.accumulation == 1 else 0
        activations = max(activations, _logits(shapes, stage, size) - waiting)
    return StageMemory(
        frozen_weights=held,
        master_weights=FP32_BYTES * elements,
        gradients=gradients,
        moments=MOMENTS * FP32_BYTES * elements,
        activations=activations,
    )


def adapter_elements(shapes: StageShapes, stage: Stage, weights: Collection[str]) -> int:
    """Number of elements of the adapters of `weights`."""
    if stage.lora is None:
        return 0
    return sum(stage.lora.rank * sum(shapes.student[name]) for name in weights)


def _activations(shapes: StageShapes, stage: Stage, size: MicroBatchSize) -> int:
    """Activations at the peak of a backward pass."""
    a = BF16_BYTES if stage.precision == "bf16" else FP32_BYTES
    hidden, tokens = shapes.hidden_size, size.tokens
    linear = [shapes.stacks[i] for i in shapes.layers.linear]
    if stage.loss != "kl":
        return max((_layer_loss(stage.loss, s, hidden, a, size) for s in linear), default=0)
    kept = 2 * hidden * a * size.scored
    widest = max(_layer(stack, hidden, a) for stack in shapes.stacks)
    if stage.checkpointing:
        kept += len(shapes.stacks) * hidden * a * tokens
    else:
        kept += sum(_layer(stack, hidden, a) for stack in shapes.stacks) * tokens
        return kept + round(GRADIENT_SHARE * widest * tokens)
    return kept + round((1 + GRADIENT_SHARE) * widest * tokens)


def _logits(shapes: StageShapes, stage: Stage, size: MicroBatchSize) -> int:
    """Memory of a `kl` stage while it computes a chunk of logits."""
    a = BF16_BYTES if stage.precision == "bf16" else FP32_BYTES
    rows = min(size.scored, max(1, LOGITS_PER_CHUNK // shapes.vocab_size))
    kept = 3 * shapes.hidden_size * a * size.scored
    if stage.checkpointing:
        kept += len(shapes.stacks) * shapes.hidden_size * a * size.tokens
    else:
        kept += sum(_layer(stack, shapes.hidden_size, a) for stack in shapes.stacks) * size.tokens
    return kept + LOGIT_BYTES * rows * shapes.vocab_size


def _layer_loss(loss: str, stack: StackConfig, hidden: int, a: int, size: MicroBatchSize) -> int:
    """Activations of a layer loss in a layer, with those of the running model."""
    inner, tokens = stack.num_heads * stack.head_dim, size.tokens
    mixer = _mixer(stack, hidden, a)
    running = 3 * stack.intermediate_size * a
    if loss == "hidden-alignment":
        return (mixer + _mlp(stack, hidden, a) + LOSS_BYTES * hidden) * tokens
    if loss == "matrix-orientation":
        matrix = MATRICES * FP32_BYTES * stack.num_heads * size.columns
        return (max(mixer, running) + matrix) * tokens
    return max(mixer + LOSS_BYTES * inner, running + 2 * hidden * a) * tokens


def _layer(stack: StackConfig, hidden: int, a: int) -> int:
    """Bytes a token of what a layer keeps for its backward pass."""
    return _mixer(stack, hidden, a) + _mlp(stack, hidden, a)


def _mixer(stack: StackConfig, hidden: int, a: int) -> int:
    """Of a mixer: its input, q, k and v before and after the convolution, gate, output, norm."""
    inner = stack.num_heads * stack.head_dim
    width = inner + 2 * stack.num_kv_heads * stack.head_dim
    return a * (2 * hidden + 4 * width + 3 * inner)


def _mlp(stack: StackConfig, hidden: int, a: int) -> int:
    """Of an MLP: its input, both projections, their activation and product."""
    return a * (2 * hidden + 4 * stack.intermediate_size)
