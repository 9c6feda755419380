"""What a stage of distillation takes on disk, from shapes and the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmmamba_cli.distill.stage_memory import FP32_BYTES, MOMENTS, adapter_elements
from mmmamba_cli.distill.stage_shapes import StageShapes, num_elements, tensor_bytes
from mmmamba_cli.recipe import Stage


@dataclass(frozen=True)
class StageDisk:
    """Bytes on disk: the product, a second one of the lowest held-out loss, and states.

    `states` is the peak while the stage trains, when a new state is written beside the last one;
    they are removed at its end.
    """

    product: int
    best: int
    states: int


def estimate_disk(
    shapes: StageShapes, stage: Stage, itemsize: int, has_held_out: bool, unused: int = 0
) -> StageDisk:
    """Bytes of the tensors of a stage's files; their headers are small.

    Args:
        itemsize: bytes of an element of a product.
        has_held_out: whether the student of the lowest held-out loss is kept.
        unused: bytes of tensors in each product that no forward pass reads.
    """
    trainable, lora = shapes.trainable(stage)
    elements = num_elements(shapes.student, set(trainable) - set(lora))
    masters = FP32_BYTES * (elements + adapter_elements(shapes, stage, lora))
    product = product_bytes(shapes, itemsize) + unused
    # The newest state and the one that is written, each beside the best student so far.
    states = 2 * (1 + MOMENTS) * masters + (2 * masters if has_held_out else 0)
    return StageDisk(product, product if has_held_out else 0, states)


def product_bytes(shapes: StageShapes, itemsize: int) -> int:
    """Bytes of the tensors of a product that a forward pass reads."""
    return tensor_bytes(shapes.student, shapes.student, shapes.small, itemsize)


def peak_disk(stages: Sequence[StageDisk]) -> int:
    """Peak of the bytes that stages add: products so far, and the states of a stage."""
    peak = written = 0
    for stage in stages:
        # The product is written before the states are removed.
        written += stage.product + stage.best
        peak = max(peak, written + stage.states)
    return peak
