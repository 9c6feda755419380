"""Tensor sources in every file layout, and the errors of invalid ones."""

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmmamba_cli.checkpoint.tensor_source import TensorSource, open_source
from mmmamba_cli.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.bias": torch.randn(5).to(torch.bfloat16),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False, True]),
    "none": torch.empty(0, 3),
}
INDEX = "model.safetensors.index.json"


def assert_holds(source: TensorSource, tensors: dict[str, torch.Tensor] = TENSORS) -> None:
    assert sorted(source.names) == sorted(tensors)
    for name, tensor in tensors.items():
        info = source.info(name)
        assert (info.dtype, info.shape, info.nbytes) == (
            tensor.dtype,
            tuple(tensor.shape),
            tensor.nbytes,
        )
        read = source.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def sharded(folder: Path, suffix: str = ".safetensors") -> Path:
    names = list(TENSORS)
    parts = {"1-of-2": names[:2], "2-of-2": names[2:]}
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    weight_map = {}
    for part, members in parts.items():
        file = f"{stem}-{part}{suffix}"
        state = {name: TENSORS[name] for name in members}
        save_file(state, folder / file) if stem == "model" else torch.save(state, folder / file)
        weight_map |= dict.fromkeys(members, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return folder


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


def refused(path: Path | str, *parts: str) -> None:
    """Assert that opening fails with a message that has all parts."""
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in {caught.value}"
    assert "\n" not in str(caught.value)


def test_safetensors_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    with open_source(tmp_path / "x.safetensors") as source:
        assert_holds(source)
        assert source.kind == "safetensors"
        assert source.files == (tmp_path / "x.safetensors",)


def test_safetensors_folder(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with open_source(str(tmp_path)) as source:
        assert_holds(source)


def test_sharded_safetensors_folder(tmp_path: Path) -> None:
    with open_source(sharded(tmp_path)) as source:
        assert_holds(source)
        assert [file.name for file in source.files] == [
            "model-1-of-2.safetensors",
            "model-2-of-2.safetensors",
        ]
    assert_holds(open_source(tmp_path / INDEX))


def test_bin_folders(tmp_path: Path) -> None:
    single, parts = tmp_path / "single", tmp_path / "parts"
    single.mkdir()
    parts.mkdir()
    torch.save(TENSORS, single / "pytorch_model.bin")
    for folder in (single, sharded(parts, ".bin")):
        with open_source(folder) as source:
            assert_holds(source)
            assert source.kind == "pickle"


def test_safetensors_wins_over_bin(tmp_path: Path) -> None:
    torch.save({"old": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert_holds(open_source(sharded(tmp_path)))


def test_shards_may_be_links_out_of_the_folder(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    sharded(folder)
    for shard in folder.glob("*.safetensors"):
        shard.rename(blobs / shard.stem)
        shard.symlink_to(blobs / shard.stem)
    assert_holds(open_source(folder))


def test_names_come_in_the_order_of_the_data(tmp_path: Path) -> None:
    header = {
        "second": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]},
        "first": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    source = open_source(raw_file(tmp_path / "x.safetensors", header, b"\1\2"))
    assert source.names == ("first", "second")
    assert [int(source.read(name)) for name in source.names] == [1, 2]


def test_unaligned_tensors(tmp_path: Path) -> None:
    header = {
        "flag": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]},
        "value": {"dtype": "F64", "shape": [1, 2], "data_offsets": [3, 19]},
    }
    path = raw_file(tmp_path / "x.safetensors", header, b"\1\0\1" + struct.pack("<2d", 1.5, -2))
    value = open_source(path).read("value")
    assert value.tolist() == [[1.5, -2.0]]
    assert value.data_ptr() % 8 == 0


def test_tensors_outlive_the_source_and_never_reach_the_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    with open_source(tmp_path / "x.safetensors") as source:
        tensor = source.read("a.weight")
    with pytest.raises(KeyError):
        source.read("a.weight")
    tensor.add_(1)
    assert torch.equal(tensor, TENSORS["a.weight"] + 1)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a.weight"], TENSORS["a.weight"])


def anonymous_bytes() -> int:
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_reading_allocates_no_memory(tmp_path: Path, name: str) -> None:
    tensors = {f"t{i}": torch.ones(4 << 20) for i in range(6)}  # 96 MiB
    save_file(tensors, tmp_path / name) if name.endswith("s") else torch.save(
        tensors, tmp_path / name
    )
    del tensors
    before = anonymous_bytes()
    with open_source(tmp_path / name) as source:
        held = [source.read(tensor) for tensor in source.names]
        assert sum(float(tensor.sum()) for tensor in held) == 6 * (4 << 20)
        assert anonymous_bytes() - before < 16 << 20


def test_content_hash_is_of_the_content_only(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    torch.save({"state_dict": TENSORS}, tmp_path / "x.ckpt")
    seen: list[int] = []
    whole = open_source(tmp_path / "x.safetensors").content_hash(seen.append)
    assert sum(seen) == sum(tensor.nbytes for tensor in TENSORS.values())
    assert open_source(tmp_path / "x.ckpt").content_hash() == whole
    assert open_source(sharded(tmp_path)).content_hash() == whole
    save_file({**TENSORS, "count": torch.tensor(8)}, tmp_path / "x.safetensors")
    assert open_source(tmp_path / "x.safetensors").content_hash() != whole


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "gone.ckpt", "gone.ckpt does not exist")
    refused("x" * 5000, "cannot be read")


def test_folder_without_weights(tmp_path: Path) -> None:
    refused(tmp_path, "holds no checkpoint", "model.safetensors.index.json", "pytorch_model.bin")


def test_several_files_without_an_index(tmp_path: Path) -> None:
    for shard in ("model-1-of-2.safetensors", "model-2-of-2.safetensors"):
        save_file({shard: torch.zeros(1)}, tmp_path / shard)
    refused(tmp_path, "model-1-of-2.safetensors, model-2-of-2.safetensors and no index")


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "x.gguf", "unknown kind", ".safetensors", ".ckpt")


def test_a_named_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path, "not a regular file")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA = struct.pack("<2f", 1, 2)
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "a few bytes": (b"abc", "ends within its first 8 bytes"),
    "header longer than file": (struct.pack("<Q", 5000) + b"{}", "ends within its header"),
    "header beyond the limit": (struct.pack("<Q", 1 << 62) + b"{}", "4611686018427387904 bytes"),
    "no JSON": (struct.pack("<Q", 4) + b"abcd", "not valid JSON"),
    "no UTF-8": (struct.pack("<Q", 4) + b'{"\xff"', "not valid JSON"),
    "no table": (struct.pack("<Q", 2) + b"[]", "not a table"),
    "deep": (struct.pack("<Q", 100_000) + b"[" * 100_000, "not valid JSON"),
    "no tensors": (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
}


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_file_that_is_no_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors", "x.safetensors", message)


BAD_HEADERS: dict[str, tuple[Any, str]] = {
    "cut off": ({"a": {**ENTRY, "shape": [4], "data_offsets": [0, 16]}}, "it was cut off"),
    "appended": ({"a": {**ENTRY, "shape": [1], "data_offsets": [0, 4]}}, "something was appended"),
    "overlap": (
        {"a": ENTRY, "b": {**ENTRY, "shape": [1], "data_offsets": [4, 8]}},
        "overlap or leave a gap",
    ),
    "gap": ({"b": {**ENTRY, "shape": [1], "data_offsets": [4, 8]}}, "overlap or leave a gap"),
    "backwards": ({"a": {**ENTRY, "data_offsets": [8, 0]}}, "span -8 bytes"),
    "beyond": ({"a": {**ENTRY, "data_offsets": [0, 1 << 70]}}, "not two whole numbers"),
    "negative": ({"a": {**ENTRY, "shape": [-2]}}, "shape [-2]"),
    "fraction": ({"a": {**ENTRY, "shape": [2.0]}}, "shape [2.0]"),
    "flag": ({"a": {**ENTRY, "shape": [True, 2]}}, "shape [True, 2]"),
    "wrong size": ({"a": {**ENTRY, "shape": [3]}}, "need 12"),
    "vast": ({"a": {**ENTRY, "shape": [0, 1 << 62, 4], "data_offsets": [0, 0]}}, "is too large"),
    "many dimensions": ({"a": {**ENTRY, "shape": [1] * 65}}, "at most 64"),
    "unknown dtype": ({"a": {**ENTRY, "dtype": "F33"}}, "unknown dtype 'F33', known are F64"),
    "dtype no text": ({"a": {**ENTRY, "dtype": ["F32"]}}, "unknown dtype"),
    "nothing": ({"a": None}, "expected dtype, shape and data_offsets"),
    "more": ({"a": {**ENTRY, "more": 1}}, "nothing else"),
    "metadata": ({"__metadata__": {"a": 1}, "a": ENTRY}, "metadata that is not text"),
    "surrogate": ({"\ud800": ENTRY}, "its name is not UTF-8"),
    "twice": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32"}}',
        "names 'a' more than once",
    ),
    "not a number": (b'{"a": NaN}', "not valid JSON"),
}


@pytest.mark.parametrize("header, message", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_bad_header(tmp_path: Path, header: Any, message: str) -> None:
    refused(raw_file(tmp_path / "x.safetensors", header, DATA), "x.safetensors", message)


def test_good_header_beside_the_bad_ones(tmp_path: Path) -> None:
    source = open_source(raw_file(tmp_path / "x.safetensors", {"a": ENTRY}, DATA))
    assert source.read("a").tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 3}}', "not all names"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "names 'a' more than once"),
    ],
)
def test_broken_index(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, INDEX, message)


def test_index_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(200_000_000)
    refused(tmp_path, "larger than 100000000 bytes")


def test_index_names_a_missing_shard(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-2-of-2.safetensors").unlink()
    refused(tmp_path, "shards that are missing: 'model-2-of-2.safetensors'")


@pytest.mark.parametrize("shard", ["", ".", "x" * 400, "\ud800"])
def test_index_names_a_shard_that_is_no_file(tmp_path: Path, shard: str) -> None:
    edit_index(sharded(tmp_path), lambda index: index["weight_map"].update(count=shard))
    refused(tmp_path, "shards that are missing")


@pytest.mark.parametrize(
    "shard",
    [
        "../other/model.safetensors",
        "a/../../x",
        "/etc/passwd",
        "..\\x",
        "C:\\x",
        "\\\\h\\x",
        "a\0b",
    ],
)
def test_index_names_a_path_outside(tmp_path: Path, shard: str) -> None:
    edit_index(sharded(tmp_path), lambda index: index["weight_map"].update(count=shard))
    refused(tmp_path, "outside its folder", repr(shard))


def test_path_outside_is_refused_even_if_it_would_serve(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (sharded(folder) / "model-2-of-2.safetensors").rename(tmp_path / "shard.safetensors")

    def lead_out(index: dict[str, Any]) -> None:
        for name in list(TENSORS)[2:]:
            index["weight_map"][name] = "../shard.safetensors"

    edit_index(folder, lead_out)
    refused(folder, "outside its folder")


def test_tensor_missing_from_its_shard(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    edit_index(index, lambda i: i["weight_map"].update(ghost="model-1-of-2.safetensors"))
    refused(tmp_path, "not in their shards: 'ghost' in 'model-1-of-2.safetensors'")


def test_tensor_in_another_shard_than_named(tmp_path: Path) -> None:
    edit_index(
        sharded(tmp_path), lambda i: i["weight_map"].update(count="model-1-of-2.safetensors")
    )
    refused(tmp_path, "'count' in 'model-1-of-2.safetensors'")


def test_tensor_the_index_does_not_name(tmp_path: Path) -> None:
    edit_index(sharded(tmp_path), lambda index: index["weight_map"].pop("count"))
    refused(tmp_path, "does not name 1 tensors that its shards hold: 'count'")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    save_file({**TENSORS}, sharded(tmp_path) / "model-2-of-2.safetensors")
    refused(tmp_path, "model-2-of-2.safetensors and model-1-of-2.safetensors both hold", "'a.bias'")


def test_at_most_ten_names_are_given(tmp_path: Path) -> None:
    ghosts = {f"ghost{i}": "model-1-of-2.safetensors" for i in range(25)}
    edit_index(sharded(tmp_path), lambda index: index["weight_map"].update(ghosts))
    refused(tmp_path, "'ghost9' in 'model-1-of-2.safetensors' and 15 more")


def test_mixed_kinds(tmp_path: Path) -> None:
    torch.save({"extra": torch.zeros(1)}, tmp_path / "more.bin")
    edit_index(sharded(tmp_path), lambda index: index["weight_map"].update(extra="more.bin"))
    refused(tmp_path, "mixes safetensors and PyTorch files")
