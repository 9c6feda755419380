"""The fused linear layer on Triton kernels, for few tokens and many, against fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_cases import relative_error
from torch import Tensor
from triton_device import (
    DEVICE,
    INTERPRETED,
    TOLERANCE,
    dtypes,
    faithful_interpreter,  # noqa: F401
    poisoned_buffers,  # noqa: F401
)

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops import project
from mmmamba_cli.ops.projection import Int8Weight, fused, quantize_rows
from mmmamba_cli.ops.projection.fused import Tile

FP32, BF16 = torch.float32, torch.bfloat16


def normal(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=rng)


def tiled(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    monkeypatch.setattr(fused, "DEFAULT_TILE", fused.DEFAULT_TILE._replace(**changes))


def watch(monkeypatch: pytest.MonkeyPatch, note: Callable[[Any, dict[str, Any]], None]) -> None:
    """Call `note` with the grid and the options of each launch of the `project` kernel."""
    launch = fused.kernels.project

    class Watched:
        def __getitem__(self, grid):
            def run(*arguments, **options):
                note(grid, options)
                return launch[grid](*arguments, **options)

            return run

    monkeypatch.setattr(fused.kernels, "project", Watched())


def apart(rows: Tensor) -> Tensor:
    """The same values as a slice of wider rows, with NaN on both sides."""
    batch, width = rows.shape
    wide = torch.full((batch, width + 24), torch.nan, dtype=rows.dtype, device=rows.device)
    wide[:, 16 : 16 + width] = rows
    return wide[:, 16 : 16 + width]


def before_others(weight: Tensor) -> Tensor:
    """The same weight with NaN in memory after its last row."""
    tail = torch.full((64,), torch.nan, dtype=weight.dtype)
    return torch.cat((weight.flatten(), tail)).to(DEVICE)[: weight.numel()].view(weight.shape)


def exact(value: object) -> object:
    if isinstance(value, Int8Weight):
        return Int8Weight(value.values.cpu(), value.scales.cpu())
    return value.cpu().double() if isinstance(value, Tensor) else value


def check(
    x: Tensor,
    weight: Tensor | Int8Weight,
    tolerance: float | None = None,
    *,
    backend: str = "triton",
    **options: object,
) -> None:
    wanted = project(exact(x), exact(weight), **{n: exact(v) for n, v in options.items()})
    here = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in options.items()}
    there = (
        Int8Weight(*(part.to(DEVICE) for part in weight))
        if isinstance(weight, Int8Weight)
        else before_others(weight)
    )
    for name in ("gate", "residual"):
        if name in here:
            here[name] = apart(here[name])
    found = project(apart(x.to(DEVICE)), there, **here, backend=backend)
    assert found.dtype == x.dtype
    assert found.shape == wanted.shape
    assert relative_error(found.cpu(), wanted) < (tolerance or TOLERANCE[x.dtype])


@dtypes
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (7, 70), (16, 64), (33, 257)])
def test_linear_of_any_size(monkeypatch, batch, rows, dim, dtype):
    tiled(monkeypatch, inputs=128)
    x, weight = normal(batch, dim).to(dtype), normal(rows, dim).to(dtype)
    check(x, weight)
    check(x, weight, bias=normal(rows).to(dtype), residual=normal(batch, rows).to(dtype))


@dtypes
@pytest.mark.parametrize("dim", [50, 64, 200])
def test_norms_over_several_tiles(monkeypatch, dim, dtype):
    tiled(monkeypatch, inputs=64)
    monkeypatch.setattr(fused, "MIN_TILE_INPUTS", 32)
    norm = normal(dim, seed=1)
    check(normal(3, dim).to(dtype), normal(9, dim).to(dtype), norm=norm, eps=0.1)


@dtypes
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 1), (3, 16), (5, 32)])
def test_gated_norm_per_head(monkeypatch, heads, head_dim, dtype):
    tiled(monkeypatch, inputs=128)
    monkeypatch.setattr(fused, "MIN_TILE_INPUTS", 16)
    dim = heads * head_dim
    gate, norm = normal(2, dim, seed=1).to(dtype), normal(head_dim, seed=2)
    residual = normal(2, 9).to(dtype)
    x, weight = normal(2, dim).to(dtype), normal(9, dim).to(dtype)
    check(x, weight, norm=norm, eps=1e-5, gate=gate, residual=residual)
    check(x, weight, norm=norm, eps=0.0, gate=gate)


@dtypes
@pytest.mark.parametrize("steps", [1, 2])
def test_gates_with_inputs_ready(monkeypatch, steps, dtype):
    monkeypatch.setattr(fused, "MIN_TILE_INPUTS", 128 // steps)
    inputs_ready = []
    watch(monkeypatch, lambda grid, options: inputs_ready.append(options["INPUTS_READY"]))
    gate, norm = normal(2, 80, seed=1).to(dtype), normal(16, seed=2)
    x, weight = normal(2, 80).to(dtype), normal(9, 80).to(dtype)
    check(x, weight, norm=norm, eps=1e-5, gate=gate, inputs_ready=True)
    check(x, weight, norm_dim=16, eps=1e-5, gate=gate, inputs_ready=True)
    check(x, weight, norm=norm[:1], eps=0.1, gate=gate, inputs_ready=True)
    assert inputs_ready == [steps == 1] * 3


@pytest.mark.skipif(
    not INTERPRETED, reason="only the interpreter can run code where a kernel waits"
)
@pytest.mark.parametrize(("inputs", "inputs_ready"), [(128, False), (128, True), (32, True)])
@pytest.mark.parametrize("weighted", [False, True])
def test_when_the_gate_is_read(monkeypatch, inputs, inputs_ready, weighted):
    tiled(monkeypatch, rows=8, inputs=4 * inputs)
    x, weight, gate, norm = normal(1, 64), normal(8, 64), normal(1, 64, seed=1), normal(16)
    options = {"norm": norm} if weighted else {"norm_dim": 16}
    wanted = project(x, weight, gate=gate, **options, eps=0.1)
    correct = [x.clone(), gate.clone()]
    early = inputs_ready and inputs >= 64

    def wait(overlap: object) -> None:
        x.copy_(correct[0])
        gate.copy_(correct[1])
        if early:
            # The kernel must have read it before the wait.
            gate.fill_(torch.nan)

    for tensor in (x,) if early else (x, gate):
        tensor.fill_(torch.nan)
    monkeypatch.setattr(fused.kernels, "wait_for_inputs", wait)
    found = project(
        x, weight, gate=gate, **options, eps=0.1, inputs_ready=inputs_ready, backend="triton"
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@dtypes
@pytest.mark.parametrize("dim", [48, 64, 200])
def test_norms_with_folded_weights(monkeypatch, dim, dtype):
    tiled(monkeypatch, inputs=64)
    monkeypatch.setattr(fused, "MIN_TILE_INPUTS", 32)
    x, weight = normal(3, dim).to(dtype), normal(10, dim).to(dtype)
    check(x, weight, norm_dim=dim, eps=0.1)
    check(x, quantize_rows(normal(10, dim)), norm_dim=dim, eps=0.1, swiglu=True)
    gate = normal(3, dim, seed=1).to(dtype)
    check(x, weight, norm_dim=8, eps=1e-5, gate=gate)
    check(x, weight, norm_dim=8, eps=0.0, gate=gate, residual=normal(3, 10).to(dtype))
    ones = torch.ones(dim, device=DEVICE)
    given, there = x.to(DEVICE), weight.to(DEVICE)
    found = project(given, there, norm_dim=dim, eps=0.1, backend="triton")
    weighted = project(given, there, norm=ones, eps=0.1, backend="triton")
    assert relative_error(found.cpu(), weighted.cpu()) < TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("half", [1, 5, 8])
def test_swiglu(half, dtype):
    x, weight = normal(2, 70).to(dtype), normal(2 * half, 70).to(dtype)
    check(x, weight, swiglu=True)
    options = {"bias": normal(2 * half).to(dtype), "norm": normal(70), "eps": 1e-5}
    check(x, weight, swiglu=True, residual=normal(2, half).to(dtype), **options)


@dtypes
@pytest.mark.parametrize("dim", [64, 70, 136])
def test_int8_weights(monkeypatch, dim, dtype):
    tiled(monkeypatch, inputs=64)
    x, weight = normal(2, dim).to(dtype), quantize_rows(normal(10, dim))
    check(x, weight)
    check(x, weight, swiglu=True, norm=normal(dim), eps=1e-5, bias=normal(10).to(dtype))


def test_fp16_and_unaligned_int8_rows():
    check(normal(2, 40).half(), normal(6, 40).half(), tolerance=2e-3)
    small = quantize_rows(normal(8, 40))
    values = torch.zeros(8 * 40 + 3, dtype=torch.int8)[3:].view(8, 40).copy_(small.values)
    check(normal(2, 40), Int8Weight(values, small.scales))


@dtypes
@pytest.mark.parametrize("batch", [1, 5, 37])
def test_many_tokens_on_tensor_cores(batch, dtype):
    dim, rows = 96, 26
    x, weight = normal(batch, dim).to(dtype), normal(rows, dim).to(dtype)
    bias, norm = normal(rows).to(dtype), normal(dim)
    residual = normal(batch, rows, seed=3).to(dtype)
    many = {"backend": "products"}
    check(x, weight, **many)
    check(x, weight, norm=norm, eps=0.1, bias=bias, residual=residual, **many)
    check(x, weight, residual=residual, **many)
    check(x, weight, norm=norm, eps=0.1, bias=bias, swiglu=True, **many)
    check(x, weight, swiglu=True, residual=residual[:, :13], **many)
    gate = normal(batch, dim, seed=1).to(dtype)
    check(x, weight, norm=normal(24, seed=2), eps=1e-5, gate=gate, residual=residual, **many)
    check(x, weight, norm_dim=24, eps=1e-5, gate=gate, inputs_ready=True, residual=residual, **many)
    check(x, quantize_rows(normal(rows, dim)), norm=norm, eps=0.1, swiglu=True, **many)
    check(x, quantize_rows(normal(rows, dim)), norm_dim=dim, eps=0.1, swiglu=True, **many)


@pytest.mark.parametrize("size", [1, 1023, 1025])
def test_swiglu_of_any_width(size):
    check(normal(6, 32), normal(2 * size, 32), swiglu=True, backend="products")


@pytest.mark.parametrize("backend", ["triton", "products"])
def test_out_may_be_the_residual(backend):
    x, weight, residual = (t.to(DEVICE) for t in (normal(2, 40), normal(6, 40), normal(2, 6)))
    wanted = project(x, weight, residual=residual, backend="reference")
    assert project(x, weight, residual=residual, out=residual, backend=backend) is residual
    torch.testing.assert_close(residual, wanted, rtol=1e-5, atol=1e-5)


def test_tiles_are_chosen_by_shape_and_element_size(monkeypatch):
    taken = []
    monkeypatch.setitem(fused.TILES, (6, 64, 4), Tile(2, 32, 2))
    monkeypatch.setitem(fused.TILES, (6, 64, 1), Tile(1, 64, 1))
    watch(
        monkeypatch,
        lambda grid, options: taken.append((grid[0], options["BLOCK_R"], options["BLOCK_K"])),
    )
    check(normal(1, 64), normal(6, 64))
    check(normal(1, 64), quantize_rows(normal(6, 64)))
    check(normal(1, 64), quantize_rows(normal(6, 64)), swiglu=True)
    assert taken == [(3, 2, 32), (6, 1, 64), (3, 2, 64)]


def test_a_copied_gate_is_not_ready(monkeypatch):
    taken = []
    watch(monkeypatch, lambda grid, options: taken.append(options["INPUTS_READY"]))
    x, weight, gate = (t.to(DEVICE) for t in (normal(1, 64), normal(6, 64), normal(1, 64, seed=1)))
    norm = normal(32, seed=2).to(DEVICE)[::2]
    strided = torch.stack((gate, gate), -1)[..., 0]
    for options in (
        {"norm_dim": 16, "gate": gate},
        {"norm_dim": 16, "gate": strided},
        {"norm": norm.contiguous(), "gate": gate},
        {"norm": norm, "gate": gate},
        {"norm_dim": 64},
    ):
        project(x, weight, eps=0.1, inputs_ready=True, **options, backend="triton")
    assert taken == [True, False, True, False, False]


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_sums_of_a_tile_fit_the_registers(batch):
    for rows, dim, size in fused.TILES:
        values = torch.empty(rows, dim, dtype={1: torch.int8, 2: BF16}[size], device="meta")
        tile = fused._tile(batch, values, False, 0)
        sums = tile.rows * tile.inputs * (1 << (batch - 1).bit_length())
        assert sums <= 128 * 32 * tile.warps, (rows, dim, size)


def test_head_dims_that_are_no_power_of_two():
    x, weight, norm = (t.to(DEVICE) for t in (normal(2, 12), normal(5, 12), normal(6)))
    options = {"norm": norm, "gate": x.flip(0), "eps": 1e-5}
    with pytest.raises(NotImplementedError, match="heads of 6"):
        project(x, weight, **options, backend="triton")
    assert project(x, weight, **options).shape == (2, 5)
    options = {"norm_dim": 6, "gate": x.flip(0), "eps": 1e-5}
    with pytest.raises(NotImplementedError, match="heads of 6"):
        project(x, weight, **options, backend="triton")
    assert project(x, weight, **options).shape == (2, 5)


def test_fp64_is_refused():
    with pytest.raises(MmmambaError, match="bf16, fp16 and fp32"):
        project(
            normal(1, 8).double().to(DEVICE), normal(2, 8).double().to(DEVICE), backend="triton"
        )


@pytest.mark.skipif(INTERPRETED, reason="auto picks kernels on a GPU only")
def test_auto_picks_kernels_by_rows_without_gradients():
    x, weight = normal(9, 64).cuda(), normal(6, 64).cuda()
    for rows, given, wanted in (
        (2, weight, "triton"),
        (3, weight, "products"),
        (8, quantize_rows(weight), "triton"),
        (9, quantize_rows(weight), "products"),
    ):
        norm = torch.rand(64, device="cuda")
        found = project(x[:rows], given, norm=norm, eps=1e-5)
        expected = project(x[:rows], given, norm=norm, eps=1e-5, backend=wanted)
        assert torch.equal(found, expected), (rows, wanted)
    assert project(x[:1], weight.requires_grad_()).requires_grad
