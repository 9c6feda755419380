"""The shipped atlas and its world, opened once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from mmmamba_cli.plugins import load_reference

# Makes `mmmamba_evals` importable in a checkout.
load_reference("mmmamba_evals:suite_folder")

from mmmamba_evals.scenes import batch_renderer  # noqa: E402
from mmmamba_evals.scenes.atlas import Atlas  # noqa: E402
from mmmamba_evals.scenes.fonts import SEEN, fonts_of  # noqa: E402
from mmmamba_evals.scenes.shipped import shipped_atlas  # noqa: E402
from mmmamba_evals.scenes.world import World, make_world  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def words_drawn_once() -> Iterator[None]:
    """Renderers of the same fonts need the same thousands of masks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_renderer, "_fitted_mask", cache(batch_renderer._fitted_mask))
        yield


@pytest.fixture(scope="session")
def atlas() -> Atlas:
    return shipped_atlas()


@pytest.fixture(scope="session")
def world(atlas: Atlas) -> World:
    return make_world(atlas, fonts_of(SEEN))
