"""Delta rules and GLA: recurrent = chunked = step by step = golden tensors = the oracle."""

import pytest
import torch
from golden_related_files import assert_close_to_golden, related_cases, related_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import chunk_sizes, masks, packings, relative_error, seeds, sequences, sizes
from recurrence_cases import (
    BACKENDS_AND_CHUNKS,
    TOKENS,
    Recurrence,
    make_recurrence,
    recurrence_oracle,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmmamba_cli.errors import MmmambaError

quick = settings(max_examples=12, deadline=None)
kinds = pytest.mark.parametrize("kind", ["delta", "kda", "gla"])
backends = pytest.mark.parametrize("backend", ["recurrent", "chunked"])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, int], Tensor | None, Tensor | None]:
    drawn = draw(sizes())
    batch, length = drawn["batch"], drawn["length"]
    mask = draw(st.none() | masks(batch, length))
    return drawn, mask, draw(st.none() | packings(batch, length))


def poison(case: Recurrence, mask: Tensor | None) -> Recurrence:
    """The same inputs with NaN in the padding."""
    if mask is None:
        return case
    spoilt = case.tensors()
    for name in TOKENS:
        if name in spoilt:
            spoilt[name] = spoilt[name].clone()
            spoilt[name][~mask] = torch.nan
    return Recurrence(case.kind, **spoilt)


def loss(y: Tensor, state: Tensor) -> Tensor:
    return y.square().sum() + state.pow(3).sum()


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], limit: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < limit


@related_cases("mixers", "gated_delta_rule", "kda", "gla")
@BACKENDS_AND_CHUNKS
def test_golden_related_recurrences(file, backend, chunk_size):
    golden = related_tensors(file)
    leaves = golden.inputs
    tokens = (leaves["v"], leaves["k"], leaves["q"], leaves["g"], leaves.get("beta"))
    # The state of the golden tensors is (key dim, value dim).
    case = Recurrence("delta" if "beta" in leaves else "gla", *tokens, leaves["state"].mT)
    y, state = case.run(scale=golden.scale, chunk_size=chunk_size, backend=backend)
    assert_close_to_golden(golden, y=y, state=state.mT)


@kinds
@backends
@quick
@given(layout=layouts(), seed=seeds, chunk_size=chunk_sizes, optional=st.booleans())
def test_padded_and_packed_rows_equal_the_oracle(kind, backend, layout, seed, chunk_size, optional):
    drawn, mask, seq_idx = layout
    case = make_recurrence(kind, seed, **drawn, optional=optional)
    options = {"mask": mask, "seq_idx": seq_idx, "chunk_size": chunk_size, "backend": backend}
    y, state = poison(case, mask).run(**options)
    assert y.dtype == state.dtype == torch.float64
    assert_close((y, state), recurrence_oracle(case, mask, seq_idx), 1e-10)
    if mask is not None:
        assert (y[~mask] == 0).all()


@kinds
@backends
@settings(max_examples=8, deadline=None)
@given(layout=layouts(), seed=seeds, chunk_size=chunk_sizes)
def test_gradients_equal_those_of_the_sequences_alone(kind, backend, layout, seed, chunk_size):
    drawn, mask, seq_idx = layout
    case = make_recurrence(kind, seed, **drawn)
    together = poison(case, mask).with_gradients()
    options = {"backend": backend, "chunk_size": chunk_size}
    loss(*together.run(**options, mask=mask, seq_idx=seq_idx)).backward()

    alone = case.with_gradients()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(drawn["batch"]):
        spans = sequences(mask, seq_idx, row, drawn["length"])
        for number, columns in enumerate(spans):
            part = alone.span(row, columns)
            if number > 0:
                part.initial_state = None
            y, state = part.run(backend="recurrent")
            # Only the state of the last sequence is returned.
            total = total + loss(y, state if number == len(spans) - 1 else state[:0])
    total.backward()

    for name, gradient in together.gradients().items():
        expected = alone.gradients()[name]
        if expected is None:  # no row has a real token
            expected = torch.zeros_like(gradient)
        assert relative_error(gradient, expected) < 1e-9, name


@kinds
@pytest.mark.parametrize("chunk_size", [1, 8, 24, 64])
@pytest.mark.parametrize("length", [5, 131])
def test_chunks_equal_the_recurrence(kind, chunk_size, length):
    case = make_recurrence(kind, 0, length=length, value_dim=6, state_dim=8)
    found = case.run(chunk_size=chunk_size, backend="chunked")
    assert_close(found, case.run(backend="recurrent"), 1e-10)


@kinds
@backends
@pytest.mark.parametrize("decay", [-50.0, -1e4, -1e-9, -torch.inf])
def test_extreme_decays_give_right_gradients_in_fp32(kind, backend, decay):
    case = make_recurrence(kind, 1, length=70, dtype=torch.float32)
    # Weak decays between strong ones: what comes after a strong one must stay precise.
    case.log_decay = torch.where(case.log_decay < -0.1, decay, -1e-3)
    low, high = case.with_gradients(), case.to(torch.float64).with_gradients()
    found, expected = low.run(chunk_size=32, backend=backend), high.run(backend="recurrent")
    assert_close(found, expected, 1e-5)
    loss(*found).backward()
    loss(*expected).backward()
    for name, gradient in low.gradients().items():
        assert gradient.isfinite().all(), name
        assert relative_error(gradient, high.gradients()[name]) < 1e-4, name


@kinds
@pytest.mark.parametrize("decays", ["weak", "strong and weak"])
def test_long_texts_in_fp32(kind, decays):
    """As the fp64 recurrence over 512 tokens, and finite over 4,096."""
    case = make_recurrence(
        kind, 4, batch=1, length=4096, kv_heads=1, value_dim=8, state_dim=8, optional=False
    )
    uniform = torch.rand(case.log_decay.shape, generator=torch.Generator().manual_seed(4))
    strong = (uniform < 0.1) & (decays != "weak")
    case.log_decay = torch.where(strong, -40.0, -1e-4 * uniform).double()
    # As in training with bf16: values, keys and queries are rounded, decays are not.
    for name in ("v", "k", "q"):
        setattr(case, name, getattr(case, name).bfloat16().double())
    start = case.span(0, torch.arange(512))
    low, high = start.to(torch.float32).with_gradients(), start.with_gradients()
    found, expected = low.run(backend="chunked"), high.run(backend="recurrent")
    assert_close(found, expected, 1e-6)
    loss(*found).backward()
    loss(*expected).backward()
    for name, gradient in low.gradients().items():
        assert relative_error(gradient, high.gradients()[name]) < 5e-6, name
    case = case.to(torch.float32).with_gradients()
    loss(*case.run(backend="chunked")).backward()
    assert all(gradient.isfinite().all() for gradient in case.gradients().values())


@kinds
@backends
def test_the_final_state_keeps_no_other_state_alive(kind, backend):
    _, state = make_recurrence(kind, 1, length=40).run(chunk_size=8, backend=backend)
    assert state.untyped_storage().nbytes() == state.nbytes


@kinds
@backends
def test_grouped_heads_equal_repeated_ones(kind, backend):
    case = make_recurrence(kind, 2, length=21, kv_heads=2, groups=3)
    repeated = Recurrence(kind, **case.tensors())
    repeated.v, repeated.k = (t.repeat_interleave(3, dim=2) for t in (case.v, case.k))
    assert_close(case.run(backend=backend), repeated.run(backend=backend), 1e-12)


@kinds
@backends
def test_parts_and_steps_equal_one_pass(kind, backend):
    case = make_recurrence(kind, 3, length=21)
    options = {"backend": backend, "chunk_size": 8}
    outputs, state = [], case.initial_state
    for columns in (slice(0, 9), slice(9, 9), slice(9, 17)):
        part = case.changed(lambda t, columns=columns: t[:, columns])
        part.initial_state = state
        y, state = part.run(**options)
        outputs.append(y)
    for t in range(17, 21):
        before = state.clone()
        y, after = case.step(t, state)
        assert torch.equal(state, before)
        outputs.append(y.unsqueeze(1))
        state = after
    assert_close((torch.cat(outputs, 1), state), case.run(**options), 1e-10)


@kinds
def test_matrix_times_values_equals_the_read_out(kind):
    case = make_recurrence(kind, 4, length=23, optional=False)
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0, :4] = mask[1, 20:] = False
    packing = (torch.arange(23) > 11).long().expand(2, -1)
    for options in ({}, {"mask": mask}, {"mask": mask, "seq_idx": packing}):
        y, _ = case.run(**options)
        spoilt = poison(case, options.get("mask"))
        found = spoilt.matrix(**options)
        assert found.shape == (2, 4, 23, 23)
        product = torch.einsum("bhij,bjhp->bihp", found, case.v.repeat_interleave(2, 2))
        assert relative_error(product, y) < 1e-12
        assert (found.triu(1) == 0).all()


@kinds
def test_gradcheck(kind):
    case = make_recurrence(kind, 5, batch=1, length=5, groups=2, value_dim=2, state_dim=2)
    case.log_decay = case.log_decay.clamp(-2, -0.1)
    tensors = case.with_gradients().tensors()
    mask, packing = torch.tensor([[0, 1, 1, 0, 1]]), torch.tensor([[5, 5, 3, 3, 3]])

    def made(values: tuple[Tensor, ...]) -> Recurrence:
        return Recurrence(kind, **dict(zip(tensors, values, strict=True)))

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        return made(values).run(chunk_size=3, backend="chunked")

    def packed(*values: Tensor) -> tuple[Tensor, Tensor]:
        return made(values).run(mask=mask, seq_idx=packing, chunk_size=2, backend="chunked")

    def step(*values: Tensor) -> tuple[Tensor, Tensor]:
        return made(values).step(1, values[-1])

    def matrix(*values: Tensor) -> Tensor:
        return made(values).matrix()

    for function in (scan, packed, step, matrix):
        assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@kinds
@backends
def test_bf16_inputs_round_only_y(kind, backend):
    case = make_recurrence(kind, 6, length=100, value_dim=8, state_dim=8, dtype=torch.float32)
    for name in ("v", "k", "q"):
        setattr(case, name, getattr(case, name).bfloat16())
    expected = recurrence_oracle(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = case.run(chunk_size=16, backend=backend)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    # y is rounded once to 8 bits; earlier rounding would show in the state.
    assert relative_error(y, expected[0]) < 2**-8
    assert relative_error(state, expected[1]) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = case.step(0, case.initial_state)
    case = case.changed(lambda t: t[:, :1] if t is not case.initial_state else t)
    expected = recurrence_oracle(case)
    assert relative_error(y.unsqueeze(1), expected[0]) < 2**-8
    assert relative_error(state, expected[1]) < 1e-5


@kinds
@backends
def test_empty_rows_return_the_initial_state(kind, backend):
    case = make_recurrence(kind, 7, length=0)
    y, state = case.run(backend=backend)
    assert y.shape == (2, 0, 4, 4)
    assert torch.equal(state, case.initial_state)
    case.initial_state = None
    assert torch.equal(case.run()[1], torch.zeros(2, 4, 4, 5, dtype=torch.float64))
    assert case.matrix().shape == (2, 4, 0, 0)


@kinds
def test_step_reads_no_value_on_the_host(kind):
    # What a CUDA graph cannot capture: the fake tensors have no values.
    with FakeTensorMode() as mode:
        case = make_recurrence(kind, 8).changed(mode.from_tensor)
        y, state = case.step(0, case.initial_state)
    assert y.shape == (2, 4, 4) and state.shape == (2, 4, 4, 5)


@kinds
def test_unknown_backends_and_chunk_sizes_are_rejected(kind):
    case = make_recurrence(kind, 9)
    with pytest.raises(MmmambaError, match=rf"{case.op}: .*'warp'"):
        case.run(backend="warp")
    with pytest.raises(MmmambaError, match=rf"{case.op}_step: .*'warp'"):
        case.step(0, case.initial_state, backend="warp")
    with pytest.raises(ValueError, match=rf"{case.op}: chunk_size is 0"):
        case.run(chunk_size=0)


@kinds
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v", (2, 7, 2)),
        ("k", (2, 7, 1, 5)),
        ("k", (2, 7, 2, 1)),
        ("q", (2, 1, 4, 5)),
        ("q", (2, 7, 3, 5)),
        ("log_decay", (2, 7, 1)),
        ("log_decay", (2, 7, 4, 1)),
        ("beta", (2, 7, 1)),
        ("initial_state", (2, 4, 5, 4)),
        ("mask", (2, 1)),
        ("seq_idx", (7,)),
    ],
)
def test_bad_shapes_are_rejected(kind, name, shape):
    case = make_recurrence(kind, 10)
    if name == "beta" and case.beta is None:
        return
    wrong = torch.ones(shape, dtype=torch.float64)
    options = {name: wrong} if name in ("mask", "seq_idx") else {}
    if not options:
        setattr(case, name, wrong)
    with pytest.raises(ValueError, match=rf"{case.op}: .*{name}"):
        case.run(**options)
    if name in ("log_decay", "beta"):
        with pytest.raises(ValueError, match=rf"{case.op}_matrix: .*{name}"):
            case.matrix()
        with pytest.raises(ValueError, match=rf"{case.op}_step: .*{name}"):
            case.step(0, case.initial_state)
