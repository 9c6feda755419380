"""The convolution against a loop over one row: padding, packing, states, single steps, dtypes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import masks, packings, relative_error, seeds, sequences
from torch import Tensor

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops import causal_conv, causal_conv_step

quick = settings(max_examples=60, deadline=None)
activations = st.sampled_from(["silu", None])


def make_conv(
    seed: int,
    batch: int,
    length: int,
    channels: int,
    width: int,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (batch, channels, width - 1),
    }
    return {
        name: torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Tensor], str | None]:
    """Inputs with or without bias and initial state, and an activation."""
    drawn = [draw(st.integers(1, most)) for most in (3, 20, 4, 5)]
    tensors = make_conv(draw(seeds), *drawn)
    for name in ("bias", "initial_state"):
        if draw(st.booleans()):
            del tensors[name]
    return tensors, draw(activations)


def conv_oracle(
    tensors: dict[str, Tensor],
    activation: str | None,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, T, Ch) and the last W - 1 inputs (B, Ch, W - 1), with each sequence run separately."""
    arrays = {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}
    x, weight = arrays["x"], arrays["weight"]
    batch, length, channels = x.shape
    past = weight.shape[1] - 1
    y = np.zeros_like(x)
    state = np.zeros((batch, channels, past))
    for row in range(batch):
        for number, columns in enumerate(sequences(mask, seq_idx, row, length)):
            window = np.zeros((past, channels))
            if number == 0 and "initial_state" in arrays:
                window = arrays["initial_state"][row].T
            for t in columns.tolist():
                window = np.concatenate((window, x[row, t][None]))
                total = (window * weight.T).sum(0) + arrays.get("bias", 0.0)
                y[row, t] = total / (1 + np.exp(-total)) if activation == "silu" else total
                window = window[1:]
            state[row] = window.T
    return torch.from_numpy(y), torch.from_numpy(state)


@quick
@given(case=cases(), data=st.data())
def test_conv_equals_its_sequences_alone(case, data):
    tensors, activation = case
    shape = tensors["x"].shape[:2]
    mask = data.draw(st.none() | masks(*shape))
    seq_idx = data.draw(st.none() | packings(*shape))
    expected_y, expected_state = conv_oracle(tensors, activation, mask, seq_idx)
    if mask is not None:
        tensors = tensors | {"x": tensors["x"].masked_fill(~mask.unsqueeze(-1), torch.nan)}
    y, state = causal_conv(**tensors, activation=activation, mask=mask, seq_idx=seq_idx)
    assert relative_error(y, expected_y) < 1e-12
    assert torch.equal(state, expected_state)
    if mask is not None:
        assert (y[~mask] == 0).all()


@quick
@given(case=cases(), data=st.data())
def test_conv_gradients_equal_those_of_the_sequences_alone(case, data):
    tensors, activation = case
    batch, length, _ = tensors["x"].shape
    mask = data.draw(st.none() | masks(batch, length))
    seq_idx = data.draw(st.none() | packings(batch, length))
    together = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    alone = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    x = together["x"]
    if mask is not None:
        x = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    options = {"activation": activation, "mask": mask, "seq_idx": seq_idx}
    y, state = causal_conv(**together | {"x": x}, **options)
    (y.square().sum() + state.pow(3).sum()).backward()

    total = alone["x"].sum() * 0
    for row in range(batch):
        spans = sequences(mask, seq_idx, row, length)
        for number, columns in enumerate(spans):
            part = alone | {"x": alone["x"][row : row + 1, columns]}
            initial = part.pop("initial_state", None)
            if number == 0 and initial is not None:
                part["initial_state"] = initial[row : row + 1]
            y, state = causal_conv(**part, activation=activation)
            total = total + y.square().sum()
            if number == len(spans) - 1:
                total = total + state.pow(3).sum()
    total.backward()
    for name, tensor in together.items():
        expected = alone[name].grad
        if expected is None:  # no row has a real token
            expected = torch.zeros_like(tensor)
        assert relative_error(tensor.grad, expected) < 1e-10, name


@quick
@given(case=cases(), data=st.data())
def test_conv_continues_from_its_final_state(case, data):
    tensors, activation = case
    x = tensors["x"]
    cut = data.draw(st.integers(0, x.shape[1]))
    whole_y, whole_state = causal_conv(**tensors, activation=activation)
    head_y, state = causal_conv(**tensors | {"x": x[:, :cut]}, activation=activation)
    tail = tensors | {"x": x[:, cut:], "initial_state": state}
    tail_y, state = causal_conv(**tail, activation=activation)
    assert relative_error(torch.cat((head_y, tail_y), 1), whole_y) < 1e-12
    assert torch.equal(state, whole_state)


@quick
@given(case=cases())
def test_conv_step_by_step_equals_the_whole(case):
    tensors, activation = case
    x, weight, bias = tensors["x"], tensors["weight"], tensors.get("bias")
    whole_y, whole_state = causal_conv(**tensors, activation=activation)
    state = tensors.get("initial_state", torch.zeros_like(whole_state))
    outputs = []
    for t in range(x.shape[1]):
        y, state = causal_conv_step(x[:, t], weight, bias, state, activation)
        outputs.append(y)
    assert relative_error(torch.stack(outputs, 1), whole_y) < 1e-12
    assert torch.equal(state, whole_state)


def test_conv_equals_the_library_convolution():
    tensors = make_conv(0, 2, 9, 3, 4)
    y, _ = causal_conv(tensors["x"], tensors["weight"], tensors["bias"], activation=None)
    padded = torch.nn.functional.pad(tensors["x"].mT, (3, 0))
    expected = torch.nn.functional.conv1d(
        padded, tensors["weight"].unsqueeze(1), tensors["bias"], groups=3
    )
    assert relative_error(y, expected.mT) < 1e-12


def test_half_inputs_accumulate_in_fp32_and_round_once():
    tensors = make_conv(1, 2, 50, 8, 4, torch.bfloat16)
    y, state = causal_conv(**tensors, activation="silu")
    expected, _ = conv_oracle(tensors, "silu")
    assert y.dtype == state.dtype == torch.bfloat16
    # Equal after rounding, except for a few values within an fp32 error of a tie.
    assert (y != expected.bfloat16()).float().mean() < 0.01
    assert torch.equal(state, tensors["x"][:, -3:].mT)
    stepped, _ = causal_conv_step(
        tensors["x"][:, 0], tensors["weight"], tensors["bias"], tensors["initial_state"]
    )
    assert stepped.dtype == torch.bfloat16
    assert (stepped != expected[:, 0].bfloat16()).float().mean() < 0.1


def test_conv_fp32_is_exact_to_fp32():
    tensors = make_conv(2, 2, 50, 8, 4, torch.float32)
    y, _ = causal_conv(**tensors)
    assert y.dtype == torch.float32
    assert relative_error(y, conv_oracle(tensors, "silu")[0]) < 1e-6


def test_noncontiguous_conv_inputs():
    tensors = make_conv(3, 2, 9, 3, 4)
    expected_y, expected_state = causal_conv(**tensors)
    scattered = {n: t.mT.contiguous().mT if t.dim() > 1 else t for n, t in tensors.items()}
    assert not scattered["x"].is_contiguous()
    mask = torch.ones(9, 2, dtype=torch.bool).mT
    for options in ({}, {"mask": mask}):
        y, state = causal_conv(**scattered, **options)
        assert relative_error(y, expected_y) < 1e-12
        assert torch.equal(state, expected_state)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_state_does_not_keep_the_inputs_alive(batch):
    tensors = make_conv(4, batch, 9, 3, 2)
    _, state = causal_conv(**tensors)
    assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


@pytest.mark.parametrize("activation", ["silu", None])
def test_empty_conv_returns_the_initial_state(activation):
    tensors = make_conv(5, 2, 0, 3, 4)
    y, state = causal_conv(**tensors, activation=activation)
    assert y.shape == (2, 0, 3)
    assert torch.equal(state, tensors["initial_state"])
    _, state = causal_conv(tensors["x"], tensors["weight"])
    assert torch.equal(state, torch.zeros(2, 3, 3, dtype=torch.float64))


def test_silu_is_the_default():
    tensors = make_conv(6, 1, 5, 3, 2)
    assert torch.equal(causal_conv(**tensors)[0], causal_conv(**tensors, activation="silu")[0])
    assert not torch.equal(causal_conv(**tensors)[0], causal_conv(**tensors, activation=None)[0])


def test_unknown_conv_backend_and_activation_are_rejected():
    tensors = make_conv(7, 1, 5, 3, 2)
    step = (tensors["x"][:, 0], tensors["weight"], None, tensors["initial_state"])
    with pytest.raises(MmmambaError, match=r"causal_conv: .*'warp'.*auto, reference"):
        causal_conv(**tensors, backend="warp")
    with pytest.raises(MmmambaError, match=r"causal_conv_step: .*'warp'.*auto, reference"):
        causal_conv_step(*step, backend="warp")
    with pytest.raises(ValueError, match=r"causal_conv: activation is 'gelu'"):
        causal_conv(**tensors, activation="gelu")
    with pytest.raises(ValueError, match=r"causal_conv_step: activation is 'gelu'"):
        causal_conv_step(*step, "gelu")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (2, 3)),
        ("weight", (3, 1, 4)),
        ("weight", (1, 4)),
        ("weight", (3, 0)),
        ("bias", (1,)),
        ("initial_state", (2, 3, 4)),
        ("initial_state", (1, 3, 3)),
        ("mask", (2, 1)),
        ("seq_idx", (1, 9)),
    ],
)
def test_broadcastable_conv_shapes_are_rejected(name, shape):
    tensors = make_conv(8, 2, 9, 3, 4)
    with pytest.raises(ValueError, match=rf"causal_conv: .*{name}"):
        causal_conv(**tensors | {name: torch.ones(shape)})
    step = {"x": tensors["x"][:, 0], "weight": tensors["weight"], "bias": tensors["bias"]}
    step["state"] = tensors["initial_state"]
    renamed = {"initial_state": "state"}.get(name, name)
    if renamed in step and (renamed, shape) != ("x", (2, 3)):
        with pytest.raises(ValueError, match=rf"causal_conv_step: .*{renamed}"):
            causal_conv_step(**step | {renamed: torch.ones(shape)})
