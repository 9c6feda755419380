"""The exported code is bundled once: it is the same for every export, and takes a second."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from mmmamba_cli.export import sidecar_files


@pytest.fixture(scope="session", autouse=True)
def bundled_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        bundle = functools.cache(sidecar_files.bundle_files)
        patch.setattr(sidecar_files, "bundle_files", bundle)
        yield
