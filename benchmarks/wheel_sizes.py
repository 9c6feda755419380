"""Sizes of the wheel and the source distribution by folder, and how small the models could be.

The shipped models are most of the wheel. Three lossless ways to store them are measured: deflate,
as a wheel does; deflate and LZMA of the high and low bytes of each 16-bit value apart; and each
tensor once that several models hold. Standard library only.

    python benchmarks/wheel_sizes.py dist/mmmamba-*.whl dist/mmmamba-*.tar.gz --out FILE
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import lzma
import platform
import struct
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MODELS = "mmmamba_evals/scenes/models/"
WEIGHTS = "model.safetensors"
DEPTH = 3


def folder_of(name: str) -> str:
    """The first folders of a path."""
    return "/".join(PurePosixPath(name).parts[:-1][:DEPTH]) or "."


def wheel_sizes(wheel: zipfile.ZipFile) -> dict[str, dict[str, int]]:
    """For each folder of the wheel: files, bytes, and bytes in the wheel."""
    counts: dict[str, Counter[str]] = {}
    for entry in wheel.infolist():
        row = counts.setdefault(folder_of(entry.filename), Counter())
        row.update(files=1, bytes=entry.file_size, in_wheel=entry.compress_size)
    ordered = sorted(counts.items(), key=lambda pair: -pair[1]["in_wheel"])
    return {name: dict(row) for name, row in ordered}


def sdist_sizes(file: Path) -> dict[str, dict[str, int]]:
    """For each top folder of the source distribution: files and bytes."""
    counts: dict[str, Counter[str]] = {}
    with tarfile.open(file) as archive:
        for entry in archive:
            if entry.isfile():
                _, *inner = PurePosixPath(entry.name).parts
                row = counts.setdefault(inner[0] if len(inner) > 1 else ".", Counter())
                row.update(files=1, bytes=entry.size)
    return {name: dict(row) for name, row in sorted(counts.items())}


def tensors(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the tensors of a safetensors file."""
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        yield name, raw[start:end]


def model_sizes(wheel: zipfile.ZipFile) -> dict[str, dict[str, int]]:
    """For each shipped model: bytes of its weights as they are and by each lossless way.

    `shared` counts the bytes of tensors that a model before it holds too, and `unused` those of
    tensors that no forward pass reads.
    """
    found: dict[str, dict[str, int]] = {}
    seen: set[bytes] = set()
    for name in sorted(wheel.namelist(), key=lambda name: "teacher" not in name):
        if not (name.startswith(MODELS) and name.endswith(WEIGHTS)):
            continue
        raw = wheel.read(name)
        shared = unused = 0
        for tensor, content in tensors(raw):
            digest = hashlib.sha256(content).digest()
            shared += len(content) if digest in seen else 0
            unused += len(content) if "unused" in tensor or "tok_embeddings" in tensor else 0
            seen.add(digest)
        halves = raw[::2], raw[1::2]
        found[PurePosixPath(name).parent.name] = {
            "bytes": len(raw),
            "deflate": len(zlib.compress(raw, 9)),
            "halves_deflate": sum(len(zlib.compress(half, 9)) for half in halves),
            "halves_lzma": sum(len(lzma.compress(half)) for half in halves),
            "shared": shared,
            "unused": unused,
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("sdist", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    chosen = parser.parse_args()
    with zipfile.ZipFile(chosen.wheel) as wheel:
        content = {
            "command": "python benchmarks/wheel_sizes.py WHEEL SDIST --out FILE",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "wheel": {"file": chosen.wheel.name, "bytes": chosen.wheel.stat().st_size},
            "sdist": {"file": chosen.sdist.name, "bytes": chosen.sdist.stat().st_size},
            "wheel_folders": wheel_sizes(wheel),
            "sdist_folders": sdist_sizes(chosen.sdist),
            "models": model_sizes(wheel),
        }
    chosen.out.write_text(json.dumps(content, indent=1) + "\n")
    for name, row in content["models"].items():
        print(name, row)
    print(f"wheel {content['wheel']['bytes']:,} bytes, sdist {content['sdist']['bytes']:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
