"""Bytes, finiteness and hashes of tensors, and the bounded background pool."""

import hashlib
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmmamba_cli.checkpoint import hashing
from mmmamba_cli.checkpoint.hashing import BoundedPool, TensorHasher, combined_hash, tensor_digest
from mmmamba_cli.checkpoint.safetensors_file import DTYPES as DTYPE_ELEMENTS
from mmmamba_cli.checkpoint.tensor_info import format_size, quoted, torch_dtype
from mmmamba_cli.checkpoint.tensor_io import (
    byte_chunks,
    check_finite,
    is_finite_chunk,
    row_slices,
)
from mmmamba_cli.checkpoint.tensor_source import TensorSource, open_source
from mmmamba_cli.errors import CheckpointError

DTYPES = {name: torch_dtype(element) for name, element in DTYPE_ELEMENTS.items()}
STRIDED = {
    "contiguous": torch.arange(60.0).view(3, 4, 5),
    "transposed": torch.arange(60.0).view(3, 4, 5).transpose(0, 2),
    "stepped": torch.arange(120.0).view(12, 10)[::2, 1::3],
    "expanded": torch.arange(5.0).expand(7, 5),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
}


@pytest.mark.parametrize("tensor", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("limit", [1, 8, 24, 1 << 20])
def test_slices_cover_the_tensor_in_row_order(tensor: torch.Tensor, limit: int) -> None:
    pieces = list(row_slices(tensor, limit))
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces]), tensor.reshape(-1))
    assert all(piece.nbytes <= max(limit, 4) for piece in pieces)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_bytes_are_those_in_memory(dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2, (6, 16), dtype=torch.uint8)
    tensor = raw.view(dtype)
    assert b"".join(byte_chunks(tensor)) == bytes(raw.flatten().tolist())


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2],
    ids=str,
)
def test_not_finite_values_are_counted(dtype: torch.dtype) -> None:
    values = torch.ones(3, 700_000)
    values[0, 5] = values[2, 699_999] = float("nan")
    values[1, 0], values[1, 1], values[2, 2] = float("inf"), float("-inf"), float("inf")
    with pytest.raises(
        CheckpointError, match=r"'a\.b' holds 2 NaN and 3 infinite values of 2100000"
    ):
        check_finite(values.to(dtype), "a.b")
    with pytest.raises(CheckpointError, match="2 NaN and 3 infinite"):
        check_finite(values.to(dtype).T, "a.b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_finite_values_whose_sum_overflows_pass(dtype: torch.dtype) -> None:
    check_finite(torch.full((9000,), torch.finfo(dtype).max, dtype=dtype), "large")


def test_integers_and_empty_tensors_are_finite() -> None:
    check_finite(torch.tensor([1, 2]), "integers")
    check_finite(torch.tensor([True]), "flags")
    check_finite(torch.empty(0), "empty")


def test_opposite_infinities_do_not_cancel() -> None:
    with pytest.raises(CheckpointError, match="0 NaN and 2 infinite"):
        check_finite(torch.tensor([float("inf"), float("-inf")]), "a")


SMALL_FLOATS = {
    dtype: torch.arange(256**bits.itemsize).to(bits).view(dtype)
    for dtype, bits in (
        (torch.bfloat16, torch.uint16),
        (torch.float16, torch.uint16),
        (torch.float8_e4m3fn, torch.uint8),
        (torch.float8_e5m2, torch.uint8),
    )
}


@pytest.mark.parametrize("dtype", SMALL_FLOATS, ids=str)
def test_every_value_of_a_small_dtype_is_finite_or_not(dtype: torch.dtype) -> None:
    values = SMALL_FLOATS[dtype]
    finite = values.float().isfinite()
    chunks = byte_chunks(values[finite])
    assert all(is_finite_chunk(chunk, dtype) for chunk in chunks)
    for value in values[~finite]:
        (chunk,) = byte_chunks(value)
        assert not is_finite_chunk(chunk, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_largest_values_are_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    check_finite(torch.tensor([largest, -largest, 0.0, -0.0], dtype=dtype), "largest")
    for bad in ("inf", "-inf", "nan", "-nan"):
        with pytest.raises(CheckpointError, match=r"1 NaN|1 infinite"):
            check_finite(torch.tensor([largest, float(bad)], dtype=dtype), "a")


def test_digest_is_sha256_of_description_and_bytes() -> None:
    tensor = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    expected = hashlib.sha256(json.dumps(["w", "bfloat16", [1, 2]]).encode())
    expected.update(bytes([0x80, 0x3F, 0x00, 0x40]))
    assert tensor_digest("w", tensor) == expected.digest()


def test_digest_tells_name_dtype_shape_and_values_apart() -> None:
    base = torch.zeros(2, 3)
    variants = [
        ("b", base),
        ("a", base.view(3, 2)),
        ("a", base.view(torch.int32)),
        ("a", base.index_fill(0, torch.tensor([1]), 1.0)),
    ]
    digests = {tensor_digest("a", base), *(tensor_digest(*variant) for variant in variants)}
    assert len(digests) == 5


@pytest.mark.parametrize("tensor", STRIDED.values(), ids=STRIDED.keys())
def test_digest_does_not_see_strides(tensor: torch.Tensor) -> None:
    assert tensor_digest("a", tensor) == tensor_digest("a", tensor.clone().contiguous())


def test_hasher_does_not_see_the_order_of_submission() -> None:
    tensors = {f"layer.{i}": torch.randn(i + 1, 50) for i in range(20)}
    results = []
    for names in (list(tensors), list(reversed(tensors))):
        with TensorHasher(max_pending_bytes=2000) as hasher:
            for name in names:
                hasher.submit(name, tensors[name])
            results.append(hasher.result())
    expected = combined_hash({name: tensor_digest(name, t) for name, t in tensors.items()})
    assert results == [expected, expected]
    assert len(expected) == 64


def test_hasher_refuses_a_name_twice() -> None:
    with TensorHasher() as hasher:
        hasher.submit("a", torch.zeros(1))
        with pytest.raises(ValueError, match="already hashed"):
            hasher.submit("a", torch.zeros(1))


@pytest.fixture
def mapped(tmp_path: Path) -> TensorSource:
    """A memory-mapped file of four tensors; `bad` has a NaN."""
    tensors = {f"t{i}": torch.randn(i + 1, 7) for i in range(3)}
    save_file({**tensors, "bad": torch.tensor([1.0, float("nan")])}, tmp_path / "a.safetensors")
    return open_source(tmp_path / "a.safetensors")


def test_a_checked_tensor_with_nan_is_an_error_of_the_result() -> None:
    bad = torch.tensor([1.0, float("nan")])
    with TensorHasher() as hasher:
        hasher.submit("unchecked", bad)
        hasher.submit("empty", torch.empty(0), check=True)
        hasher.submit("bad.weight", bad, check=True)
        with pytest.raises(CheckpointError, match=r"'bad\.weight' holds 1 NaN"):
            hasher.result()


def test_a_failed_check_stops_the_next_submission() -> None:
    with TensorHasher() as hasher:
        bad = hasher.submit("bad", torch.tensor([float("inf")]), check=True)
        digest = hasher.digest_of("bad", bad)
        assert digest is not None and digest.exception(timeout=60) is not None
        with pytest.raises(CheckpointError, match="'bad' holds 0 NaN and 1 infinite"):
            hasher.submit("next", torch.zeros(1))


def test_tensors_hashed_ahead_are_hashed_once(
    mapped: TensorSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[str] = []

    def recorded(name: str, tensor: torch.Tensor, *, check: bool = False) -> bytes:
        digested.append(name)
        return tensor_digest(name, tensor, check=check)

    monkeypatch.setattr(hashing, "tensor_digest", recorded)
    other = torch.zeros(2, 7)
    with TensorHasher() as hasher:
        hasher.submit_ahead(mapped)
        for name in ("t2", "t0"):
            assert torch.equal(hasher.submit(name, mapped.read(name)), mapped.read(name))
        assert hasher.submit("t1", other) is other
        digests = hasher.digests()
    # `bad` was hashed ahead and not submitted: the result leaves it out, and no error is raised.
    expected = {"t2": mapped.read("t2"), "t0": mapped.read("t0"), "t1": other}
    assert digests == {name: tensor_digest(name, tensor) for name, tensor in expected.items()}
    assert sorted(digested) == ["bad", "t0", "t1", "t1", "t2"]


def test_tensors_hashed_ahead_are_checked(mapped: TensorSource) -> None:
    with TensorHasher() as hasher:
        hasher.submit_ahead(mapped)
        hasher.submit("bad", mapped.read("bad"), check=True)
        with pytest.raises(CheckpointError, match="'bad' holds 1 NaN"):
            hasher.digests()


def test_few_bytes_are_hashed_ahead(mapped: TensorSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "AHEAD_BYTES", 28 + 8)
    submitted: list[int] = []
    monkeypatch.setattr(BoundedPool, "submit", lambda pool, nbytes, job: submitted.append(nbytes))
    with TensorHasher() as hasher:
        hasher.submit_ahead(mapped)
    assert submitted == [0, 0]


def test_pool_never_holds_more_than_its_bound() -> None:
    pool, lock = BoundedPool(workers=4, max_pending_bytes=100), threading.Lock()
    running, most = 0, 0

    def job(nbytes: int) -> None:
        nonlocal running, most
        with lock:
            running += nbytes
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= nbytes

    jobs = [pool.submit(40, lambda: job(40)) for _ in range(20)]
    jobs.append(pool.submit(500, lambda: job(500)))  # larger than the bound: runs alone
    for future in jobs:
        future.result()
    pool.close()
    assert most == 500
    assert running == 0


def test_pool_bounds_many_small_jobs() -> None:
    pool, gate = BoundedPool(workers=1, max_pending_bytes=100), threading.Event()
    pool.submit(60, gate.wait)
    waiting = threading.Thread(target=lambda: pool.submit(60, lambda: None))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    gate.set()
    waiting.join(60)
    assert not waiting.is_alive()
    pool.close()


def test_pool_passes_errors_on_and_frees_their_room() -> None:
    pool = BoundedPool(workers=1, max_pending_bytes=10)
    failed = pool.submit(10, lambda: 1 // 0)
    assert pool.submit(10, lambda: 7).result(timeout=60) == 7
    with pytest.raises(ZeroDivisionError):
        failed.result()
    pool.close()


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (165_536, "165.54 kB"),
        (2_000_000, "2.00 MB"),
        (10**9, "1.00 GB"),
    ],
)
def test_sizes_have_a_unit_that_shows_them(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


def test_names_from_files_are_made_printable_and_short() -> None:
    assert quoted("a\x1b[31m\ud800") == r"'a\x1b[31m\ud800'"
    assert len(quoted("x" * 5000)) < 200
