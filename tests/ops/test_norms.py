"""RMSNorm, plain and gated, against numpy in float64, and the order of rounding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import relative_error, seeds
from torch import Tensor

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops import gated_rms_norm, rms_norm

EPS = 1e-5
tolerances = st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-6)])


def make_norm(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """y and gate of `shape`, and a weight of its last dimension."""
    rng = torch.Generator().manual_seed(seed)
    shapes = (shape, shape, shape[-1:])
    return tuple(torch.randn(*s, generator=rng, dtype=torch.float64).to(dtype) for s in shapes)


def norm_oracle(x: Tensor, weight: Tensor) -> np.ndarray:
    rows = x.double().numpy()
    means = np.array([np.dot(row, row) / len(row) for row in rows.reshape(-1, rows.shape[-1])])
    return rows / np.sqrt(means.reshape(*rows.shape[:-1], 1) + EPS) * weight.double().numpy()


def gated_oracle(y: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    gates = gate.double().numpy()
    return torch.from_numpy(norm_oracle(y, weight) * gates / (1 + np.exp(-gates)))


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    precision=tolerances,
)
def test_norms_equal_the_oracle(seed, shape, precision):
    dtype, tolerance = precision
    y, gate, weight = make_norm(seed, shape, dtype)
    plain, gated = rms_norm(y, weight, EPS), gated_rms_norm(y, gate, weight, EPS)
    assert plain.dtype == gated.dtype == dtype
    assert relative_error(plain, torch.from_numpy(norm_oracle(y, weight))) < tolerance
    assert relative_error(gated, gated_oracle(y, gate, weight)) < tolerance


def test_heads_are_normalized_separately():
    y, gate, weight = make_norm(0, (2, 3, 4, 8), torch.float64)
    whole = gated_rms_norm(y, gate, weight, EPS)
    y[:, :, 0] *= 100
    changed = gated_rms_norm(y, gate, weight, EPS)
    assert torch.equal(whole[:, :, 1:], changed[:, :, 1:])


def test_gated_norm_rounds_once():
    y, gate, weight = make_norm(1, (64, 4, 16), torch.bfloat16)
    result = gated_rms_norm(y, gate, weight, EPS)
    assert result.dtype == torch.bfloat16
    expected = gated_oracle(y, gate, weight).bfloat16()
    assert (result != expected).float().mean() < 0.01


def test_plain_norm_rounds_before_the_weight_as_llama_does():
    x, _, weight = make_norm(2, (64, 16), torch.bfloat16)
    normed = torch.from_numpy(norm_oracle(x, torch.ones(16))).bfloat16()
    result = rms_norm(x, weight, EPS)
    assert result.dtype == torch.bfloat16
    assert (result != normed * weight).float().mean() < 0.01


def test_fp32_weight_keeps_the_dtype_of_x_and_its_own_precision():
    x, gate, _ = make_norm(3, (64, 16), torch.bfloat16)
    weight = torch.full((16,), 1 + 2**-9)
    normed = torch.from_numpy(norm_oracle(x, torch.ones(16))).bfloat16()
    result = rms_norm(x, weight, EPS)
    assert result.dtype == torch.bfloat16
    assert (result != (normed.float() * weight).bfloat16()).float().mean() < 0.01
    assert gated_rms_norm(x, gate, weight, EPS).dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1e-12, 1e15])
def test_squares_of_half_inputs_neither_underflow_nor_overflow(scale):
    x, gate, weight = make_norm(4, (8, 16), torch.float32)
    x = (x * scale).bfloat16()
    for result in (rms_norm(x, weight, EPS), gated_rms_norm(x, gate.bfloat16(), weight, EPS)):
        assert result.isfinite().all()
    assert relative_error(rms_norm(x, weight, EPS), torch.from_numpy(norm_oracle(x, weight))) < 0.01


def test_norms_of_zeros_have_finite_gradients():
    y, gate, weight = make_norm(5, (3, 4), torch.float32)
    y = torch.zeros_like(y).requires_grad_()
    (rms_norm(y, weight, EPS) + gated_rms_norm(y, gate, weight, EPS)).sum().backward()
    assert y.grad.isfinite().all() and y.grad.abs().sum() > 0


def test_noncontiguous_norm_inputs():
    y, gate, weight = make_norm(6, (5, 3, 4), torch.float64)
    scattered = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (y, gate)]
    assert not scattered[0].is_contiguous()
    expected = gated_rms_norm(y, gate, weight, EPS)
    assert relative_error(gated_rms_norm(*scattered, weight, EPS), expected) < 1e-12
    assert relative_error(rms_norm(scattered[0], weight, EPS), rms_norm(y, weight, EPS)) < 1e-12


def test_unknown_norm_backends_and_broadcastable_shapes_are_rejected():
    y, gate, weight = make_norm(7, (5, 3, 4), torch.float64)
    with pytest.raises(MmmambaError, match=r"gated_rms_norm: .*'warp'.*auto, reference"):
        gated_rms_norm(y, gate, weight, EPS, backend="warp")
    with pytest.raises(MmmambaError, match=r"^rms_norm: .*'warp'.*auto, reference"):
        rms_norm(y, weight, EPS, backend="warp")
    with pytest.raises(ValueError, match="gated_rms_norm: gate"):
        gated_rms_norm(y, gate[:, :1], weight, EPS)
    with pytest.raises(ValueError, match="gated_rms_norm: weight"):
        gated_rms_norm(y, gate, weight[:1], EPS)
    with pytest.raises(ValueError, match="rms_norm: weight"):
        rms_norm(y, weight[:1], EPS)
