"""Attention over padded and packed rows: varlen metadata, backends, deterministic gradients."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.model import HolisticVLMConfig
from mmmamba_cli.model.sequence_layout import StackState, next_layout
from mmmamba_cli.ops import attention
from mmmamba_cli.ops.attention import ATTENTION_BACKENDS, flash, supports_varlen, varlen_metadata

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def rows_of(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


@st.composite
def packed(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Sequence ids and padding mask of rows with padding at both ends."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    ids, real = torch.zeros(2, rows, length, dtype=torch.long).unbind()
    for row in range(rows):
        steps = draw(st.lists(st.integers(0, 2), min_size=length, max_size=length))
        ids[row] = torch.tensor(steps).cumsum(0)
        begin = draw(st.integers(0, length))
        real[row, begin : draw(st.integers(begin, length))] = 1
    return ids, real.bool()


@given(packed())
def test_varlen_mask_equals_the_padding_and_packing_mask(given: tuple[Tensor, Tensor]) -> None:
    ids, real = given
    length = ids.shape[1]
    found = varlen_metadata(real, ids)
    assert found is not None
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = (ids[:, :, None] == ids[:, None, :]) & real[:, None, :] & causal
    seen = found.mask(len(ids))[:, 0]
    assert torch.equal(seen & real[:, :, None], same & real[:, :, None])
    # Padding queries attend to something, so that no softmax is empty.
    assert bool(seen.any(-1).all())
    assert found.cu_seqlens.dtype == torch.int32
    assert found.cu_seqlens[-1] == ids.numel()
    assert found.max_seqlen == int(found.cu_seqlens.diff().max())


def test_varlen_from_mask_or_ids_alone() -> None:
    real = rows_of([0, 1, 1, 1], [1, 1, 0, 0]).bool()
    found = varlen_metadata(real, None)
    assert found is not None
    assert found.cu_seqlens.tolist() == [0, 1, 4, 6, 8]
    ids = varlen_metadata(None, rows_of([3, 3, 7, 7], [3, 3, 3, 3]))
    assert ids is not None
    assert ids.cu_seqlens.tolist() == [0, 2, 4, 8]
    assert ids.max_seqlen == 4


@pytest.mark.parametrize(
    ("real", "ids"),
    [
        ([1, 0, 1, 1], [0, 0, 0, 0]),
        ([1, 1, 1, 1], [0, 1, 0, 0]),
        ([1, 0, 1, 1], [0, 1, 0, 2]),
    ],
)
def test_interrupted_sequences_have_no_varlen(real: list[int], ids: list[int]) -> None:
    assert varlen_metadata(rows_of(real).bool(), rows_of(ids)) is None


def test_integer_masks_and_empty_rows() -> None:
    real, ids = rows_of([0, 1, 1, 1]), rows_of([5, 5, 5, 6])
    for seq_idx in (ids, ids.int(), None):
        found, expected = varlen_metadata(real, seq_idx), varlen_metadata(real.bool(), seq_idx)
        assert found is not None
        assert expected is not None
        assert torch.equal(found.cu_seqlens, expected.cu_seqlens)
    for empty in (ids[:0], ids[:, :0]):
        assert varlen_metadata(None, empty) is None
        assert varlen_metadata(empty.bool(), None) is None


def test_invalid_arguments_are_rejected() -> None:
    q, k = torch.zeros(1, 4, 6, 8), torch.zeros(1, 2, 6, 8)
    with pytest.raises(ValueError, match=r"expected \(B, H, T, P\)"):
        attention(q, torch.zeros(1, 3, 6, 8), torch.zeros(1, 3, 6, 8), is_causal=True)
    with pytest.raises(ValueError, match="v is"):
        attention(q, k, k[:, :, :5], is_causal=True)
    with pytest.raises(ValueError, match="6 queries and 5 keys"):
        attention(q, k[:, :, :5], k[:, :, :5], is_causal=True)
    with pytest.raises(ValueError, match="give one of"):
        attention(q, k, k, is_causal=True, mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))
    with pytest.raises(MmmambaError, match="no backend 'fla'"):
        attention(q, k, k, backend="fla")
    with pytest.raises(NotImplementedError, match="not a mask"):
        attention(q, k, k, backend="flash")
    with pytest.raises(NotImplementedError, match="half precision"):
        attention(q, k, k, is_causal=True, backend="flash")
    with pytest.raises(NotImplementedError, match="not a mask"):
        attention(q, k, k, backend="efficient")
    with pytest.raises(NotImplementedError, match="fp32 on an NVIDIA GPU"):
        attention(q, k, k, is_causal=True, backend="efficient")


def test_single_query_attends_to_all_keys() -> None:
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 1, 8, generator=rng)
    k, v = torch.randn(2, 2, 2, 9, 8, generator=rng)
    weights = torch.softmax((q @ k.repeat_interleave(2, 1).mT) / math.sqrt(8), -1)
    torch.testing.assert_close(attention(q, k, v), weights @ v.repeat_interleave(2, 1))
    assert not supports_varlen(q)


def test_layouts_have_varlen_for_a_whole_prompt_only() -> None:
    stack = HolisticVLMConfig(
        vocab_size=8,
        hidden_size=16,
        layer_types=["full_attention"],
        language_stack={
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 8,
            "intermediate_size": 16,
            "num_layers": 1,
        },
    ).language
    state = StackState()
    mask = rows_of([0, 1, 1], [1, 1, 1]).bool()
    options = {"seq_idx": None, "prompt_lengths": None, "device": "cpu", "dtype": torch.float32}
    columns = next_layout(stack, state, 3, mask=mask, **options)
    found = columns.varlen(3)
    assert found is not None
    assert found.cu_seqlens.tolist() == [0, 1, 3, 6]
    assert columns.varlen(3) is found
    assert columns.varlen(4) is None
    assert columns.chunk(1, 3).varlen(3) is None
    assert next_layout(stack, state, 1, mask=mask[:, :1], **options).varlen(4) is None
    plain = next_layout(stack, StackState(), 3, mask=None, **options)
    assert plain.varlen(3) is None


# FlashAttention and memory-efficient kernels, on a GPU only.

SHAPES = [(2, 4, 2, 131, 64), (3, 4, 4, 700, 32), (1, 16, 8, 2048, 128), (2, 6, 2, 77, 40)]


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v and output gradients, in the memory layout of the model."""
    batch, heads, kv_heads, length, dim = shape
    rng = torch.Generator().manual_seed(length)
    drawn = (
        torch.randn(batch, length, n, dim, generator=rng)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    q, k, v, dy = (x.to("cuda", dtype).transpose(1, 2) for x in drawn)
    return q, k, v, dy


def packing(batch: int, length: int) -> tuple[Tensor, Tensor]:
    ids = (torch.arange(length) // 50).expand(batch, -1).clone()
    real = torch.ones(batch, length, dtype=torch.bool)
    real[0, -length // 5 :] = False
    real[-1, : length // 7] = False
    return real.cuda(), ids.cuda()


def learned(shape: tuple[int, ...], dtype: torch.dtype, backend: str, way: str) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    *inputs, dy = problem(shape, dtype)
    leaves = [x.detach().requires_grad_() for x in inputs]
    options: dict = {"is_causal": True}
    if way != "causal":
        real, ids = packing(shape[0], shape[3])
        options = {"varlen": varlen_metadata(real, ids if way == "packed" else None)}
        dy = dy * real[:, None, :, None]
    y = attention(*leaves, **options, backend=backend)
    gradients = torch.autograd.grad(y, leaves, dy)
    if way != "causal":
        y = y.where(real[:, None, :, None], 0)
    return [y.detach(), *gradients]


@pytest.mark.skipif(not GPU, reason="FlashAttention needs a GPU")
@pytest.mark.parametrize("way", ["causal", "padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_flash_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype, way: str) -> None:
    found = learned(shape, dtype, "flash", way)
    expected = learned(shape, torch.float64, "reference", way)
    for ours, right in zip(found, expected, strict=True):
        assert float((ours.double() - right).norm() / right.norm()) < 1e-2


@pytest.mark.skipif(not GPU, reason="memory-efficient attention needs a GPU")
@pytest.mark.parametrize("way", ["causal", "padded", "packed"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4, 1, 300, 20), (2, 4, 4, 5000, 32)])
def test_efficient_equals_the_reference(shape: tuple[int, ...], way: str) -> None:
    found = learned(shape, torch.float32, "efficient", way)
    expected = learned(shape, torch.float64, "reference", way)
    for ours, right in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours.double() - right).norm() / right.norm()) < 1e-3


@pytest.mark.skipif(not GPU, reason="memory-efficient attention needs a GPU")
def test_efficient_stores_no_scores() -> None:
    *inputs, dy = problem((1, 16, 8, 8192, 64), torch.float32)
    leaves = [x.detach().requires_grad_() for x in inputs]
    varlen = varlen_metadata(None, torch.zeros(1, 8192, dtype=torch.long).cuda())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = attention(*leaves, varlen=varlen)
    torch.autograd.grad(y, leaves, dy)
    # The scores of all heads alone are 4 GiB.
    assert torch.cuda.max_memory_allocated() - before < 1.5 * 2**30


@pytest.mark.skipif(not GPU, reason="the kernels need a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("way", ["causal", "padded", "packed"])
def test_gradients_are_deterministic(way: str, dtype: torch.dtype) -> None:
    shape = (2, 16, 8, 2048, 128)
    first = learned(shape, dtype, "auto", way)
    for _ in range(8):
        for a, b in zip(learned(shape, dtype, "auto", way), first, strict=True):
            assert torch.equal(a, b)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.skipif(not GPU, reason="FlashAttention needs a GPU")
def test_auto_uses_a_varlen_kernel_for_varlen_and_for_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []
    for name in ("flash", "efficient", "sdpa"):
        real = ATTENTION_BACKENDS[name]

        def noted(*inputs, _name=name, _real=real, **options):
            taken.append(_name)
            return _real(*inputs, **options)

        monkeypatch.setitem(ATTENTION_BACKENDS, name, noted)
    q, k, v, _ = problem((2, 4, 2, 64, 32), torch.bfloat16)
    varlen = varlen_metadata(*packing(2, 64))
    attention(q, k, v, is_causal=True)
    attention(q, k, v, varlen=varlen)
    attention(q.float(), k.float(), v.float(), varlen=varlen)
    attention(q.requires_grad_(), k, v, is_causal=True)
    with torch.autocast("cuda", torch.bfloat16):
        attention(q.float(), k.float(), v.float(), is_causal=True)
        attention(q.double(), k.double(), v.double(), varlen=varlen)
    assert taken == ["sdpa", "flash", "efficient", "flash", "flash", "sdpa"]


class TestDeterministicMode:
    """PyTorch's global deterministic mode is enabled only during a launch."""

    def switch(self) -> tuple[bool, bool, bool]:
        return (*flash._determinism(), torch.utils.deterministic.fill_uninitialized_memory)

    @pytest.fixture(autouse=True)
    def put_back(self) -> Iterator[None]:
        before = self.switch()
        yield
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]

    @pytest.mark.parametrize("asked", [(False, False), (True, True), (True, False)])
    def test_mode_is_restored(self, asked: tuple[bool, bool]) -> None:
        torch._C._set_deterministic_algorithms(asked[0], warn_only=asked[1])
        before = self.switch()
        with flash.deterministic_mode():
            assert self.switch()[:2] == (True, False)
        assert self.switch() == before
        with pytest.raises(RuntimeError, match="kernel"), flash.deterministic_mode():
            raise RuntimeError("kernel")
        assert self.switch() == before

    def test_mode_enabled_by_the_process_stays_untouched(self) -> None:
        torch._C._set_deterministic_algorithms(True, warn_only=False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        with flash.deterministic_mode():
            assert self.switch() == (True, False, True)

    def test_changes_by_other_code_are_kept(self) -> None:
        torch._C._set_deterministic_algorithms(False, warn_only=False)
        with flash.deterministic_mode():
            torch._C._set_deterministic_algorithms(True, warn_only=True)
        assert self.switch()[:2] == (True, True)

    def test_one_thread_at_a_time(self) -> None:
        torch._C._set_deterministic_algorithms(False, warn_only=False)
        inside, most, seen = [0], [0], []

        def launch() -> None:
            for _ in range(20):
                with flash.deterministic_mode():
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    # Releases the GIL, as a launch does.
                    time.sleep(0.0005)
                    seen.append(self.switch()[:2])
                    inside[0] -= 1

        threads = [threading.Thread(target=launch) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1]
        assert set(seen) == {(True, False)}
        assert self.switch()[:2] == (False, False)
