"""The Triton convolution against its reference in fp64: values, states and every gradient."""

import pytest
import torch
from ops_cases import relative_error
from torch import Tensor
from triton_device import (
    DEVICE,
    INTERPRETED,
    TOLERANCE,
    check,
    dtypes,
    faithful_interpreter,  # noqa: F401
    poisoned_buffers,  # noqa: F401
)

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops import causal_conv


def normal(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=rng) for name, shape in shapes.items()}


@dtypes
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127])
def test_conv_equals_the_reference(length, dtype):
    shapes = {"x": (2, length, 70), "weight": (70, 2), "bias": (70,), "initial_state": (2, 70, 1)}
    tensors = {n: t.to(dtype) for n, t in normal(length, **shapes).items()}
    check(causal_conv, tensors, TOLERANCE[dtype])


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_conv_layouts(width, packed, padded):
    tensors = normal(width, x=(2, 70, 5), weight=(5, width))
    columns, options = torch.arange(70), {"activation": "silu" if packed else None}
    if packed:
        tensors["bias"] = torch.linspace(-1, 1, 5)
        options["seq_idx"] = torch.stack([(columns > 2).long(), (columns > 65).long()])
    if packed and width > 1:
        tensors |= normal(9, initial_state=(2, 5, width - 1))
    if padded:
        options["mask"] = torch.stack([columns % 5 > 0, columns < 68])
    check(causal_conv, tensors, TOLERANCE[torch.float32], **options)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_calls_shorter_than_the_taps_continue_from_their_state(length):
    tensors = normal(length, x=(2, length, 5), weight=(5, 4), initial_state=(2, 5, 3))
    check(causal_conv, tensors, TOLERANCE[torch.float32])
    seq_idx = torch.tensor([[0, 0, 1], [0, 1, 1]])[:, :length]
    check(causal_conv, tensors, TOLERANCE[torch.float32], seq_idx=seq_idx)


def test_noncontiguous_conv_inputs_and_gradients():
    tensors = normal(3, x=(2, 70, 9), weight=(9, 3), bias=(9,), initial_state=(2, 9, 2))
    check(causal_conv, tensors, TOLERANCE[torch.float32], scattered=True)


def test_padding_content_is_ignored():
    tensors = {n: t.to(DEVICE) for n, t in normal(4, x=(2, 20, 5), weight=(5, 3)).items()}
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.6
    expected = causal_conv(**tensors, mask=mask, backend="triton")
    tensors["x"][~mask] = torch.nan
    for a, b in zip(causal_conv(**tensors, mask=mask, backend="triton"), expected, strict=True):
        assert torch.equal(a, b)


def test_half_inputs_round_once():
    tensors = normal(5, x=(1, 40, 8), weight=(8, 2), bias=(8,))
    small = {n: t.bfloat16().to(DEVICE) for n, t in tensors.items()}
    y, _ = causal_conv(**small, backend="triton")
    exact, _ = causal_conv(**{n: t.cpu().double() for n, t in small.items()}, backend="reference")
    assert relative_error(y.cpu(), exact.bfloat16()) < 2**-10


def test_fp64_is_rejected():
    tensors = {n: t.double() for n, t in normal(6, x=(1, 4, 8), weight=(8, 2)).items()}
    with pytest.raises(MmmambaError, match=r"causal_conv: the triton backend takes .*float64"):
        causal_conv(**tensors, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take hours for so many programs")
def test_more_time_blocks_than_the_second_grid_axis():
    shapes = {"x": (1, 32 * 65_600, 66), "weight": (66, 4), "bias": (66,)}
    tensors = {n: t.to(torch.bfloat16) for n, t in normal(3, **shapes).items()}
    check(causal_conv, tensors, TOLERANCE[torch.bfloat16])
