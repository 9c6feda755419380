"""Fidelity of each seeded mixer to the teacher's attention, before training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmmamba_cli.checkpoint import Checkpoint, stored_dtype
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.decoder import HolisticDecoder
from mmmamba_cli.model.mamba2 import Mamba2
from mmmamba_cli.seed.calibration import Calibration


@dataclass(frozen=True)
class LayerFidelity:
    """Student and teacher mixer outputs before W_O, compared on the teacher's hidden states.

    `cosine` is the mean over tokens and heads; `relative_mse` is |s - t|^2 / |t|^2.
    """

    layer: int
    cosine: float
    relative_mse: float


@torch.no_grad()
def measure_fidelity(
    teacher: Checkpoint,
    student: Checkpoint,
    calibration: Calibration,
    advance: Callable[[int], None] | None = None,
) -> list[LayerFidelity]:
    """Compare layer by layer in fp32, with one layer of each model in memory at a time."""
    with torch.device("meta"):
        decoder = HolisticDecoder(teacher.config)
    _fill(decoder, teacher, "model.", skip="layers.")
    mask = calibration.attention_mask
    prompt = decoder.prepare(calibration.input_ids, calibration.pixel_values, mask)
    hidden, columns = decoder.embed(prompt), prompt.embedding_layout or prompt.language_layout
    results = []
    for layer in range(teacher.config.num_hidden_layers):
        if layer == decoder.num_embedding_layers:
            hidden = (
                decoder.embedding_to_language(hidden, prompt)
                if prompt.embedding_layout is not None
                else hidden
            )
            columns = prompt.language_layout
        with torch.device("meta"):
            block = Block(teacher.config, layer)
            mixer = Mamba2(
                teacher.config.hidden_size,
                student.config.stack_of(layer),
                student.config.mixer_config,
                layer,
            )
        _fill(block, teacher, f"model.layers.{layer}.")
        _fill(mixer, student, f"model.layers.{layer}.mixer.")
        normed = block.mixer_norm(hidden)
        expected, actual = block.mixer.mix(normed, columns), mixer.mix(normed, columns)
        results.append(_compare(layer, expected, actual, columns.mask, mixer.head_dim))
        hidden = block(hidden, columns)
        if advance is not None:
            advance(1)
    return results


def _fill(module: nn.Module, checkpoint: Checkpoint, prefix: str, skip: str | None = None) -> None:
    names = [n for n in module.state_dict() if skip is None or not n.startswith(skip)]
    state = {n: checkpoint.read(prefix + n).to(stored_dtype(n, torch.float32)) for n in names}
    module.load_state_dict(state, strict=skip is None, assign=True)


def _compare(
    layer: int, expected: Tensor, actual: Tensor, mask: Tensor | None, head_dim: int
) -> LayerFidelity:
    if mask is not None:
        expected, actual = expected[mask], actual[mask]
    expected, actual = expected.reshape(-1, head_dim), actual.reshape(-1, head_dim)
    cosine = torch.nn.functional.cosine_similarity(actual, expected, dim=-1).mean()
    relative = (actual - expected).square().sum() / expected.square().sum()
    values = float(cosine), float(relative)
    if not all(math.isfinite(value) for value in values):
        raise ArithmeticError(f"layer {layer}: fidelity is {values}")
    return LayerFidelity(layer, *values)
