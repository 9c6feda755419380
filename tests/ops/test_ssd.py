"""The scan against independent oracles: recurrent = chunked = step by step, at every size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import (
    REFERENCES,
    Scan,
    chunk_sizes,
    make_scan,
    quadratic_oracle,
    relative_error,
    scan_oracle,
    seeds,
    sizes,
)
from torch import Tensor

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops import ssd, ssd_step
from mmmamba_cli.ops.ssd import SCAN_BACKENDS

quick = settings(max_examples=40, deadline=None)
backends = pytest.mark.parametrize("backend", REFERENCES)


def run(scan: Scan, dt_softplus: bool = True, **options: object) -> tuple[Tensor, Tensor]:
    return ssd(**scan.tensors(), dt_softplus=dt_softplus, **options)


@backends
@quick
@given(sizes=sizes(), seed=seeds, chunk_size=chunk_sizes, optional=st.booleans())
def test_every_backend_equals_the_oracle_in_fp64(backend, sizes, seed, chunk_size, optional):
    scan = make_scan(seed, **sizes, optional=optional)
    y, state = run(scan, chunk_size=chunk_size, backend=backend)
    expected_y, expected_state = scan_oracle(scan)
    assert y.dtype == state.dtype == torch.float64
    assert relative_error(y, expected_y) < 1e-10
    assert relative_error(state, expected_state) < 1e-10


@backends
@quick
@given(sizes=sizes(kv_heads=2, value_dim=4, state_dim=4), seed=seeds, chunk_size=chunk_sizes)
def test_every_backend_equals_the_oracle_in_fp32(backend, sizes, seed, chunk_size):
    scan = make_scan(seed, **sizes, dtype=torch.float32)
    y, state = run(scan, chunk_size=chunk_size, backend=backend)
    expected_y, expected_state = scan_oracle(scan)
    assert y.dtype == state.dtype == torch.float32
    assert relative_error(y, expected_y) < 1e-5
    assert relative_error(state, expected_state) < 1e-5


@quick
@given(sizes=sizes(), seed=seeds)
def test_step_by_step_equals_the_scan(sizes, seed):
    scan = make_scan(seed, **sizes)
    y, final = run(scan)
    state, outputs = scan.initial_state, []
    for t in range(sizes["length"]):
        y_t, state = ssd_step(
            scan.x[:, t],
            scan.dt[:, t],
            scan.A,
            scan.B[:, t],
            scan.C[:, t],
            state,
            dt_bias=scan.dt_bias,
            dt_softplus=True,
            D=scan.D,
        )
        outputs.append(y_t)
    assert relative_error(torch.stack(outputs, 1), y) < 1e-10
    assert relative_error(state, final) < 1e-10


@backends
def test_scan_equals_masked_attention(backend):
    scan = make_scan(0, length=19, optional=False)
    scan.dt = scan.dt.exp() / 100
    y, _ = run(scan, dt_softplus=False, chunk_size=4, backend=backend)
    assert relative_error(y, quadratic_oracle(scan)) < 1e-12


@backends
@quick
@given(sizes=sizes(length=2), seed=seeds, chunk_size=chunk_sizes, data=st.data())
def test_scan_continues_from_its_final_state(backend, sizes, seed, chunk_size, data):
    scan = make_scan(seed, **sizes)
    cut = data.draw(st.integers(0, sizes["length"]))
    whole_y, whole_state = run(scan, backend=backend)
    head, tail = scan.tensors(), scan.tensors()
    for name in ("x", "dt", "B", "C"):
        head[name], tail[name] = head[name][:, :cut], tail[name][:, cut:]
    options = {"dt_softplus": True, "chunk_size": chunk_size, "backend": backend}
    head_y, tail["initial_state"] = ssd(**head, **options)
    tail_y, state = ssd(**tail, **options)
    assert relative_error(torch.cat((head_y, tail_y), 1), whole_y) < 1e-10
    assert relative_error(state, whole_state) < 1e-10


@backends
def test_grouped_heads_equal_repeated_ones(backend):
    scan = make_scan(3, length=21, kv_heads=2, groups=3)
    repeated = Scan(**scan.tensors())
    repeated.x, repeated.B = (t.repeat_interleave(3, dim=2) for t in (scan.x, scan.B))
    for grouped, plain in zip(
        run(scan, backend=backend), run(repeated, backend=backend), strict=True
    ):
        assert relative_error(grouped, plain) < 1e-12


@backends
def test_noncontiguous_inputs(backend):
    scan = make_scan(4, length=21)
    expected = run(scan, chunk_size=8, backend=backend)
    for name, tensor in scan.tensors().items():
        backwards = tensor.permute(*reversed(range(tensor.dim()))).contiguous()
        scattered = backwards.permute(*reversed(range(tensor.dim())))
        wide = torch.stack((scattered, torch.full_like(scattered, torch.nan)), dim=-1)
        setattr(scan, name, wide[..., 0])
    assert not scan.x.is_contiguous()
    for scattered, dense in zip(run(scan, chunk_size=8, backend=backend), expected, strict=True):
        assert relative_error(scattered, dense) < 1e-12


@backends
def test_bf16_inputs_round_only_y(backend):
    scan = make_scan(5, length=100, value_dim=8, state_dim=8, dtype=torch.float32)
    for name in ("x", "dt", "B", "C"):
        setattr(scan, name, getattr(scan, name).bfloat16())
    y, state = run(scan, chunk_size=16, backend=backend)
    expected_y, expected_state = scan_oracle(scan)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    # y is rounded once to 8 bits; earlier rounding would show in the state.
    assert relative_error(y, expected_y) < 2**-8
    assert relative_error(state, expected_state) < 1e-5


@backends
def test_autocast_does_not_lower_the_precision(backend):
    scan = make_scan(6, length=40, dtype=torch.float32)
    expected = run(scan, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = run(scan, backend=backend)
    assert torch.equal(y, expected[0]) and torch.equal(state, expected[1])


def test_autocast_does_not_lower_the_precision_of_a_step():
    scan = make_scan(6, length=1, dtype=torch.float32)
    step = (scan.x[:, 0], scan.dt[:, 0], scan.A, scan.B[:, 0], scan.C[:, 0], scan.initial_state)
    expected = ssd_step(*step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = ssd_step(*step)
    assert torch.equal(y, expected[0]) and torch.equal(state, expected[1])


@backends
def test_weak_decays_stay_precise_after_strong_ones(backend):
    # Every token contributes equally (dt x = 1), so that none hides the errors of others.
    strong, weak = torch.full((64,), 50.0), torch.full((64,), 1e-3)
    dt = torch.cat((strong, weak)).view(1, 128, 1)
    x = (1 / dt).unsqueeze(-1)
    ones = torch.ones(1, 128, 1, 1)
    scan = Scan(x, dt, -torch.ones(1), ones, ones)
    y, _ = run(scan, dt_softplus=False, backend=backend)
    expected, _ = scan_oracle(scan, dt_softplus=False)
    assert ((y - expected).abs() / expected).max() < 1e-5


@backends
@pytest.mark.parametrize("rate", [-50.0, -1e4, -1e-9])
def test_extreme_decays_give_finite_gradients(backend, rate):
    scan = make_scan(7, length=70, optional=False, dtype=torch.float32)
    scan.dt = torch.where(scan.dt > 0, 1.0, 1e-7)
    scan.A = torch.full_like(scan.A, rate)
    low, high = scan.with_gradients(), scan.to(torch.float64).with_gradients()
    for problem, name in ((low, backend), (high, "recurrent")):
        y, state = run(problem, dt_softplus=False, chunk_size=32, backend=name)
        (y.square().sum() + state.square().sum()).backward()
    for name, gradient in low.gradients().items():
        assert gradient.isfinite().all(), name
        assert relative_error(gradient, high.gradients()[name]) < 1e-4, name


@backends
def test_empty_scan_returns_the_initial_state(backend):
    scan = make_scan(8, length=0)
    y, state = run(scan, backend=backend)
    assert y.shape == (2, 0, 4, 4)
    assert torch.equal(state, scan.initial_state)
    scan.initial_state = None
    _, state = run(scan, backend=backend)
    assert torch.equal(state, torch.zeros(2, 4, 4, 5, dtype=torch.float64))


def test_initial_states_are_not_modified():
    scan = make_scan(9, length=1)
    before = scan.initial_state.clone()
    run(scan, backend="chunked")
    run(scan, backend="recurrent")
    assert torch.equal(scan.initial_state, before)


@pytest.mark.parametrize(("length", "chosen"), [(1, "recurrent"), (2, "chunked"), (300, "chunked")])
def test_auto_is_recurrent_for_one_token_and_chunked_for_more(monkeypatch, length, chosen):
    calls = []
    for name, scan_backend in list(SCAN_BACKENDS.items()):

        def spy(*args, name=name, scan_backend=scan_backend, **options):
            calls.append(name)
            return scan_backend(*args, **options)

        monkeypatch.setitem(SCAN_BACKENDS, name, spy)
    run(make_scan(10, length=length))
    assert calls == [chosen]


def test_unknown_backend_error_lists_the_available_ones():
    scan = make_scan(11)
    with pytest.raises(MmmambaError, match=r"'warp'.*auto, chunked, recurrent"):
        run(scan, backend="warp")
    step = (scan.x[:, 0], scan.dt[:, 0], scan.A, scan.B[:, 0], scan.C[:, 0], scan.initial_state)
    with pytest.raises(MmmambaError, match=r"ssd_step.*'warp'.*auto, reference"):
        ssd_step(*step, backend="warp")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("dt", (2, 7, 1)),
        ("A", (1,)),
        ("B", (2, 7, 1, 5)),
        ("B", (2, 7, 2, 1)),
        ("C", (2, 1, 4, 5)),
        ("C", (2, 7, 3, 5)),
        ("x", (2, 7, 2)),
        ("dt_bias", (1,)),
        ("D", (1,)),
        ("initial_state", (1, 4, 4, 5)),
        ("mask", (2, 1)),
        ("seq_idx", (7,)),
    ],
)
def test_broadcastable_shapes_are_rejected(name, shape):
    arguments = make_scan(12).tensors()
    arguments[name] = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"ssd: .*{name}"):
        ssd(**arguments)


def test_chunk_size_below_one_is_rejected():
    with pytest.raises(ValueError, match="chunk_size is 0"):
        run(make_scan(13), chunk_size=0)
