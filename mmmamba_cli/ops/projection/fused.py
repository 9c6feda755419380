"""Launcher of the fused linear kernel for few tokens, with norm, gate, activation and sum."""

from typing import NamedTuple

from torch import Tensor

from mmmamba_cli.ops.projection import kernels
from mmmamba_cli.ops.projection.reference import Int8Weight
from mmmamba_cli.ops.triton_utils import (
    USE_PTX,
    buffer,
    cdiv,
    check_inputs,
    dense_rows,
    device_guard,
    next_power_of_2,
    or_dummy,
    pdl_options,
)


class Tile(NamedTuple):
    """Tile of a program: rows of the weight, inputs of each row, and warps."""

    rows: int
    inputs: int
    warps: int


# Tiles by (rows, inputs, element size) of the weight, for one token of HoVLE-2.6B on an H100; int8
# weights with folded norms, as in quantized models. Tuned by `benchmarks/decode_kernels.py --tune`.
TILES: dict[tuple[int, int, int], Tile] = {
    (2048, 2048, 1): Tile(8, 2048, 4),
    (2048, 2048, 2): Tile(8, 2048, 8),
    (2048, 8192, 1): Tile(4, 4096, 4),
    (2048, 8192, 2): Tile(2, 4096, 8),
    (6160, 2048, 1): Tile(4, 1024, 1),
    (6160, 2048, 2): Tile(2, 1024, 4),
    (16384, 2048, 1): Tile(8, 1024, 2),
    (16384, 2048, 2): Tile(2, 1024, 4),
    (92553, 2048, 1): Tile(4, 2048, 2),
    (92553, 2048, 2): Tile(4, 1024, 4),
}
# Tile of other shapes, with its inputs in bytes; the fewest inputs of a tile in larger batches; and
# the most sums that fit a thread's registers.
DEFAULT_TILE = Tile(rows=4, inputs=4096, warps=4)
MIN_TILE_INPUTS, MAX_SUMS_PER_THREAD, MAX_WARPS = 512, 128, 8


def project(
    x: Tensor,
    weight: Tensor | Int8Weight,
    *,
    bias: Tensor | None,
    norm: Tensor | None,
    norm_dim: int | None,
    eps: float,
    gate: Tensor | None,
    residual: Tensor | None,
    swiglu: bool,
    out: Tensor | None,
    inputs_ready: bool,
) -> Tensor:
    """Shapes as in `ops.project`; no gradients.

    Raises:
        NotImplementedError: gated heads whose size is not a power of 2.
        ValueError: the last dimension of `out` is not contiguous.
        MmmambaError: see `check_inputs`.
    """
    values, scales = weight if isinstance(weight, Int8Weight) else (weight, None)
    check_inputs("project", x, values, scales, bias, norm, gate, residual, out)
    together = norm_dim if norm is None else norm.shape[0]
    head_dim = 0 if gate is None or together is None else together
    if head_dim and head_dim != next_power_of_2(head_dim):
        raise NotImplementedError(f"project: heads of {head_dim} are gated by the reference only")
    if out is not None and out.stride(-1) != 1:
        raise ValueError("project: numbers of a row of `out` do not lie side by side")
    batch, dim = x.shape
    num_out = values.shape[0] // 2 if swiglu else values.shape[0]
    if out is None:
        out = buffer(batch, num_out, like=x, dtype=x.dtype)
    tile = _tile(batch, values, swiglu, head_dim)
    x, values = dense_rows(x), values.contiguous()
    # A copy made here is launched too late to count as ready.
    inputs_ready &= (
        gate is not None and gate.stride(-1) == 1 and (norm is None or norm.is_contiguous())
    )
    gate = None if gate is None else dense_rows(gate)
    residual = None if residual is None else dense_rows(residual)
    aligned = dim % 8 == 0 and values.data_ptr() % 8 == 0
    with device_guard(x):
        kernels.project[(cdiv(values.shape[0], tile.rows),)](
            x, values, or_dummy(scales, x), or_dummy(bias, x), or_dummy(norm, x),
            x if gate is None else gate, x if residual is None else residual, out, num_out,
            x.stride(0),
            0 if gate is None else gate.stride(0),
            0 if residual is None else residual.stride(0), out.stride(0), eps,
            B=batch, D=dim, P=head_dim, NORM=together is not None, HAS_WEIGHT=norm is not None,
            SWIGLU=swiglu, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            HAS_SCALE=scales is not None, BLOCK_B=next_power_of_2(batch), BLOCK_R=tile.rows,
            BLOCK_K=tile.inputs, INPUTS_READY=inputs_ready and tile.inputs >= dim,
            ALIGNED_BY_8=scales is not None and aligned, USE_PTX=USE_PTX,
            num_warps=tile.warps, **pdl_options(x),
        )  # fmt: skip
    return out


def _tile(batch: int, values: Tensor, swiglu: bool, head_dim: int) -> Tile:
    size = values.element_size()
    known = TILES.get((*values.shape, size))
    rows, inputs, warps = known or DEFAULT_TILE._replace(inputs=DEFAULT_TILE.inputs // size)
    inputs = min(inputs, next_power_of_2(values.shape[1]))
    # Each doubling of the batch needs twice the registers for inputs and sums.
    for _ in range(next_power_of_2(batch).bit_length() - 1):
        if inputs > MIN_TILE_INPUTS:
            inputs //= 2
        elif rows > 2:
            rows //= 2
    tile = Tile(max(rows, 2 if swiglu else 1), max(inputs, head_dim), warps)
    sums = tile.rows * tile.inputs * next_power_of_2(batch)
    while sums > 32 * tile.warps * MAX_SUMS_PER_THREAD and tile.warps < MAX_WARPS:
        tile = tile._replace(warps=2 * tile.warps)
    return tile
