"""Digests of the code, library versions and picture files that answers depend on.

Cached answers are reused only if all three are unchanged.
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

# Packages whose code turns a row and a checkpoint into an answer.
DIGESTED_ROOMS = ("checkpoint", "evaluate", "inference", "model", "ops", "processing", "teachers")
# Code of `evaluate` that only scores and shows answers, and so is left out of the digest.
NOT_DIGESTED = (
    "scoring",
    "bootstrap.py",
    "external_results.py",
    "predictions.py",
    "tables.py",
    "result.py",
    "score_retention.py",
    "run_results.py",
)
# Pictures are decoded and resized by Pillow.
LIBRARIES = ("pillow", "tokenizers")
DIGEST_DIGITS = 16
HASH_THREADS = 8


def library_versions() -> dict[str, str]:
    """Versions of mmmamba, Python and the libraries that prompts and answers depend on."""
    found = package_versions()
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def code_digest() -> str:
    """A digest of all source files that an answer depends on: prompts, processing, the model."""
    package = Path(__file__).resolve().parents[1]
    files = [
        *package.glob("*.py"),
        *(f for room in DIGESTED_ROOMS for f in (package / room).rglob("*.py")),
    ]
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(package).as_posix(), file) for file in files):
        room, _, rest = name.partition("/")
        if room == "evaluate" and rest.partition("/")[0] in NOT_DIGESTED:
            continue
        digest.update(f"{name}\n".encode())
        digest.update(file_digest(file))
    return digest.hexdigest()[:DIGEST_DIGITS]


def pictures_digest(pictures: Iterable[Picture]) -> str | None:
    """A digest of the contents of all picture files, in order; None without files.

    Pictures inside a table are left out because the table's hash covers them. An unreadable file
    counts as zeros; inference names it.
    """
    files = list(dict.fromkeys(one.file for one in pictures if one.file is not None))
    if not files:
        return None
    digest = hashlib.sha256()
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        for found in pool.map(file_digest, files):
            digest.update(found)
    return digest.hexdigest()[:DIGEST_DIGITS]


def file_digest(file: Path) -> bytes:
    """SHA-256 of a file; zeros if it cannot be read."""
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").digest()
    except OSError:
        return bytes(hashlib.sha256().digest_size)
