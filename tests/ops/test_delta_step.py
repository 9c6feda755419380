"""The decoding step of a Gated DeltaNet mixer equals the convolution and the delta rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from decode_cases import Sizes, from_ring_buffer, random
from delta_step_cases import delta_weights

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops import causal_conv, delta_mixer_step, delta_rule
from mmmamba_cli.ops.decode import DeltaWeights, to_ring_buffer


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_steps_equal_the_whole_text(taps: int, bias: bool) -> None:
    sizes, normal, length = Sizes(taps=taps), random(0), 9
    weights = delta_weights(sizes, bias=bias)
    vkq = normal(sizes.batch, length, sizes.channels)
    gates = normal(sizes.batch, length, 2 * sizes.heads)
    mixed, conv_state = causal_conv(vkq, weights.conv_weight, weights.conv_bias)
    v, k, q = mixed.split(
        (sizes.kv_heads * sizes.P, sizes.kv_heads * sizes.N, sizes.heads * sizes.N), -1
    )
    dt, beta = gates.chunk(2, dim=-1)
    wanted, state = delta_rule(
        v.unflatten(-1, (-1, sizes.P)),
        k.unflatten(-1, (-1, sizes.N)),
        q.unflatten(-1, (-1, sizes.N)),
        weights.A * F.softplus(dt + weights.dt_bias),
        torch.sigmoid(beta + weights.beta_bias),
        qk_l2_norm=True,
        backend="recurrent",
    )
    ring = to_ring_buffer(vkq.new_zeros(sizes.batch, sizes.channels, taps - 1), 0)
    held = torch.zeros_like(state)
    for t in range(length):
        y = delta_mixer_step(vkq[:, t], gates[:, t], ring, held, torch.tensor([t]), weights)
        assert (y - wanted[:, t]).abs().max() < 1e-12
    assert (held - state).abs().max() < 1e-12
    assert torch.equal(from_ring_buffer(ring, length), conv_state)


def test_gradients_reach_the_inputs_and_the_state_before() -> None:
    sizes, normal = Sizes(), random(2)
    weights = delta_weights(sizes)
    ring, state = normal(2, sizes.channels, sizes.taps), normal(2, sizes.heads, sizes.P, sizes.N)

    def step(*given: torch.Tensor) -> torch.Tensor:
        vkq, gates, before = given
        return delta_mixer_step(
            vkq, gates, ring.clone(), before.clone(), torch.tensor([5]), weights
        )

    given = normal(2, sizes.channels), normal(2, 2 * sizes.heads), state
    assert torch.autograd.gradcheck(step, [x.requires_grad_() for x in given])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vkq", (2, 33)),
        ("gates", (2, 4)),
        ("conv_ring", (2, 38, 3)),
        ("state", (3, 4, 6, 5)),
        ("position", (2,)),
        ("beta_bias", (3,)),
    ],
)
def test_inconsistent_shapes(name: str, shape: tuple[int, ...]) -> None:
    sizes, normal = Sizes(), random(0)
    weights = delta_weights(sizes)
    given = {
        "vkq": normal(2, sizes.channels),
        "gates": normal(2, 2 * sizes.heads),
        "conv_ring": normal(2, sizes.channels, sizes.taps),
        "state": normal(2, sizes.heads, sizes.P, sizes.N),
        "position": torch.tensor([0]),
    }
    if name in DeltaWeights._fields:
        weights = weights._replace(**{name: normal(*shape)})
    else:
        given[name] = torch.zeros(shape, dtype=given[name].dtype)
    with pytest.raises(ValueError, match="delta_mixer_step: "):
        delta_mixer_step(**given, weights=weights)


def test_an_unknown_backend_is_named() -> None:
    sizes, normal = Sizes(), random(0)
    with pytest.raises(MmmambaError, match="no backend 'fastest'"):
        delta_mixer_step(
            normal(2, sizes.channels),
            normal(2, 2 * sizes.heads),
            normal(2, sizes.channels, sizes.taps),
            normal(2, sizes.heads, sizes.P, sizes.N),
            torch.tensor([0]),
            delta_weights(sizes),
            backend="fastest",
        )
