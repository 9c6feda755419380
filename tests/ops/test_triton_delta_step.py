"""Triton's decoding step of a Gated DeltaNet mixer against the reference in fp64."""

import pytest
import torch
from decode_cases import Sizes, random
from delta_step_cases import delta_weights
from ops_cases import relative_error
from triton_device import (
    DEVICE,
    TOLERANCE,
    dtypes,
    faithful_interpreter,  # noqa: F401
    poisoned_buffers,  # noqa: F401
)

from mmmamba_cli.ops import delta_mixer_step
from mmmamba_cli.ops.decode import DeltaWeights


def moved(weights: DeltaWeights, **options) -> DeltaWeights:
    return DeltaWeights(*(None if w is None else w.to(**options) for w in weights))


def check(sizes: Sizes, dtype: torch.dtype, *, bias: bool = True, inputs_ready: bool = False):
    normal, tolerance = random(0, dtype), TOLERANCE[dtype]
    weights = delta_weights(sizes, dtype, bias=bias)
    ring = normal(sizes.batch, sizes.channels, sizes.taps)
    state = random(2, torch.float32)(sizes.batch, sizes.heads, sizes.P, sizes.N)
    ring_here, state_here = ring.to(DEVICE).clone(), state.to(DEVICE).clone()
    ring, state = ring.double(), state.double()
    for t in range(5, 9):
        vkq, gates = normal(sizes.batch, sizes.channels), normal(sizes.batch, 2 * sizes.heads)
        # The token's own slot must not be read.
        ring_here[..., t % sizes.taps] = torch.nan
        given = (vkq.double(), gates.double(), ring, state, torch.tensor([t]))
        wanted = delta_mixer_step(*given, moved(weights, dtype=torch.float64), backend="reference")
        # Slices of one packed projection, with numbers behind them that must not be read.
        packed = torch.cat((vkq, gates, torch.full_like(vkq, torch.nan)), 1).to(DEVICE)
        vkq, gates, _ = packed.split((sizes.channels, 2 * sizes.heads, sizes.channels), 1)
        here, at = moved(weights, device=DEVICE), torch.tensor([t], device=DEVICE)
        found = delta_mixer_step(
            vkq, gates, ring_here, state_here, at, here, inputs_ready=inputs_ready, backend="triton"
        )
        assert found.dtype == dtype
        assert relative_error(found.cpu(), wanted) < tolerance, t
        assert torch.equal(ring_here.cpu().double(), ring), t
        assert relative_error(state_here.cpu(), state) < tolerance, t


@dtypes
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_steps_equal_the_reference(taps, bias, dtype):
    check(Sizes(taps=taps), dtype, bias=bias)


@dtypes
@pytest.mark.parametrize("inputs_ready", [True, False])
def test_sizes_of_a_model(inputs_ready, dtype):
    check(Sizes(P=64, N=64, share=1, taps=2), dtype, inputs_ready=inputs_ready)
    # A batch with large blocks.
    check(Sizes(batch=5, P=48, N=80, share=2, taps=2), dtype, inputs_ready=inputs_ready)


def test_what_the_kernel_does_not_take():
    sizes, normal = Sizes(), random(0, torch.float32)
    weights = moved(delta_weights(sizes, torch.float32), device=DEVICE)
    given = [
        normal(2, sizes.channels).to(DEVICE),
        normal(2, 2 * sizes.heads).to(DEVICE),
        normal(2, sizes.channels, sizes.taps).to(DEVICE),
        normal(2, sizes.heads, sizes.P, sizes.N).to(DEVICE),
        torch.tensor([0], device=DEVICE),
    ]
    with pytest.raises(ValueError, match="not contiguous"):
        delta_mixer_step(
            *given[:3], given[3].mT.contiguous().mT, given[4], weights, backend="triton"
        )
    with pytest.raises(ValueError, match="expected fp32"):
        delta_mixer_step(*given[:3], given[3].bfloat16(), given[4], weights, backend="triton")
