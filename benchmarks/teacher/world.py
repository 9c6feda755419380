"""Training world of the small teacher: the shipped atlas, further styles, training fonts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmmamba_evals.scenes.atlas import Atlas, merge_atlases, open_atlas
from mmmamba_evals.scenes.fonts import SEEN, fonts_of
from mmmamba_evals.scenes.shipped import shipped_atlas
from mmmamba_evals.scenes.world import World, make_world


def training_world(more: Sequence[Path] = ()) -> tuple[Atlas, World]:
    """The merged atlas of all training styles, and its world."""
    atlas = merge_atlases([shipped_atlas(), *(open_atlas(folder) for folder in more)])
    return atlas, make_world(atlas, fonts_of(SEEN))
