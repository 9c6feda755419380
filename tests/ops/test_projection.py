"""The fused linear layer against its parts, and int8 weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops import gated_rms_norm, project, projection
from mmmamba_cli.ops.projection import dequantize, quantize_rows

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = FP64) -> Tensor:
    rng = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=rng, dtype=FP64).to(dtype)


def test_linear_with_and_without_bias():
    x, weight, bias = normal(3, 10), normal(7, 10), normal(7)
    torch.testing.assert_close(project(x, weight), x @ weight.T)
    torch.testing.assert_close(project(x, weight, bias=bias), x @ weight.T + bias)


def test_rms_norm_in_front():
    x, weight, norm = normal(2, 10), normal(7, 10), normal(10, seed=1)
    wanted = (x / (x.square().mean(1, keepdim=True) + 0.1).sqrt() * norm) @ weight.T
    torch.testing.assert_close(project(x, weight, norm=norm, eps=0.1), wanted)


def test_gated_rms_norm_per_head():
    x, gate, weight, norm = normal(2, 12), normal(2, 12, seed=1), normal(7, 12), normal(4)
    heads = gated_rms_norm(x.view(2, 3, 4), gate.view(2, 3, 4), norm, 0.1).view(2, 12)
    torch.testing.assert_close(project(x, weight, norm=norm, eps=0.1, gate=gate), heads @ weight.T)


def test_norm_dim_equals_a_norm_of_ones():
    x, weight, gate = normal(2, 12), normal(7, 12), normal(2, 12, seed=1)
    for dim, options in ((12, {}), (4, {"gate": gate}), (12, {"gate": gate, "inputs_ready": True})):
        wanted = project(x, weight, norm=torch.ones(dim, dtype=FP64), eps=0.1, **options)
        found = project(x, weight, norm_dim=dim, eps=0.1, **options)
        torch.testing.assert_close(found, wanted)
    unlike = project(x, weight, norm_dim=12, eps=0.1, gate=gate)
    assert not torch.allclose(project(x, weight, norm_dim=4, eps=0.1, gate=gate), unlike)


def test_norm_weights_folded_into_the_product():
    x, weight, norm = normal(2, 12), normal(7, 12), normal(12, seed=1)
    gate, heads = normal(2, 12, seed=2), normal(4, seed=3)
    wanted = project(x, weight, norm=norm, eps=0.1)
    torch.testing.assert_close(project(x, weight * norm, norm_dim=12, eps=0.1), wanted)
    wanted = project(x, weight, norm=heads, eps=0.1, gate=gate)
    folded = weight * heads.repeat(3)
    torch.testing.assert_close(project(x, folded, norm_dim=4, eps=0.1, gate=gate), wanted)


def test_swiglu():
    x, weight, bias = normal(2, 10), normal(6, 10), normal(6)
    first, second = (x @ weight.T + bias).split(3, dim=1)
    wanted = first / (1 + torch.exp(-first)) * second
    torch.testing.assert_close(project(x, weight, bias=bias, swiglu=True), wanted)


def test_out_may_be_the_residual():
    x, weight, residual = normal(2, 10), normal(7, 10), normal(2, 7)
    wanted = residual + x @ weight.T
    torch.testing.assert_close(project(x, weight, residual=residual), wanted)
    assert project(x, weight, residual=residual, out=residual) is residual
    torch.testing.assert_close(residual, wanted)


def test_bf16_rounds_like_the_modules():
    x, weight, norm = normal(2, 64, dtype=BF16), normal(8, 64, dtype=BF16), normal(64, dtype=BF16)
    from mmmamba_cli.ops import rms_norm

    wanted = F.linear(rms_norm(x, norm, 1e-5), weight)
    assert torch.equal(project(x, weight, norm=norm, eps=1e-5), wanted)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_int8_error_is_at_most_half_a_scale(dtype):
    weight = normal(9, 40, dtype=dtype)
    weight[3] = 0
    small = quantize_rows(weight)
    assert small.values.dtype == torch.int8
    assert small.scales.dtype == FP32
    assert small.shape == (9, 40)
    assert small.values.abs().amax(1).tolist() == [127] * 3 + [0] + [127] * 5
    distance = (dequantize(small, FP64) - weight.double()).abs()
    assert (distance <= small.scales.double().unsqueeze(1) * 0.5001).all()
    assert distance.amax() > 0.4 * small.scales.amax()


def test_int8_product_equals_the_dequantized_product():
    x, small = normal(2, 40, dtype=FP32), quantize_rows(normal(9, 40, dtype=FP32))
    wanted = x.double() @ (small.values.double() * small.scales.double().unsqueeze(1)).T
    torch.testing.assert_close(project(x, small).double(), wanted, rtol=1e-5, atol=1e-5)
    assert dequantize(small, BF16).dtype == BF16


def test_gradients_of_the_reference():
    x, weight = normal(2, 10).requires_grad_(), normal(6, 10).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *given: project(*given, norm=normal(10), eps=0.1, swiglu=True), (x, weight)
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight": normal(7, 9)}, r"weight \(7, 9\)"),
        ({"bias": normal(6)}, "bias is"),
        ({"norm": normal(5)}, "norm is"),
        ({"gate": normal(2, 10)}, "norm is None"),
        ({"gate": normal(2, 10), "norm": normal(4)}, r"norm is \(4,\), .* divisor of 10"),
        ({"gate": normal(2, 9), "norm": normal(5)}, "gate is"),
        ({"norm_dim": 5}, "norm_dim is 5, expected 10"),
        ({"norm_dim": 10, "norm": normal(10)}, "norm and norm_dim are both given"),
        ({"norm_dim": 5, "norm": normal(5), "gate": normal(2, 10)}, "both given"),
        ({"norm_dim": 4, "gate": normal(2, 10)}, "norm_dim is 4, expected a divisor of 10"),
        ({"norm_dim": 0, "gate": normal(2, 10)}, "norm_dim is 0, expected a divisor of 10"),
        ({"residual": normal(1, 7)}, "residual is"),
        ({"out": normal(2, 6)}, "out is"),
        ({"swiglu": True}, "7 rows"),
    ],
)
def test_wrong_shapes_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        project(normal(2, 10), **{"weight": normal(7, 10), **options})


def test_auto_picks_triton_for_few_rows_and_power_of_two_heads(monkeypatch):
    taken = []
    for name in ("triton", "products"):
        monkeypatch.setitem(
            projection.PROJECT_BACKENDS, name, lambda *_, n=name, **__: taken.append(n)
        )
    monkeypatch.setattr(projection, "supports_triton", lambda *_: True)
    x, weight, gate = normal(2, 12), normal(7, 12), normal(2, 12, seed=1)
    for options in (
        {"norm_dim": 12},
        {"norm_dim": 4, "gate": gate},
        {"norm_dim": 6, "gate": gate},
        {"norm": normal(4), "gate": gate},
        {"norm": normal(6), "gate": gate},
    ):
        project(x, weight, **options)
    assert taken == ["triton", "triton", "products", "triton", "products"]


def test_an_unknown_backend_is_refused():
    with pytest.raises(MmmambaError, match="project: there is no backend 'abacus'"):
        project(normal(2, 10), normal(7, 10), backend="abacus")
