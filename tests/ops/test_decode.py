"""Decoding steps in place: steps equal the whole sequence, attention equals softmax."""

import pytest
import torch
from decode_cases import (
    Sizes,
    angles,
    attention,
    from_ring_buffer,
    mixer_weights,
    random,
    rotate,
    whole_mixer,
)

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops import attention_step, causal_conv, greedy_argmax, mixer_step
from mmmamba_cli.ops.decode import to_ring_buffer


def position(number: int) -> torch.Tensor:
    return torch.tensor([number])


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("without", ["", "conv_bias", "dt_bias", "D"])
def test_steps_equal_the_whole_sequence(taps, without):
    sizes, normal = Sizes(taps=taps), random(0)
    weights = mixer_weights(sizes, without=without)
    vkq, dt = normal(2, 11, sizes.channels), normal(2, 11, sizes.heads)
    y, _, _ = whole_mixer(vkq, dt, sizes, weights)
    _, conv_state, state = whole_mixer(vkq[:, :5], dt[:, :5], sizes, weights)
    _, conv_after, state_after = whole_mixer(vkq, dt, sizes, weights)
    ring = to_ring_buffer(conv_state, 5)
    kept = ring.data_ptr(), state.data_ptr()
    for t in range(5, 11):
        given = (vkq[:, t], dt[:, t], ring, state, position(t), weights)
        # `inputs_ready` has no effect on the reference.
        found = mixer_step(*given, inputs_ready=t % 2 == 0)
        torch.testing.assert_close(found, y[:, t])
    torch.testing.assert_close(state, state_after)
    torch.testing.assert_close(from_ring_buffer(ring, 11), conv_after)
    assert kept == (ring.data_ptr(), state.data_ptr())


@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [2, 7, 8])
def test_ring_buffer_slots(taps, length):
    inputs = torch.arange(1.0, length + 1).view(1, length, 1)
    _, conv_state = causal_conv(inputs, torch.ones(1, taps))
    ring = to_ring_buffer(conv_state, length)
    assert ring.shape == (1, 1, taps)
    for t in range(max(0, length - taps + 1), length):
        assert ring[0, 0, t % taps] == t + 1
    assert ring[0, 0, length % taps] == 0
    assert torch.equal(from_ring_buffer(ring, length), conv_state)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_covers_columns_from_start_to_position(rows, padded):
    normal, dim = random(0), 8
    q, k, v = normal(3, 4, dim), normal(3, 2, dim), normal(3, 2, dim)
    keys, values = normal(3, 2, 12, dim), normal(3, 2, 12, dim)
    starts = torch.tensor([0, 2, 7]) if padded else None
    cos, sin = angles(torch.tensor([7, 5, 0])[:rows], dim)
    before = keys.clone(), values.clone()
    found = attention_step(q, k, v, keys, values, position(7), starts, cos, sin)
    turned = rotate(k, cos.unsqueeze(1), sin.unsqueeze(1))
    torch.testing.assert_close(keys[:, :, 7], turned)
    assert torch.equal(values[:, :, 7], v)
    q = rotate(q, cos.unsqueeze(1), sin.unsqueeze(1))
    for row in range(3):
        first = int(starts[row]) if padded else 0
        wanted = attention(q[row], keys[row, :, :8], values[row, :, :8], first)
        torch.testing.assert_close(found[row], wanted.flatten())
    for now, then in zip((keys, values), before, strict=True):
        others = torch.arange(12) != 7
        assert torch.equal(now[:, :, others], then[:, :, others])


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("dt", (2, 3), "dt is"),
        ("conv_ring", (2, 42, 3), "conv_ring is"),
        ("ssm_state", (2, 4, 6), "ssm_state"),
        ("ssm_state", (2, 4, 6, 6), "channels of vkq"),
        ("ssm_state", (3, 4, 6, 5), "ssm_state is"),
        ("position", (2,), "position is"),
    ],
)
def test_mixer_step_names_a_wrong_shape(name, shape, said):
    sizes = Sizes()
    assert sizes.channels == 42
    given = {
        "vkq": torch.zeros(2, 42),
        "dt": torch.zeros(2, 4),
        "conv_ring": torch.zeros(2, 42, 4),
        "ssm_state": torch.zeros(2, 4, 6, 5),
        "position": position(0),
        "weights": mixer_weights(sizes),
    }
    mixer_step(**given, backend="reference")
    with pytest.raises(ValueError, match=said):
        mixer_step(**{**given, name: torch.zeros(shape)})
    with pytest.raises(MmmambaError, match="mixer_step: there is no backend 'abacus'"):
        mixer_step(**given, backend="abacus")


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("q", (2, 3, 8), "q is"),
        ("k", (2, 1, 8), "k is"),
        ("v", (2, 2, 4), "v is"),
        ("values", (2, 2, 8, 8), "values is"),
        ("position", (), "position is"),
        ("starts", (1,), "starts is"),
        ("cos", (3, 8), "cos is"),
        ("sin", (2, 4), "sin is"),
    ],
)
def test_attention_step_names_a_wrong_shape(name, shape, said):
    given = {
        "q": torch.zeros(2, 4, 8),
        "k": torch.zeros(2, 2, 8),
        "v": torch.zeros(2, 2, 8),
        "keys": torch.zeros(2, 2, 9, 8),
        "values": torch.zeros(2, 2, 9, 8),
        "position": position(0),
        "starts": None,
        "cos": torch.zeros(2, 8),
        "sin": torch.zeros(2, 8),
    }
    attention_step(**given, backend="reference")
    with pytest.raises(ValueError, match=said):
        attention_step(**{**given, name: torch.zeros(shape)})
    with pytest.raises(MmmambaError, match="attention_step: there is no backend 'abacus'"):
        attention_step(**given, backend="abacus")


def test_greedy_argmax_skips_suppressed_ids():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [5.0, 1.0, 4.0, 3.0]])
    nothing = torch.zeros(4, dtype=torch.bool)
    assert greedy_argmax(logits, nothing).tolist() == [1, 0]
    assert greedy_argmax(logits, torch.tensor([True, True, False, False])).tolist() == [2, 2]


def test_greedy_argmax_refuses_wrong_shapes():
    with pytest.raises(ValueError, match=r"greedy_argmax: logits are \(4,\), expected \(B, V\)"):
        greedy_argmax(torch.zeros(4), torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"greedy_argmax: suppressed is \(5,\), expected \(4,\)"):
        greedy_argmax(torch.zeros(2, 4), torch.zeros(5, dtype=torch.bool))
