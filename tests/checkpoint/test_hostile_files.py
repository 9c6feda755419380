"""Damaged and hostile checkpoints either load or raise `CheckpointError`.

No other exception, no hang, no allocation larger than the file. A mutated file that loads must load
equally with the safetensors library.
"""

import io
import json
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load as library_load
from safetensors.torch import save, save_file

from mmmamba_cli.checkpoint.tensor_io import check_finite
from mmmamba_cli.checkpoint.tensor_source import open_source
from mmmamba_cli.errors import CheckpointError

PeakGrowth = Callable[[int], AbstractContextManager[None]]
Mutation = Callable[[bytes], bytes]

TENSORS = {
    "layer.0.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "layer.0.bias": torch.ones(3, dtype=torch.bfloat16),
    "steps": torch.tensor(9),
    "mask": torch.tensor([True, False]),
}
# A deadline of a minute per example detects hangs; a busy disk may take seconds to write a file.
HOSTILE = settings(
    deadline=60_000,
    max_examples=250,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MEMORY = 150 << 20


@st.composite
def byte_mutation(draw: st.DrawFn) -> Mutation:
    """Flip a bit, set a byte, truncate, cut, insert or repeat; often near the start."""
    kind = draw(st.sampled_from(["flip", "set", "cut off", "cut out", "insert", "repeat"]))
    place = draw(st.one_of(st.integers(0, 400), st.integers(0, 5000)))
    value, length = draw(st.integers(0, 255)), draw(st.integers(1, 40))

    def mutate(content: bytes) -> bytes:
        at = place % max(1, len(content))
        before, here, after = content[:at], content[at : at + 1], content[at + 1 :]
        if kind == "flip":
            return before + bytes(byte ^ (1 << value % 8) for byte in here) + after
        if kind == "set":
            return before + bytes([value]) + after
        if kind == "cut off":
            return before
        if kind == "cut out":
            return before + content[at + length :]
        inserted = bytes([value]) * length if kind == "insert" else content[at : at + length]
        return before + inserted + content[at:]

    return mutate


byte_mutations = st.lists(byte_mutation(), max_size=3)


def mutated(content: bytes, mutations: list[Mutation]) -> bytes:
    for mutation in mutations:
        content = mutation(content)
    return content


def read_all(path: Path) -> dict[str, torch.Tensor]:
    with open_source(path) as source:
        tensors = {name: source.read(name) for name in source.names}
        for name, tensor in tensors.items():
            info = source.info(name)
            assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert len(source.content_hash()) == 64
    return tensors


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape)
        assert torch.equal(bits(tensor), bits(theirs[name]))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def judge(path: Path, content: bytes, control: bool) -> None:
    """Read `content` as a file; what loads must equal what the library reads."""
    path.write_bytes(content)
    try:
        ours = read_all(path)
    except CheckpointError as error:
        assert not control, f"a good file was refused: {error}"
        return
    try:
        theirs = library_load(content)
    except SafetensorError as error:
        raise AssertionError("accepted what the library refuses") from error
    assert_same(ours, theirs)


@HOSTILE
@given(mutations=byte_mutations)
def test_mutated_safetensors(
    tmp_path: Path, peak_growth: PeakGrowth, mutations: list[Mutation]
) -> None:
    content = save(TENSORS)
    with peak_growth(MEMORY):
        judge(tmp_path / "x.safetensors", mutated(content, mutations), control=not mutations)


numbers = st.one_of(
    st.integers(0, 40),
    st.sampled_from([-1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**100, True, None, 1.5, "8"]),
)
shapes = st.one_of(
    st.lists(numbers, max_size=4), st.sampled_from([[1] * 70, [0, 2**62], "3", None])
)
dtypes = st.sampled_from(
    ["F32", "BF16", "I64", "BOOL", "U8", "F4", "f32", "", None, 3, ["F32"], {}]
)


@st.composite
def header_edit(draw: st.DrawFn) -> Callable[[dict[str, Any]], None]:
    """Change one entry of a parsed header."""
    name = draw(st.sampled_from([*TENSORS, "__metadata__", "new", "", "\ud800", "a\0b"]))
    kind = draw(st.sampled_from(["dtype", "shape", "offsets", "drop", "key", "replace", "copy"]))
    shape, dtype = draw(shapes), draw(dtypes)
    offsets = draw(st.lists(numbers, max_size=3))

    def edit(header: dict[str, Any]) -> None:
        entry = header.get(name)
        if kind == "drop":
            header.pop(name, None)
        elif kind == "copy":
            header[name] = dict(header.get("steps") or {})
        elif kind == "replace" or not isinstance(entry, dict):
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        elif kind == "key":
            entry.pop("shape", None)
        else:
            value = {"dtype": dtype, "shape": shape, "offsets": offsets}[kind]
            entry["data_offsets" if kind == "offsets" else kind] = value

    return edit


@HOSTILE
@given(edits=st.lists(header_edit(), max_size=2), data=st.binary(max_size=4))
def test_edited_safetensors_headers(
    tmp_path: Path,
    peak_growth: PeakGrowth,
    edits: list[Callable[[dict[str, Any]], None]],
    data: bytes,
) -> None:
    content = save(TENSORS, {"format": "pt"})
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for edit in edits:
        edit(header)
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + content[8 + length :] + data
    with peak_growth(MEMORY):
        judge(tmp_path / "x.safetensors", content, control=not edits and not data)


@HOSTILE
@given(length=st.one_of(st.integers(0, 500), st.integers(0, 2**64 - 1)))
def test_any_header_length(tmp_path: Path, peak_growth: PeakGrowth, length: int) -> None:
    content = save(TENSORS)
    right = int.from_bytes(content[:8], "little")
    with peak_growth(MEMORY):
        judge(
            tmp_path / "x.safetensors",
            struct.pack("<Q", length) + content[8:],
            control=length == right,
        )


@HOSTILE
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)))
@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "model.safetensors.index.json"])
def test_anything_at_all(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        read_all(tmp_path / name)


def write_shards(folder: Path) -> dict[str, Any]:
    """Write two shards; return their index."""
    names = list(TENSORS)
    weight_map = {}
    for shard, members in (("a.safetensors", names[:2]), ("b.safetensors", names[2:])):
        save_file({name: TENSORS[name] for name in members}, folder / shard)
        weight_map |= dict.fromkeys(members, shard)
    return {"metadata": {"total_size": 0}, "weight_map": weight_map}


def judge_index(folder: Path, text: bytes, control: bool) -> None:
    """An index is refused or loads exactly the tensors in the shards."""
    (folder / "model.safetensors.index.json").write_bytes(text)
    try:
        assert_same(read_all(folder), TENSORS)
    except CheckpointError as error:
        assert not control, f"a good index was refused: {error}"


@HOSTILE
@given(mutations=byte_mutations)
def test_mutated_indexes(tmp_path: Path, mutations: list[Mutation]) -> None:
    text = json.dumps(write_shards(tmp_path)).encode()
    judge_index(tmp_path, mutated(text, mutations), control=not mutations)


names = ["a.safetensors", "b.safetensors", "./a.safetensors", "c.safetensors", "../a.safetensors"]
files = st.sampled_from(
    [*names, "/dev/zero", "/etc/passwd", "", ".", "..", "a\0", "\ud800", "x" * 300, None, 3, [], {}]
)


@HOSTILE
@given(
    edits=st.dictionaries(st.sampled_from([*TENSORS, "ghost", ""]), files, max_size=2),
    dropped=st.lists(st.sampled_from([*TENSORS, "metadata", "weight_map"]), max_size=1),
)
def test_edited_indexes(tmp_path: Path, edits: dict[str, Any], dropped: list[str]) -> None:
    index = write_shards(tmp_path)
    index["weight_map"] |= edits
    for name in dropped:
        index["weight_map"].pop(name, None)
        index.pop(name, None)
    control = not edits and "weight_map" in index and len(index["weight_map"]) == len(TENSORS)
    judge_index(tmp_path, json.dumps(index).encode(), control)


def pickled(**options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"epoch": 1, "state_dict": TENSORS}, buffer, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@HOSTILE
@given(mutations=byte_mutations)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_mutated_pickles(
    tmp_path: Path, peak_growth: PeakGrowth, new: bool, mutations: list[Mutation]
) -> None:
    path = tmp_path / "x.ckpt"
    content = mutated(pickled(_use_new_zipfile_serialization=new), mutations)
    path.write_bytes(content)
    with peak_growth(MEMORY):
        try:
            tensors = read_all(path)
        except CheckpointError as error:
            assert mutations, f"a good file was refused: {error}"
            return
        # A changed value in a pickle cannot be detected; sizes must still fit.
        assert all(tensor.nbytes <= len(content) for tensor in tensors.values())
        if not mutations:
            assert_same(tensors, TENSORS)


@HOSTILE
@given(mutations=byte_mutations)
def test_mutated_values_are_finite_or_named(tmp_path: Path, mutations: list[Mutation]) -> None:
    (tmp_path / "x.safetensors").write_bytes(mutated(save(TENSORS), mutations))
    try:
        tensors = read_all(tmp_path / "x.safetensors")
    except CheckpointError:
        return
    for name, tensor in tensors.items():
        finite = bool(tensor.isfinite().all())
        try:
            check_finite(tensor, name)
        except CheckpointError as error:
            assert not finite
            assert repr(name) in str(error)
        else:
            assert finite
