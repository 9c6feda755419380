"""Pixels of a micro batch of scenes: layouts stacked by a loader, drawn by the training process.

Every scene is drawn as cuts of SIDE x SIDE pixels, so that a large scene costs as much as that many
small ones; cuts with few things are drawn together. All random numbers come with the
layouts: the pixels of a scene do not depend on the batch around it. Legend: B cuts, N things of a
cut, P pictures, T tiles of a picture, S side of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.data import Drawing
from mmmamba_cli.processing import Tiling, choose_grid, count_tiles
from mmmamba_evals.scenes.augmentation import Alterations, Augmentation, blur
from mmmamba_evals.scenes.batch_renderer import BatchRenderer, SceneBatch, SceneEncoder, to_device
from mmmamba_evals.scenes.composition import SIDE
from mmmamba_evals.scenes.scene import Scene

# An altered thing reaches at most this far from its centre, in units of its size: half the diagonal
# of its box, stretched by 1.2.
REACH = 0.85
# Cuts without words and with at most this many things are drawn together, and all others: a small
# model's training waits for the host, and each group has its own launches.
FEW_THINGS = 4
# Cuts that are drawn at once; bounds the memory at about 1 GiB.
CUTS_ON_GPU, CUTS_ON_CPU = 256, 16
# The noise of a cut is a window of one field of this side: cheap, and the same in every run.
NOISE_SIDE, NOISE_SEED = 1024, 20_261_129


@dataclass(frozen=True)
class SceneLayout:
    """A scene, and the seed of its alterations."""

    scene: Scene
    seed: tuple[int, ...]


@dataclass
class Cuts:
    """Cuts that are drawn together.

    `factors` (B, N, 9) are hue, angle, stretch, saturation, contrast, brightness and tint of each
    thing, as in `Alterations`. `soft` (B, 3) has 1 for a blurred cut, and the corner of its window
    in the noise field. Both are None without augmentation.
    """

    layouts: SceneBatch
    factors: np.ndarray | None
    soft: np.ndarray | None

    def parts(self, size: int) -> Iterator[Cuts]:
        """The cuts in parts of at most `size`."""
        names = ("things", "hue", "keeps", "grounds", "words", "cuts")
        for start in range(0, len(self.layouts.hue), size):
            part = slice(start, start + size)
            arrays = {name: getattr(self.layouts, name)[part] for name in names}
            yield Cuts(
                replace(self.layouts, **arrays),
                None if self.factors is None else self.factors[part],
                None if self.soft is None else self.soft[part],
            )


@dataclass
class Pictures:
    """Pictures of `columns` x `rows` cuts.

    `cuts` (P, rows * columns): indices of the cuts of each picture, row by row. `tiles` (P, T):
    indices of its tiles in the pixels of the batch.
    """

    columns: int
    rows: int
    cuts: np.ndarray
    tiles: np.ndarray


@dataclass
class SceneLayouts:
    """All pictures of a micro batch; cuts are counted through `cuts` in order."""

    cuts: tuple[Cuts, ...]
    pictures: tuple[Pictures, ...]
    num_tiles: int
    tiling: Tiling


@dataclass(frozen=True)
class _Cut:
    """One cut; `place` is x, y in the scene and the scene's width."""

    scene: Scene
    place: tuple[int, int, int]
    factors: np.ndarray | None
    soft: tuple[int, int, int]

    @property
    def is_sparse(self) -> bool:
        return len(self.scene.things) <= FEW_THINGS and not self.scene.letterings


class ScenePainter:
    """Stacks and draws scenes of one atlas; `how` is None for unaltered scenes."""

    def __init__(self, encoder: SceneEncoder, how: Augmentation | None):
        self.encoder = encoder
        self.how = how
        self._renderers: dict[torch.device, tuple[BatchRenderer, Tensor]] = {}

    def __getstate__(self) -> dict[str, object]:
        # Textures on a device stay in their process.
        return {**self.__dict__, "_renderers": {}}

    def stack(self, drawings: Sequence[Drawing], tiling: Tiling) -> SceneLayouts:
        """Arrays of all scenes (sides are multiples of SIDE), and their places in the batch."""
        cuts: list[_Cut] = []
        # The first cut and the first tile of each picture, by its size in cuts.
        starts: dict[tuple[int, int], list[tuple[int, int]]] = {}
        num_tiles = 0
        for drawing in drawings:
            size = (drawing.width // SIDE, drawing.height // SIDE)
            starts.setdefault(size, []).append((len(cuts), num_tiles))
            cuts += self._cut(drawing.layout)
            num_tiles += count_tiles(drawing.width, drawing.height, tiling)
        groups: dict[bool, list[int]] = {}
        for number, cut in enumerate(cuts):
            groups.setdefault(cut.is_sparse, []).append(number)
        order = [number for members in groups.values() for number in members]
        place = np.empty(len(cuts), np.int64)
        place[order] = np.arange(len(cuts))
        return SceneLayouts(
            cuts=tuple(self._encode([cuts[i] for i in members]) for members in groups.values()),
            pictures=tuple(
                _pictures(size, np.array(first), place, tiling) for size, first in starts.items()
            ),
            num_tiles=num_tiles,
            tiling=tiling,
        )

    def to_pixels(self, layouts: SceneLayouts, device: torch.device) -> Tensor:
        """Draw all tiles (N, 3, S, S) uint8 on a device, cut as the processor cuts pictures."""
        renderer, noise = self._renderer(device)
        most = CUTS_ON_GPU if device.type == "cuda" else CUTS_ON_CPU
        drawn = [_draw(renderer, part, noise) for cuts in layouts.cuts for part in cuts.parts(most)]
        cuts = torch.cat(drawn)
        side = layouts.tiling.image_size
        pixels = cuts.new_empty(layouts.num_tiles, 3, side, side)
        for pictures in layouts.pictures:
            chosen = cuts[to_device(pictures.cuts, device)]
            tiles = _tiles(chosen, pictures.columns, pictures.rows, layouts.tiling)
            pixels[to_device(pictures.tiles, device)] = tiles
        return pixels

    def _renderer(self, device: torch.device) -> tuple[BatchRenderer, Tensor]:
        """Textures, and a noise field (3, NOISE_SIDE, NOISE_SIDE), made at the first use."""
        if device not in self._renderers:
            # Drawn on the CPU: generators of devices give other numbers.
            field = torch.randn(
                3, NOISE_SIDE, NOISE_SIDE, generator=torch.Generator().manual_seed(NOISE_SEED)
            )
            scale = 0.0 if self.how is None else self.how.noise
            self._renderers[device] = (
                BatchRenderer(self.encoder, device),
                (field * scale).to(device),
            )
        return self._renderers[device]

    def _cut(self, layout: SceneLayout) -> list[_Cut]:
        """The cuts of a scene, row by row, each with the things and words that reach into it."""
        scene = layout.scene
        factors, blurred = None, 0
        rng = np.random.default_rng(layout.seed)
        if self.how is not None:
            factors = _draw_factors(rng, self.how, len(scene.things))
            blurred = int(rng.random() < self.how.blur)
        cuts = []
        for top in range(0, scene.height, SIDE):
            for left in range(0, scene.width, SIDE):
                x, y = rng.integers(0, NOISE_SIDE - SIDE, 2)
                chosen, part = _cut_scene(scene, left, top)
                cuts.append(
                    _Cut(
                        part,
                        (left, top, scene.width),
                        None if factors is None else factors[chosen],
                        (blurred, int(x), int(y)),
                    )
                )
        return cuts

    def _encode(self, cuts: Sequence[_Cut]) -> Cuts:
        things = max(1, *(len(cut.scene.things) for cut in cuts))
        layouts = self.encoder.layouts([cut.scene for cut in cuts], things)
        layouts.cuts = np.array([cut.place for cut in cuts], np.float32)
        if self.how is None:
            return Cuts(layouts, None, None)
        factors = np.zeros((len(cuts), things, 9), np.float32)
        factors[..., 2:6] = 1
        for number, cut in enumerate(cuts):
            if cut.factors is not None:
                factors[number, : len(cut.factors)] = cut.factors
        return Cuts(layouts, factors, np.array([cut.soft for cut in cuts], np.int64))


def _draw_factors(rng: np.random.Generator, how: Augmentation, count: int) -> np.ndarray:
    """Factors (count, 9) of things, distributed as those of `draw_alterations`."""
    logs = [math.log1p(m) for m in (how.aspect, how.saturation, how.contrast, how.brightness)]
    largest = np.array((how.hue, math.radians(how.angle), *logs, *(how.tint,) * 3))
    factors = (2 * rng.random((count, 9)) - 1) * largest
    factors[:, 2:6] = np.exp(factors[:, 2:6])
    return factors


def _cut_scene(scene: Scene, left: int, top: int) -> tuple[list[int], Scene]:
    """Indices of the things in a cut, and the cut as a scene of SIDE x SIDE pixels."""
    if (scene.width, scene.height) == (SIDE, SIDE):
        return list(range(len(scene.things))), scene

    def reaches(x: float, y: float, wide: float, high: float) -> bool:
        return -wide < x - left < SIDE + wide and -high < y - top < SIDE + high

    chosen = [
        number
        for number, thing in enumerate(scene.things)
        if reaches(thing.x, thing.y, REACH * thing.size, REACH * thing.size)
    ]
    things = [scene.things[number] for number in chosen]
    return chosen, Scene(
        SIDE,
        SIDE,
        scene.background,
        tuple(replace(thing, x=thing.x - left, y=thing.y - top) for thing in things),
        tuple(
            replace(word, x=word.x - left, y=word.y - top)
            for word in scene.letterings
            if reaches(word.x, word.y, word.width, word.height)
        ),
    )


def _pictures(
    size: tuple[int, int], starts: np.ndarray, place: np.ndarray, tiling: Tiling
) -> Pictures:
    """Pictures of one size, given the first cut and the first tile of each, (P, 2)."""
    columns, rows = size
    count = count_tiles(columns * SIDE, rows * SIDE, tiling)
    cuts = place[starts[:, :1] + np.arange(columns * rows)]
    return Pictures(columns, rows, cuts, starts[:, 1:] + np.arange(count))


@torch.no_grad()
def _draw(renderer: BatchRenderer, cuts: Cuts, noise: Tensor) -> Tensor:
    """Cuts as (B, 3, SIDE, SIDE) uint8."""
    device = renderer.device
    alterations = None
    if cuts.factors is not None:
        factors = to_device(cuts.factors, device).flatten(0, 1)
        alterations = Alterations(*factors[:, :6].unbind(1), tint=factors[:, 6:])
    picture = renderer.compose(cuts.layouts, alterations)
    if cuts.soft is not None:
        soft = to_device(cuts.soft, device)
        rows = np.flatnonzero(cuts.soft[:, 0])
        if len(rows):
            blurred = to_device(rows, device)
            picture[blurred] = blur(picture[blurred])
        across = torch.arange(SIDE, device=device)
        x, y = soft[:, 1:2] + across, soft[:, 2:3] + across
        picture = picture + noise[:, y[:, :, None], x[:, None, :]].transpose(0, 1)
    return _to_bytes(picture * 255)


def _to_bytes(values: Tensor) -> Tensor:
    return values.clamp(0, 255).round().to(torch.uint8)


def _tiles(cuts: Tensor, columns: int, rows: int, tiling: Tiling) -> Tensor:
    """(P, rows * columns, 3, SIDE, SIDE) uint8 as (P, T, 3, S, S), as `cut_tiles` does it."""
    side = tiling.image_size
    if columns * rows == 1 and side == SIDE and choose_grid(SIDE, SIDE, tiling) == (1, 1):
        return cuts
    whole = cuts.view(len(cuts), rows, columns, 3, SIDE, SIDE).permute(0, 3, 1, 4, 2, 5)
    whole = whole.reshape(len(cuts), 3, rows * SIDE, columns * SIDE)
    across, down = choose_grid(columns * SIDE, rows * SIDE, tiling)
    tiles = _resize(whole, across * side, down * side)
    tiles = tiles.view(len(cuts), 3, down, side, across, side).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(len(cuts), down * across, 3, side, side)
    if not tiling.use_thumbnail or down * across == 1:
        return tiles
    return torch.cat((tiles, _resize(whole, side, side).unsqueeze(1)), 1)


def _resize(picture: Tensor, width: int, height: int) -> Tensor:
    """(P, 3, H, W) uint8 resized as by PIL's bicubic filter, which widens it when it shrinks."""
    if picture.shape[-2:] == (height, width):
        return picture
    return _to_bytes(
        F.interpolate(picture.float(), (height, width), mode="bicubic", antialias=True)
    )
