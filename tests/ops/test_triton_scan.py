"""The Triton scan against the recurrence in fp64: values, states and every gradient."""

import pytest
import torch
from ops_cases import Scan, make_scan, relative_error
from torch import Tensor
from triton_device import (
    DEVICE,
    INTERPRETED,
    TOLERANCE,
    check,
    dtypes,
    faithful_interpreter,  # noqa: F401
    poisoned_buffers,  # noqa: F401
)

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops import ssd
from mmmamba_cli.ops.ssd.launch_config import TUNING, plan_scan

FP32, BF16 = torch.float32, torch.bfloat16


def rounded(scan: Scan, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tokens in `dtype`, parameters and states in fp32, as in a model."""
    small = scan.to(FP32).tensors()
    for name in ("x", "dt", "B", "C"):
        small[name] = small[name].to(dtype)
    return small


def check_scan(tensors: dict[str, Tensor], **options: object) -> None:
    tolerance = TOLERANCE[tensors["x"].dtype]
    check(ssd, tensors, tolerance, reference="recurrent", dt_softplus=True, **options)


def configure(monkeypatch: pytest.MonkeyPatch, tile: int | None = None, **changes: int) -> None:
    """Override chunks, spans and tiles of `TUNING`."""
    for dtype, tuning in TUNING.items():
        if tile:
            launch = tuning.forward._replace(tile=tile)
            names = ("states", "few_states", "forward", "backward")
            tuning = tuning._replace(**dict.fromkeys(names, launch))
        monkeypatch.setitem(TUNING, dtype, tuning._replace(**changes))


def packing(batch: int, length: int) -> Tensor:
    columns = torch.arange(length)
    return torch.stack([(columns > 5 + b).long() + (columns > length // 2) for b in range(batch)])


def padding(batch: int, length: int) -> Tensor:
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < 0.8
    mask[0, :3] = False
    return mask


@dtypes
@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
def test_scan_equals_the_recurrence(length, dtype):
    scan = make_scan(length, batch=1, length=length, value_dim=16, state_dim=16)
    check_scan(rounded(scan, dtype))


@dtypes
@pytest.mark.parametrize("most_chunks", [1, 3])
@pytest.mark.parametrize("layout", ["plain", "both"])
def test_spans_of_several_chunks_with_every_layout(monkeypatch, most_chunks, layout, dtype):
    # Chunks of 16 tokens give spans of several chunks for short inputs.
    configure(monkeypatch, chunk=16, tile=16, programs=1, most_chunks=most_chunks)
    scan = make_scan(1, batch=2, length=83, kv_heads=1, value_dim=16, state_dim=32)
    both = {"seq_idx": packing(2, 83), "mask": padding(2, 83)}
    check_scan(rounded(scan, dtype), **(both if layout == "both" else {}))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_packed_rows_and_padded_rows(monkeypatch, layout):
    configure(monkeypatch, chunk=16, programs=1, most_chunks=2)
    scan = rounded(make_scan(10, length=50), FP32)
    if layout == "packed":
        check_scan(scan, seq_idx=packing(2, 50))
    else:
        check_scan(scan, mask=padding(2, 50))


def test_rows_of_padding_keep_the_state(monkeypatch):
    configure(monkeypatch, chunk=16)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1] = False
    check_scan(rounded(make_scan(2, length=20), FP32), mask=mask, seq_idx=packing(2, 20))


def test_padding_content_is_ignored(monkeypatch):
    configure(monkeypatch, chunk=16)
    mask = padding(2, 40)
    options = {"dt_softplus": True, "backend": "triton", "mask": mask.to(DEVICE)}
    results = []
    for spoilt in (False, True):
        tensors = {n: t.to(DEVICE) for n, t in rounded(make_scan(3, length=40), FP32).items()}
        for name in ("x", "dt", "B", "C") if spoilt else ():
            tensors[name][~mask] = torch.nan
        for tensor in tensors.values():
            tensor.requires_grad_()
        y, state = ssd(**tensors, **options)
        (y.square().sum() + state.square().sum()).backward()
        results.append([y, state, *(tensor.grad for tensor in tensors.values())])
    for plain, spoilt in zip(*results, strict=True):
        assert torch.equal(plain, spoilt)


@pytest.mark.parametrize(
    ("kv_heads", "groups", "value_dim", "state_dim"),
    [(1, 1, 40, 24), (1, 3, 4, 130), (3, 2, 130, 4)],
)
def test_grouped_heads_and_partial_tiles(monkeypatch, kv_heads, groups, value_dim, state_dim):
    configure(monkeypatch, chunk=16)
    sizes = {"kv_heads": kv_heads, "groups": groups}
    dims = {"value_dim": value_dim, "state_dim": state_dim}
    scan = make_scan(4, batch=1, length=17, **sizes, **dims, optional=False)
    check_scan(rounded(scan, FP32))


@dtypes
def test_noncontiguous_inputs_and_gradients(monkeypatch, dtype):
    configure(monkeypatch, chunk=16)
    check_scan(rounded(make_scan(5, length=35, value_dim=8), dtype), scattered=True)


def test_values_and_keys_of_one_packed_tensor(monkeypatch):
    configure(monkeypatch, chunk=16)
    scan = make_scan(5, length=35, value_dim=8, state_dim=8)
    tensors = {n: t.to(DEVICE) for n, t in rounded(scan, FP32).items()}
    expected = ssd(**tensors, dt_softplus=True, backend="triton")
    side = torch.cat([tensors[name].flatten(2) for name in ("x", "B")], -1).unflatten(2, (4, 8))
    tensors["x"], tensors["B"] = side[:, :, :2], side[:, :, 2:]
    for a, b in zip(ssd(**tensors, dt_softplus=True, backend="triton"), expected, strict=True):
        assert torch.equal(a, b)


def test_small_steps_stay_precise_after_strong_decays():
    scan = make_scan(6, batch=1, length=128, kv_heads=1, groups=2)
    scan.dt[:, :64], scan.dt[:, 64:] = 30.0, -9.0
    check_scan(rounded(scan, FP32))


def test_weak_decays_over_long_spans_in_bf16(monkeypatch):
    # States hardly decay over a span, so the gradient is a difference of nearly equal sums.
    configure(monkeypatch, chunk=16, tile=16, programs=1, most_chunks=8)
    scan = make_scan(7, batch=1, length=250, kv_heads=1, value_dim=16, state_dim=16)
    scan.dt = scan.dt.clamp(-6, -3)
    scan.A = -torch.tensor([0.05, 1.0])
    check_scan(rounded(scan, BF16))


@pytest.mark.parametrize(
    ("batch", "length", "chunks"), [(1, 4096, 8), (4, 4096, 16), (1, 32768, 16), (1, 100, 1)]
)
def test_chunks_per_span_fill_the_gpu(batch, length, chunks):
    x, B = (torch.empty(batch, length, 8, 128, dtype=BF16, device="meta") for _ in range(2))
    C = torch.empty(batch, length, 16, 128, dtype=BF16, device="meta")
    plan = plan_scan(x, B, C, trains=True)
    assert plan.per_span == chunks
    assert plan.spans * plan.per_span >= plan.chunks > (plan.spans - 1) * plan.per_span
    assert plan_scan(x.float(), B.float(), C.float(), trains=True).per_span == 1


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_of_only_the_output_or_only_the_state(monkeypatch, used):
    configure(monkeypatch, chunk=16)
    scan = make_scan(8, length=20)
    scan.dt = scan.dt.clamp(max=-3)

    def one(**arguments: object) -> Tensor:
        y, state = ssd(**arguments)
        # Only one of the two has a gradient.
        return (y, state)[used]

    tensors = rounded(scan, FP32)
    if used == 1:
        # The final state does not depend on C and D: their gradients are None in the reference
        # and 0 in the kernels.
        fixed = {name: tensors.pop(name) for name in ("C", "D")}
        plain = one

        def one(**arguments: object) -> Tensor:
            dtype, device = arguments["x"].dtype, arguments["x"].device
            return plain(**arguments, **{n: t.to(device, dtype) for n, t in fixed.items()})

    check(one, tensors, TOLERANCE[FP32], reference="recurrent", dt_softplus=True)


def test_same_precision_with_and_without_gradients(monkeypatch):
    configure(monkeypatch, chunk=16, programs=1, most_chunks=3)
    tensors = {n: t.to(DEVICE) for n, t in rounded(make_scan(9, length=60), FP32).items()}
    tensors["A"].requires_grad_()
    with torch.no_grad():
        y, _ = ssd(**tensors, dt_softplus=True, backend="triton")
    y_trained, _ = ssd(**tensors, dt_softplus=True, backend="triton")
    assert y_trained.requires_grad and not y.requires_grad
    assert relative_error(y, y_trained) < 1e-6


def test_fp64_is_rejected():
    with pytest.raises(MmmambaError, match=r"ssd: the triton backend takes .*float64"):
        ssd(**make_scan(8).tensors(), backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take hours for so many programs")
def test_more_rows_times_heads_than_the_second_grid_axis():
    scan = make_scan(3, batch=4100, length=5, kv_heads=4, groups=4, value_dim=16, state_dim=16)
    check_scan(rounded(scan, BF16))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take hours for so many programs")
def test_more_spans_than_the_second_grid_axis(monkeypatch):
    """Spans of one chunk; early tokens have decayed, so the end depends on the last tokens only."""
    configure(monkeypatch, most_chunks=1)
    length = 64 * 65_600
    scan = make_scan(4, batch=1, length=256, kv_heads=1, groups=1, value_dim=16, state_dim=16)
    small = {n: t.to(DEVICE) for n, t in rounded(scan, BF16).items()}
    small.pop("initial_state", None)
    whole = dict(small)
    for name in ("x", "dt", "B", "C"):
        # With these step sizes, contributions older than 256 tokens have decayed to 0.
        small[name] = small[name].abs() + 4 if name == "dt" else small[name]
        whole[name] = small[name].repeat(1, length // 256, *[1] * (small[name].dim() - 2))
    y, state = ssd(**whole, dt_softplus=True, backend="triton")
    twice = {n: t[:, :512] if n in ("x", "dt", "B", "C") else t for n, t in whole.items()}
    wanted, last = ssd(**twice, dt_softplus=True, backend="recurrent")
    assert relative_error(y[:, -256:].cpu(), wanted[:, -256:].cpu()) < TOLERANCE[BF16]
    assert relative_error(state.cpu(), last.cpu()) < TOLERANCE[BF16]
