"""The sharded writer, compared with the safetensors library, and its errors."""

import errno
import json
import random
import resource
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from mmmamba_cli.checkpoint import writer as writer_module
from mmmamba_cli.checkpoint.atomic_writes import atomic_folder
from mmmamba_cli.checkpoint.hashing import TensorHasher
from mmmamba_cli.checkpoint.name_map import LEADING_MODULES, PEFT_PARTS
from mmmamba_cli.checkpoint.safetensors_file import DTYPES as DTYPE_ELEMENTS
from mmmamba_cli.checkpoint.tensor_info import TensorInfo, torch_dtype
from mmmamba_cli.checkpoint.tensor_source import open_source
from mmmamba_cli.checkpoint.writer import ShardedWriter
from mmmamba_cli.errors import CheckpointError

DTYPES = {name: torch_dtype(element) for name, element in DTYPE_ELEMENTS.items()}
PeakGrowth = Callable[[int], AbstractContextManager[None]]

INDEX = "model.safetensors.index.json"


def plan_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo.of(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 10**9) -> str:
    with ShardedWriter(folder, plan_of(tensors), max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert writer.content_hash is not None
    return writer.content_hash


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = dtype.itemsize * int(torch.tensor(shape).prod())
    high = 2 if dtype == torch.bool else 60  # bytes below 60 are never NaN in any dtype
    return torch.randint(0, high, (count,), dtype=torch.uint8).view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_safetensors_reads_every_dtype_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": random_tensor(dtype, (3, 5)), "b": random_tensor(dtype, ())}
    write(tmp_path, tensors)
    read = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(bits(read[name]), bits(tensor))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_header_and_tensors_are_aligned(tmp_path: Path) -> None:
    tensors = {
        "flag": torch.tensor([True]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "double": torch.ones(2, dtype=torch.float64),
        "single": torch.ones(5),
    }
    write(tmp_path, tensors)
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert list(header) == ["__metadata__", "double", "single", "half", "flag"]
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0


def test_shards_stay_within_their_size(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": torch.randn(10, 25) for i in range(20)}
    write(tmp_path, tensors, max_shard_bytes=4000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) == 7
    assert all(shard.stat().st_size <= 4000 for shard in shards)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 20_000}
    assert set(index["weight_map"]) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(10), "big": torch.ones(2000), "b": torch.ones(10)}
    write(tmp_path, tensors, max_shard_bytes=1000)
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert len(set(index.values())) == 3
    with open_source(tmp_path) as source:
        assert torch.equal(source.read("big"), tensors["big"])


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("written")
    names = data.draw(
        st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=8, unique=True)
    )
    # Hypothesis also draws words of the code, such as the modules of wrappers.
    names = [
        name
        for name in names
        if name.isprintable()
        and name != "__metadata__"
        and not (LEADING_MODULES | PEFT_PARTS).intersection(name.split("."))
    ] or ["w"]
    tensors = {}
    for name in names:
        dtype = data.draw(st.sampled_from(list(DTYPES.values())))
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3).map(tuple))
        tensor = random_tensor(dtype, shape)
        if len(shape) >= 2 and data.draw(st.booleans()):
            tensor = tensor.transpose(0, -1)
        tensors[name] = tensor
    limit = data.draw(st.sampled_from([1, 500, 10**9]))
    order = data.draw(st.permutations(names))
    with ShardedWriter(folder, plan_of(tensors), limit) as writer:
        for name in order:
            writer.write(name, tensors[name])
    library: dict[str, torch.Tensor] = {}
    for file in writer.files:
        library |= load_file(file)
    assert set(library) == set(tensors)
    with open_source(folder) as source:
        for name, tensor in tensors.items():
            for read in (source.read(name), library[name]):
                assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
                assert torch.equal(bits(read), bits(tensor))
        assert source.content_hash() == writer.content_hash


def test_hash_does_not_depend_on_sharding(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(40) for i in range(6)}
    hashes = set()
    for number, limit in enumerate((1, 700, 10**9)):
        (tmp_path / str(number)).mkdir()
        hashes.add(write(tmp_path / str(number), tensors, limit))
    assert len(hashes) == 1


def test_large_non_contiguous_tensors(tmp_path: Path) -> None:
    base = torch.randn(2100, 1100)  # several chunks
    write(tmp_path, {"t": base.T, "s": base[:, ::3], "c": base})
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["t"], base.T)
    assert torch.equal(read["s"], base[:, ::3])
    assert torch.equal(read["c"], base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cast_while_writing(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.randn(600, 130)
    tensors = {"w": base, "t": base.T, "s": torch.tensor(2.5), "e": torch.empty(0, 2)}
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for folder in (tmp_path / "before", tmp_path / "meanwhile"):
        folder.mkdir()
    with ShardedWriter(tmp_path / "meanwhile", plan_of(cast)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor, cast=True)
    assert writer.content_hash == write(tmp_path / "before", cast)
    read = load_file(tmp_path / "meanwhile" / "model.safetensors")
    for name, tensor in cast.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)


def test_a_tensor_that_is_hashed_already_is_not_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same, cast, other = torch.randn(40, 3), torch.randn(9), torch.randn(9)
    plan = plan_of({"same": same, "cast": cast.bfloat16(), "other": other, "new": other})
    tensors = {"same": same, "cast": cast, "other": other, "new": other}
    (tmp_path / "alone").mkdir()
    with ShardedWriter(tmp_path / "alone", plan) as alone:
        for name, tensor in tensors.items():
            alone.write(name, tensor, cast=True)
    hashed: list[str] = []
    real = writer_module.start_digest
    monkeypatch.setattr(
        writer_module, "start_digest", lambda name, info: hashed.append(name) or real(name, info)
    )
    (tmp_path / "shared").mkdir()
    with (
        TensorHasher() as hasher,
        ShardedWriter(tmp_path / "shared", plan, hasher=hasher) as writer,
    ):
        for name, tensor in {"same": same, "cast": cast, "other": cast}.items():
            hasher.submit(name, tensor)
        for name, tensor in tensors.items():
            writer.write(name, tensor, cast=True)
    assert sorted(hashed) == ["cast", "new", "other"]
    assert writer.content_hash == alone.content_hash
    one, two = (tmp_path / name / "model.safetensors" for name in ("alone", "shared"))
    assert one.read_bytes() == two.read_bytes()


def test_a_bad_value_that_the_hasher_finds_leaves_nothing(tmp_path: Path) -> None:
    bad = torch.tensor([float("nan")])
    with (
        pytest.raises(CheckpointError, match="'bad' holds 1 NaN"),
        TensorHasher() as hasher,
        atomic_folder(tmp_path / "out") as folder,
        ShardedWriter(folder, plan_of({"bad": bad}), hasher=hasher) as writer,
    ):
        writer.write("bad", hasher.submit("bad", bad, check=True))
    assert not list(tmp_path.iterdir())


def test_a_value_too_large_for_its_dtype_is_named(tmp_path: Path) -> None:
    tensor = torch.ones(40_000)
    tensor[39_000] = 70_000.0
    plan = {"big.weight": TensorInfo.of(torch.float16, (40_000,))}
    with (
        pytest.raises(CheckpointError, match=r"'big\.weight' holds values .* into float16"),
        ShardedWriter(tmp_path, plan) as writer,
    ):
        writer.write("big.weight", tensor, cast=True)
    (tmp_path / "wide").mkdir()
    plan = {"big.weight": TensorInfo.of(torch.bfloat16, (40_000,))}
    with ShardedWriter(tmp_path / "wide", plan) as writer:
        writer.write("big.weight", tensor, cast=True)


MISUSES = {
    "unplanned": ("c", torch.zeros(2), "c is not in the plan"),
    "twice": ("a", torch.zeros(2), "a was already written"),
    "other shape": ("b", torch.zeros(3), r"b is torch.float32 \[3\], planned is .* \[2\]"),
    "other dtype": ("b", torch.zeros(2).half(), "b is torch.float16"),
}


@pytest.mark.parametrize("name, tensor, message", MISUSES.values(), ids=MISUSES.keys())
def test_misuse(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    plan = plan_of({"a": torch.zeros(2), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match=message), ShardedWriter(tmp_path, plan) as writer:
        writer.write("a", torch.zeros(2))
        writer.write(name, tensor)


def test_unwritten_tensors_are_noticed(tmp_path: Path) -> None:
    plan = plan_of({f"t{i}": torch.zeros(2) for i in range(3)})
    with (
        pytest.raises(ValueError, match=r"2 planned tensors were not written: \['t0', 't2'\]"),
        ShardedWriter(tmp_path, plan) as writer,
    ):
        writer.write("t1", torch.zeros(2))
    with pytest.raises(ValueError, match="no tensors"):
        ShardedWriter(tmp_path, {})


def test_an_error_in_the_block_is_not_hidden(tmp_path: Path) -> None:
    plan = plan_of({"a": torch.zeros(2), "b": torch.zeros(2)})
    with pytest.raises(KeyboardInterrupt), ShardedWriter(tmp_path, plan) as writer:
        writer.write("a", torch.zeros(2))
        raise KeyboardInterrupt
    assert writer.content_hash is None


def test_existing_files_are_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(FileExistsError):
        write(tmp_path, {"a": torch.ones(3)})
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_free_space_is_checked_first(tmp_path: Path) -> None:
    plan = {"a": TensorInfo.of(torch.float32, (1 << 25, 1 << 25))}
    with pytest.raises(CheckpointError, match=r"4503599\.63 GB are needed"):
        ShardedWriter(tmp_path / ".", plan)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = writer_module._write_at, []

    def full(descriptor: int, place: int, data: memoryview) -> None:
        calls.append(place)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        real(descriptor, place, data)

    monkeypatch.setattr(writer_module, "_write_at", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, {f"t{i}": torch.ones(9) for i in range(5)})
    assert len(calls) > 2


def fail_within(target: Path, count: int) -> int | None:
    """Write 4 tensors of `count` floats into a folder; return the error number."""
    plan = {f"t{i}": TensorInfo.of(torch.float32, (count,)) for i in range(4)}
    with (
        pytest.raises(OSError) as caught,
        atomic_folder(target) as folder,
        ShardedWriter(folder, plan) as writer,
    ):
        for name in plan:
            writer.write(name, torch.ones(count))
    return caught.value.errno


def test_a_real_write_failure_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        assert fail_within(tmp_path / "out", 100_000) == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("only root can make a small disk")
    # Skip the check in advance, so that the disk fills up while writing.
    monkeypatch.setattr(writer_module, "_check_free_space", lambda folder, needed: None)
    try:
        assert fail_within(tmp_path / "out", 400_000) == errno.ENOSPC
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# malloc returns blocks above 32 MiB to the system, so that memory usage shows what is held.
LARGE = 12 << 20


def test_no_shard_is_held_in_memory(tmp_path: Path, peak_growth: PeakGrowth) -> None:
    plan = {f"t{i}": TensorInfo.of(torch.float32, (LARGE,)) for i in range(14)}  # 672 MiB
    one = torch.randn(LARGE)
    with peak_growth(250 << 20), ShardedWriter(tmp_path, plan) as writer:
        # At most 128 MiB are pending, and one more tensor is created.
        for name in plan:
            writer.write(name, one + random.random())


def test_casting_takes_no_memory(tmp_path: Path, peak_growth: PeakGrowth) -> None:
    plan = {f"t{i}": TensorInfo.of(torch.bfloat16, (LARGE,)) for i in range(6)}  # 144 MiB
    one = torch.randn(LARGE)
    with peak_growth(20 << 20), ShardedWriter(tmp_path, plan) as writer:
        for name in plan:
            writer.write(name, one, cast=True)
