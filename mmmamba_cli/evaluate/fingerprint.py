"""What answers depend on beside the model and the table: picture files, code and libraries.

Answers that are kept are taken only for the same of all three.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mmmamba_cli.evaluate.images import Picture
from mmmamba_cli.runs.manifest import package_versions

# The rooms of code that turn a row and a checkpoint into an answer.
ROOMS = ("checkpoint", "evaluate", "inference", "model", "ops", "processing")
# Code of `evaluate` behind the answers: it scores and shows them.
BEHIND = (
    "scoring",
    "bootstrap.py",
    "external_results.py",
    "predictions.py",
    "tables.py",
    "result.py",
)
# Pictures are decoded and resized by Pillow.
LIBRARIES = ("pillow", "tokenizers")
DIGITS = 16
READERS = 8


def answering_versions() -> dict[str, str]:
    """Versions of what asks and answers: mmmamba, Python and the libraries."""
    found = package_versions()
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def code_digest() -> str:
    """Changes with any source file that an answer depends on: prompts, processing, the model."""
    package = Path(__file__).resolve().parents[1]
    files = [*package.glob("*.py"), *(f for room in ROOMS for f in (package / room).rglob("*.py"))]
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(package).as_posix(), file) for file in files):
        room, _, rest = name.partition("/")
        if room == "evaluate" and rest.partition("/")[0] in BEHIND:
            continue
        digest.update(f"{name}\n".encode())
        digest.update(file_digest(file))
    return digest.hexdigest()[:DIGITS]


def pictures_digest(pictures: Iterable[Picture]) -> str | None:
    """Of the contents of all picture files, in their order; None if there are no files.

    Pictures in a table are left out: the table's own hash has them. A file that cannot be read
    counts as zeros; asking names it.
    """
    files = list(dict.fromkeys(one.file for one in pictures if one.file is not None))
    if not files:
        return None
    digest = hashlib.sha256()
    with ThreadPoolExecutor(READERS) as pool:
        for found in pool.map(file_digest, files):
            digest.update(found)
    return digest.hexdigest()[:DIGITS]


def file_digest(file: Path) -> bytes:
    """SHA-256 of a file; zeros if it cannot be read."""
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").digest()
    except OSError:
        return bytes(hashlib.sha256().digest_size)
