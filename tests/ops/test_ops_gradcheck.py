"""Analytic against numeric gradients in float64, for every input of every op."""

import pytest
import torch
from ops_cases import REFERENCES, make_scan
from torch import Tensor

from mmmamba_cli.ops import causal_conv, causal_conv_step, gated_rms_norm, rms_norm, ssd, ssd_step

MASK = torch.tensor([[0, 1, 1, 0, 1]])
SEQ_IDX = torch.tensor([[5, 5, 3, 3, 3]])
layouts = pytest.mark.parametrize(("mask", "seq_idx"), [(None, None), (MASK, SEQ_IDX)])


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=rng, dtype=torch.float64).requires_grad_() for s in shapes]


def small_scan(length: int) -> dict[str, Tensor]:
    scan = make_scan(0, batch=1, length=length, value_dim=2, state_dim=2)
    # Step sizes of order 1: with tiny ones, numeric gradients are below rounding.
    scan.dt, scan.dt_bias = scan.dt.abs() / 9, scan.dt_bias.abs()
    return scan.with_gradients().tensors()


@layouts
@pytest.mark.parametrize("backend", REFERENCES)
def test_gradcheck_ssd(mask, seq_idx, backend):
    tensors = small_scan(5)

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(
            **dict(zip(tensors, values, strict=True)),
            dt_softplus=True,
            mask=mask,
            seq_idx=seq_idx,
            chunk_size=2,
            backend=backend,
        )

    assert torch.autograd.gradcheck(scan, tuple(tensors.values()))


@pytest.mark.parametrize("backend", REFERENCES)
def test_gradcheck_ssd_without_softplus(backend):
    tensors = small_scan(3)

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(**dict(zip(tensors, values, strict=True)), chunk_size=2, backend=backend)

    assert torch.autograd.gradcheck(scan, tuple(tensors.values()))


def test_gradcheck_ssd_step():
    tensors = small_scan(1)
    tensors["state"] = tensors.pop("initial_state")
    for name in ("x", "dt", "B", "C"):
        tensors[name] = tensors[name][:, 0].detach().requires_grad_()

    def step(*values: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_step(**dict(zip(tensors, values, strict=True)), dt_softplus=True)

    assert torch.autograd.gradcheck(step, tuple(tensors.values()))


@layouts
@pytest.mark.parametrize("activation", ["silu", None])
def test_gradcheck_causal_conv(mask, seq_idx, activation):
    def conv(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv(
            x,
            weight,
            bias,
            initial_state=state,
            activation=activation,
            mask=mask,
            seq_idx=seq_idx,
        )

    assert torch.autograd.gradcheck(conv, leaves((1, 5, 2), (2, 3), (2,), (1, 2, 2)))


def test_gradcheck_causal_conv_step():
    assert torch.autograd.gradcheck(causal_conv_step, leaves((2, 2), (2, 3), (2,), (2, 2, 2)))


def test_gradcheck_norms():
    y, gate, weight = leaves((2, 3, 4), (2, 3, 4), (4,))
    assert torch.autograd.gradcheck(lambda *t: gated_rms_norm(*t, 1e-5), (y, gate, weight))
    assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, 1e-5), (y, weight))
