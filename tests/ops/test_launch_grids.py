"""Launch grids stay within CUDA's limits; runs without a GPU.

Kernels are replaced by recorders of their grids; tensors are on the meta device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_cases import Sizes, mixer_weights

pytest.importorskip("triton", reason="Triton is not installed")

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.backends import MAX_GRID_ROWS, fits_grid
from mmmamba_cli.ops.conv import fused as conv
from mmmamba_cli.ops.decode import fused as decode
from mmmamba_cli.ops.ssd import backward
from mmmamba_cli.ops.ssd import fused as ssd
from mmmamba_cli.ops.ssd.reference import ScanInputs
from mmmamba_cli.ops.triton_utils import MAX_GRID_PROGRAMS, cdiv, launch_grid, next_power_of_2

BF16, FP32 = torch.bfloat16, torch.float32
Grids = dict[str, list[tuple[int, ...]]]


class Kernels:
    """A kernel module whose kernels only record their launch grids."""

    def __init__(self, grids: Grids):
        self.grids = grids

    def __getattr__(self, name: str) -> Any:
        grids = self.grids.setdefault(name, [])

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                grids.append(grid)
                return lambda *arguments, **options: None

        return Kernel()


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> Grids:
    found: Grids = {}
    for module in (conv, decode, ssd):
        monkeypatch.setattr(module, "check_inputs", lambda *arguments: None)
    for module in (conv, decode, ssd, backward):
        monkeypatch.setattr(module, "kernels", Kernels(found))
    return found


def meta(*shape: int, dtype: torch.dtype = BF16, learns: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=learns)


def require_launchable(grids: Grids) -> None:
    for name, found in grids.items():
        for programs, *others in found:
            assert 0 < programs <= MAX_GRID_PROGRAMS, name
            assert all(0 < count <= MAX_GRID_ROWS for count in others), name


def programs_of(grids: Grids, name: str) -> list[int]:
    return [torch.Size(grid).numel() for grid in grids[name]]


def test_sizes_are_those_of_triton() -> None:
    triton = pytest.importorskip("triton")
    for size in [*range(1, 300), 2**31 - 1, 2**31, 2**31 + 1]:
        assert next_power_of_2(size) == triton.next_power_of_2(size), size
        for block in (1, 3, 64):
            assert cdiv(size, block) == triton.cdiv(size, block), (size, block)


@pytest.mark.parametrize(
    ("batch", "length", "dtype"), [(4096, 65, BF16), (1, 70_000_000, BF16), (1, 5_000_000, FP32)]
)
def test_scans(grids: Grids, batch: int, length: int, dtype: torch.dtype) -> None:
    heads, kv_heads, dim = 16, 4, 64
    x, B = (meta(batch, length, kv_heads, dim, dtype=dtype, learns=True) for _ in range(2))
    C = meta(batch, length, heads, dim, dtype=dtype, learns=True)
    dt, A = meta(batch, length, heads, learns=True), meta(heads, dtype=FP32)
    optional = dict.fromkeys(("dt_bias", "D", "initial_state", "mask", "seq_idx"))
    y, _ = ssd.scan(ScanInputs(x, dt, A, B, C, dt_softplus=True, chunk_size=64, **optional))
    y.backward(meta(*y.shape, dtype=dtype))
    require_launchable(grids)
    assert grids.keys() >= {
        "prepare_decays",
        "span_states",
        "pass_states",
        "span_outputs",
        "sum_heads",
    }
    # One program per 1024 state elements of each head, forward and backward.
    assert programs_of(grids, "pass_states") == 2 * [batch * heads * 4]
    assert programs_of(grids, "decay_gradients") == [batch * heads * -(-length // 64)]
    spans, rest = divmod(programs_of(grids, "span_states")[0], batch * heads)
    assert (rest, spans >= length // 1024) == (0, True)


@pytest.mark.parametrize(("batch", "length"), [(1, 3_000_000), (65_535, 33)])
def test_convolutions(grids: Grids, batch: int, length: int) -> None:
    x, weight = meta(batch, length, 130, learns=True), meta(130, 4, learns=True)
    y, _ = conv.convolve(
        x, weight, None, activation="silu", initial_state=None, mask=None, seq_idx=None
    )
    y.backward(meta(*y.shape))
    require_launchable(grids)
    # Folded only if the second axis is too long.
    assert grids["convolve"][0][1:] == ((1, 1) if batch == 1 else (2, batch))
    assert programs_of(grids, "convolve") == [batch * 3 * -(-length // 32)]
    assert programs_of(grids, "gradients") == [batch * 3 * -(-(length + 3) // 32)]


@pytest.mark.parametrize("batch", [1, 4096, 65_535])
def test_steps(grids: Grids, batch: int) -> None:
    heads, kv_heads, dim = 16, 4, 64
    q = meta(batch, heads, dim)
    k, v = (meta(batch, kv_heads, dim) for _ in range(2))
    keys, values = (meta(batch, kv_heads, 640, dim) for _ in range(2))
    cos, sin = (meta(1, dim, dtype=FP32) for _ in range(2))
    decode.attention_step(q, k, v, keys, values, meta(1, dtype=torch.long), None, cos, sin)
    assert programs_of(grids, "merge_splits") == [batch * heads * 2]
    decode.greedy_argmax(meta(batch, 500), meta(500, dtype=torch.bool))
    assert programs_of(grids, "argmax_split") == [batch * 32]
    sizes = Sizes(batch=batch)
    decode.mixer_step(
        meta(batch, sizes.channels), meta(batch, sizes.heads),
        meta(batch, sizes.channels, sizes.taps),
        meta(batch, sizes.heads, sizes.P, sizes.N, dtype=FP32), meta(1, dtype=torch.long),
        mixer_weights(sizes, BF16), inputs_ready=False,
    )  # fmt: skip
    require_launchable(grids)


def test_grids_beyond_the_limits_are_rejected(grids: Grids) -> None:
    assert fits_grid(65_535)
    assert not fits_grid(65_536)
    with pytest.raises(
        MmmambaError, match=r"causal_conv: .*65,536 programs exceed the launch grid"
    ):
        conv.convolve(
            meta(65_536, 8, 2), meta(2, 4), None,
            activation=None, initial_state=None, mask=None, seq_idx=None,
        )  # fmt: skip
    with pytest.raises(MmmambaError, match="first axis"):
        launch_grid("ssd", 2**31)
    assert launch_grid("ssd", 2**31 - 1, 65_535, 1) == (2**31 - 1, 65_535, 1)
