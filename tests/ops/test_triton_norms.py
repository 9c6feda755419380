"""The Triton norms against their references in fp64: values and every gradient."""

import pytest
import torch
from ops_cases import relative_error
from torch import Tensor
from triton_device import (
    DEVICE,
    TOLERANCE,
    check,
    dtypes,
    faithful_interpreter,  # noqa: F401
    poisoned_buffers,  # noqa: F401
)

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops import gated_rms_norm, rms_norm
from mmmamba_cli.ops.norm import fused

EPS = 1e-5


def make_norm(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """y and gate in `dtype`, the weight in fp32 as in a trained model."""
    rng = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=rng).to(dtype) for name in ("y", "gate")}
    return made | {"weight": torch.randn(shape[-1:], generator=rng)}


def plain(made: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"x": made["y"], "weight": made["weight"]}


@dtypes
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 65, 4, 128), (3, 3000), (7,)])
def test_norms_equal_the_reference(shape, dtype):
    made = make_norm(shape, dtype)
    check(gated_rms_norm, made, TOLERANCE[dtype], eps=EPS)
    check(rms_norm, plain(made), TOLERANCE[dtype], eps=EPS)


def test_grid_stride_over_rows(monkeypatch):
    monkeypatch.setattr(fused, "MAX_BACKWARD_PROGRAMS", 3)
    made = make_norm((37, 600), torch.float32)
    check(gated_rms_norm, made, TOLERANCE[torch.float32], eps=EPS)
    check(rms_norm, plain(made), TOLERANCE[torch.float32], eps=EPS)


def test_noncontiguous_norm_inputs_and_gradients():
    made = make_norm((5, 3, 40), torch.float32)
    check(gated_rms_norm, made, TOLERANCE[torch.float32], eps=EPS, scattered=True)
    check(rms_norm, plain(made), TOLERANCE[torch.float32], eps=EPS, scattered=True)


@pytest.mark.parametrize("leading", [(2, 9), (18,), (2, 3, 3)])
def test_gate_as_slice_of_a_packed_projection(leading):
    heads, dim = 3, 16
    rng = torch.Generator().manual_seed(1)
    packed = torch.randn(*leading, 100, generator=rng).to(DEVICE)
    gate = packed[..., 20 : 20 + heads * dim].unflatten(-1, (heads, dim))
    y, weight = (torch.randn(*size, generator=rng).to(DEVICE) for size in (gate.shape, (dim,)))
    wanted = gated_rms_norm(y, gate, weight, EPS, backend="reference")
    assert fused._gate_layout(gate)[0] is gate
    found = gated_rms_norm(y, gate, weight, EPS, backend="triton")
    assert relative_error(found, wanted) < TOLERANCE[torch.float32]
    uneven = gate[:, ::2] if len(leading) > 1 else gate[::2]
    found = gated_rms_norm(torch.ones_like(uneven), uneven, weight, EPS, backend="triton")
    wanted = gated_rms_norm(torch.ones_like(uneven), uneven, weight, EPS, backend="reference")
    assert relative_error(found, wanted) < TOLERANCE[torch.float32]


def test_plain_norm_rounds_before_the_weight_and_gated_norm_once():
    made = {n: t.to(DEVICE) for n, t in make_norm((64, 16), torch.bfloat16).items()}
    for call, arguments in ((rms_norm, plain(made)), (gated_rms_norm, made)):
        found = call(**arguments, eps=EPS, backend="triton")
        expected = call(**arguments, eps=EPS, backend="reference")
        assert found.dtype == torch.bfloat16
        assert (found != expected).float().mean() < 0.01


@pytest.mark.parametrize("scale", [1e-12, 1e15])
def test_squares_of_half_inputs_neither_underflow_nor_overflow(scale):
    made = {n: t.to(DEVICE) for n, t in make_norm((8, 16), torch.float32).items()}
    y, gate = (made["y"] * scale).bfloat16(), made["gate"].bfloat16()
    for backend in ("triton", "reference"):
        assert gated_rms_norm(y, gate, made["weight"], EPS, backend=backend).isfinite().all()
    found = rms_norm(y, made["weight"], EPS, backend="triton")
    assert relative_error(found, rms_norm(y, made["weight"], EPS, backend="reference")) < 0.01


def test_fp64_is_rejected():
    made = {n: t.double() for n, t in make_norm((4, 8), torch.float32).items()}
    with pytest.raises(MmmambaError, match=r"gated_rms_norm: the triton backend takes .*float64"):
        gated_rms_norm(**made, eps=EPS, backend="triton")
