"""Corrupted weights: safetensors, PyTorch files, shard indexes, GGUF."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from case import Case, numbers, outcome
from hostile_pickles import bad_state, lying_zip
from materials import Materials
from mutations import JUNK, spoil_bytes, spoil_json
from safetensors.torch import load_file, save_file

from mmmamba_cli.runs import Run

CaseOf = Callable[[str, int], Case]
DTYPES = ("F64", "F32", "BF16", "I64", "I8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "", None, [])
SHARDS = (
    "../model-00001-of-00002.safetensors",
    "/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "C:\\model.safetensors",
    "..\\model.safetensors",
    ".",
    "",
    "gone.safetensors",
    "a\0b.safetensors",
    "\ud800.safetensors",
    "x" * 400 + ".safetensors",
    "model.safetensors.index.json",
    "config.json",
    None,
    3,
    ["model-00001-of-00002.safetensors"],
)


def seeded(case: Case, checkpoint: Path, name: str = "run") -> str | None:
    """Hash of the seeded student, or None if the checkpoint was refused."""
    run = case.home / name
    done = case.command("seed", checkpoint, "--run", run, "--no-report", "--json")
    if done.code:
        assert not run.exists()
        return None
    Run(run).verify_product("seed")
    return str(outcome(done)["product"]["content_hash"])


@pytest.fixture(scope="session")
def expected(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Hash of the student of the uncorrupted teacher."""
    found = seeded(Case("control", 0, tmp_path_factory.mktemp("control")), materials.hovle)
    assert found is not None
    return found


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def spoil_header(rng: random.Random, content: bytes, done: list[str]) -> bytes:
    """Change one header entry: offset, size, dtype, shape or name."""
    header, data = split(content)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.sample(names, 2)
    entry = header[name]
    kind = rng.choice(
        ("offsets", "overlap", "dtype", "shape", "drop", "twice", "rename", "metadata", "extra")
    )
    done.append(f"{kind} of {name}")
    if kind == "offsets":
        entry["data_offsets"][rng.randrange(2)] = rng.choice(JUNK)
    elif kind == "overlap":
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == "shape":
        entry["shape"] = rng.choice(
            ([], [0], [-1], [2**62, 4], [1] * 70, entry["shape"][::-1], [1.0], None, "3", {})
        )
    elif kind == "drop":
        del header[name]
    elif kind == "rename":
        header[rng.choice((f"{name}.", "", "\ud800", "\x1b[2J", "x" * 9000))] = header.pop(name)
    elif kind == "metadata":
        header["__metadata__"] = rng.choice(JUNK)
    elif kind == "extra":
        data += b"\0" * rng.choice((1, 8, 4096))
    text = json.dumps(header)
    if kind == "twice":
        text = text.replace("{", f'{{"{name}": {json.dumps(entry)}, ', 1)
    return joined(text.encode(), data)


def spoil_length(rng: random.Random, content: bytes, done: list[str]) -> bytes:
    length = rng.choice((0, 1, 7, 2**20, 99_999_999, 10**8, 2**31, 2**63, 2**64 - 1))
    done.append(f"header of {length} bytes")
    return struct.pack("<Q", length) + content[8:]


def spoil_values(rng: random.Random, content: bytes, done: list[str]) -> bytes:
    header, data = split(content)
    name = rng.choice([name for name in header if name != "__metadata__"])
    at = header[name]["data_offsets"][0]
    done.append(f"no number in {name}")
    bad = struct.pack("<f", rng.choice((float("nan"), float("inf"), float("-inf"))))
    return joined(json.dumps(header).encode(), data[:at] + bad + data[at + 4 :])


def spoil_any(rng: random.Random, content: bytes, done: list[str]) -> bytes:
    return spoil_bytes(rng, content, done, near=400)


SPOILERS = (spoil_header, spoil_header, spoil_header, spoil_length, spoil_values, spoil_any)


@pytest.mark.parametrize("number", numbers(50))
def test_safetensors(case_of: CaseOf, materials: Materials, number: int) -> None:
    case = case_of("safetensors", number)
    folder = case.copy(materials.hovle)
    file = folder / "model.safetensors"
    spoil = SPOILERS[number % len(SPOILERS)]
    file.write_bytes(spoil(case.rng, file.read_bytes(), case.done))
    seeded(case, folder)


@pytest.mark.parametrize("number", numbers(50))
def test_pytorch_files(case_of: CaseOf, materials: Materials, number: int) -> None:
    case = case_of("pytorch", number)
    folder = case.copy(materials.hovle)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    good = io.BytesIO()
    torch.save(state, good)
    file = folder / case.rng.choice(("pytorch_model.bin", "hovle.ckpt", "hovle.pt", "hovle.pth"))
    if number % 5 == 3:
        content = lying_zip(case.rng, good.getvalue(), case.done)
    elif number % 5 == 4:
        content = spoil_bytes(case.rng, good.getvalue(), case.done, near=2000)
    else:
        content = bad_state(case.rng, state, case.canary, case.done)
    file.write_bytes(content)
    seeded(case, folder if file.suffix == ".bin" else file)


def write_shards(folder: Path, parts: int) -> dict[str, Any]:
    """Split the file of a folder into shards with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(state), {}
    for part in range(parts):
        shard = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        save_file({name: state[name] for name in names[part::parts]}, folder / shard)
        weight_map |= dict.fromkeys(names[part::parts], shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


@pytest.mark.parametrize("number", numbers(30))
def test_indexes(case_of: CaseOf, materials: Materials, number: int) -> None:
    case = case_of("index", number)
    folder = case.copy(materials.hovle)
    index = write_shards(folder, 2)
    if number % 2:
        name = case.rng.choice([*index["weight_map"], "ghost"])
        index["weight_map"][name] = case.rng.choice(SHARDS)
        case.done.append(f"{name} in {index['weight_map'][name]!r:.60}")
        text = json.dumps(index).encode()
    else:
        text = spoil_json(case.rng, index, case.done)
    (folder / "model.safetensors.index.json").write_bytes(text)
    seeded(case, folder)


def _gguf_field(key: str, value: bytes, kind: int) -> bytes:
    name = key.encode()
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def gguf_bytes(rng: random.Random, done: list[str]) -> bytes:
    """A malformed GGUF header."""
    arch = rng.choice((b"llama", b"qwen2", b"mamba", b"", b"\xff\xfe", b"llama\x1b[2J"))
    kind = rng.choice(("counts", "string", "array", "version", "magic", "tensor", "cut"))
    done.append(f"gguf {kind} {arch!r}")
    text = _gguf_field("general.architecture", struct.pack("<Q", len(arch)) + arch, 8)
    tensors, fields = 0, 1
    body = text
    if kind == "counts":
        tensors, fields = rng.choice(((2**63, 1), (0, 2**63), (1, 1), (10**9, 1), (0, 10**9)))
    elif kind == "string":
        body += _gguf_field("llama.x", struct.pack("<Q", rng.choice((2**40, 2**63))) + b"x", 8)
        fields = 2
    elif kind == "array":
        inner = struct.pack("<IQ", rng.choice((4, 9, 77)), rng.choice((10**9, 2**62)))
        body += _gguf_field("llama.y", inner, 9)
        fields = 2
    elif kind == "tensor":
        name = struct.pack("<Q", 1) + b"t"
        body += name + struct.pack("<IQQIQ", 2, 2**40, 2**40, rng.choice((0, 2, 99)), 0)
        tensors = 1
    version = rng.choice((0, 1, 99, 2**31)) if kind == "version" else 3
    magic = rng.choice((b"GGML", b"FUGG", b"\0\0\0\0")) if kind == "magic" else b"GGUF"
    content = magic + struct.pack("<IQQ", version, tensors, fields) + body
    return content[: rng.randrange(len(content))] if kind == "cut" else content


@pytest.mark.parametrize("number", numbers(20))
def test_gguf(case_of: CaseOf, number: int) -> None:
    case = case_of("gguf", number)
    file = case.home / "model.gguf"
    file.write_bytes(gguf_bytes(case.rng, case.done))
    assert seeded(case, file) is None


@pytest.mark.skipif(importlib.util.find_spec("gguf") is not None, reason="gguf is installed")
def test_gguf_without_its_packages(case_of: CaseOf) -> None:
    case = case_of("gguf-absent", 0)
    (case.home / "model.gguf").write_bytes(b"GGUF\x03" + bytes(99))
    assert "pip install" in case.command("seed", case.home / "model.gguf").err


@pytest.mark.parametrize("number", numbers(14))
def test_the_same_weights(
    case_of: CaseOf, materials: Materials, expected: str, number: int
) -> None:
    """Other shards, order, file formats and prefixes, and unused files give the same weights."""
    case = case_of("same-weights", number)
    folder = case.copy(materials.hovle)
    file = folder / "model.safetensors"
    state = load_file(file)
    checkpoint = folder
    if number % 7 < 3:
        write_shards(folder, number % 7 + 1)
        (folder / "old.safetensors").write_bytes(b"nobody reads this")
    elif number % 7 == 3:
        header, data = split(file.read_bytes())
        names = list(header)
        case.rng.shuffle(names)
        text = json.dumps({name: header[name] for name in names}, indent=case.rng.randrange(3))
        file.write_bytes(joined(text.encode() + b" " * case.rng.randrange(9), data))
    else:
        file.unlink()
        wrap = [lambda s: s, lambda s: {"state_dict": s, "epoch": 1}, with_prefix][number % 7 - 4]
        checkpoint = folder / ("pytorch_model.bin" if number % 2 else "hovle.ckpt")
        names = list(state)
        case.rng.shuffle(names)
        torch.save(wrap({name: state[name] for name in names}), checkpoint)
    case.done.append(f"way {number % 7}")
    assert seeded(case, checkpoint) == expected


def with_prefix(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"model": {f"module.{name}": tensor for name, tensor in state.items()}}
