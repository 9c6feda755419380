"""Batched rendering of scenes with torch, on any device.

Equal to `renderer.render` up to interpolation. Legend: B scenes, N things and W words at most,
S side of a texture, H and W of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmmamba_evals.scenes.atlas import Atlas
from mmmamba_evals.scenes.augmentation import (
    Alterations,
    Augmentation,
    alter_colours,
    draw_alterations,
    soften,
    turn_hue,
)
from mmmamba_evals.scenes.fonts import word_mask
from mmmamba_evals.scenes.renderer import turned_size
from mmmamba_evals.scenes.scene import Scene, Thing
from mmmamba_evals.scenes.world import COLOURS, World

TEXTURE_SIDE = 64
WORD_HEIGHT, WORD_WIDTH = 32, 224
KINDS = ("flat", "gradient", "texture")


@dataclass
class SceneBatch:
    """A batch of scenes as arrays.

    `things` (B, N, 6): texture index or -1, x, y, output pixels per texture pixel, angle in
    radians, -1 if mirrored else 1. `hue` (B, N): hue rotation in turns. `keeps` (B, N): whether the
    colour is asked about. `grounds` (B, 9): backgrounds. `words` (B, W, 8). `cuts` (B, 3): x and y
    of a picture that is cut from a larger scene, and the width of that scene; None without cuts.
    """

    width: int
    height: int
    things: np.ndarray
    hue: np.ndarray
    keeps: np.ndarray
    grounds: np.ndarray
    words: np.ndarray
    cuts: np.ndarray | None = None


class SceneEncoder:
    """Encodes scenes as arrays of texture and word indexes, on the CPU."""

    def __init__(self, atlas: Atlas, world: World):
        self.sprites = [
            (name, variant)
            for name, drawings in sorted(atlas.sprites.items())
            for variant in range(len(drawings))
        ]
        self.atlas = atlas
        self._texture = {key: i for i, key in enumerate(self.sprites)}
        self.words = [(word, font) for word in world.words for font in world.fonts]
        self._word = {key: i for i, key in enumerate(self.words)}

    def layouts(self, scenes: Sequence[Scene], most_things: int) -> SceneBatch:
        """Encode scenes of one size, each with at most `most_things` things."""
        batch = len(scenes)
        things = np.zeros((batch, most_things, 6), np.float32)
        things[..., 0], things[..., 3] = -1, 1
        hue = np.zeros((batch, most_things), np.float32)
        keeps = np.zeros((batch, most_things), bool)
        grounds = np.zeros((batch, 9), np.float32)
        most_words = max(len(scene.letterings) for scene in scenes)
        words = np.zeros((batch, most_words, 8), np.float32)
        words[..., 0], words[..., 3:5] = -1, 1
        for b, scene in enumerate(scenes):
            for n, thing in enumerate(scene.things):
                things[b, n], hue[b, n], keeps[b, n] = self._thing(thing)
            ground = scene.background
            turn = math.radians(ground.angle)
            kind = KINDS.index(ground.kind)
            grounds[b] = (kind, *ground.first, *ground.second, turn, ground.frequency)
            for w, one in enumerate(scene.letterings):
                number = self._word[one.word, one.font]
                words[b, w] = (number, one.x, one.y, one.width, one.height, *one.colour)
        return SceneBatch(scenes[0].width, scenes[0].height, things, hue, keeps, grounds, words)

    def _thing(self, thing: Thing) -> tuple[tuple[float, ...], float, bool]:
        sprite = self.atlas.sprites[thing.name][thing.variant]
        height, width = sprite.pixels.shape[:2]
        # The longer side of the sprite fills the texture.
        longest = max(width, height)
        box = turned_size(width / longest, height / longest, thing.angle)
        scale = thing.size / (max(box) * TEXTURE_SIDE)
        turned, keeps = 0.0, thing.colour is not None
        if thing.colour is not None and sprite.hue is not None:
            turned = COLOURS[thing.colour] - sprite.hue
        row = (
            self._texture[thing.name, thing.variant],
            thing.x,
            thing.y,
            scale,
            math.radians(thing.angle),
            -1.0 if thing.flip else 1.0,
        )
        return row, turned, keeps


class BatchRenderer:
    """Renders batches of scenes with textures of an atlas and word masks on a device."""

    def __init__(self, layouter: SceneEncoder, device: torch.device | str):
        self.device = torch.device(device)
        textures = [texture(layouter.atlas.sprites[n][v].pixels) for n, v in layouter.sprites]
        self.textures = torch.from_numpy(np.stack(textures)).to(self.device)
        masks, sizes = _word_masks(tuple(layouter.words))
        self.masks, self.mask_sizes = masks.to(self.device), sizes.to(self.device)

    @torch.no_grad()
    def draw(
        self,
        layouts: SceneBatch,
        augmentation: Augmentation | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Render scenes as (B, 3, H, W) float in 0..1, altered with random factors."""
        if augmentation is None:
            return self.compose(layouts).clamp(0, 1)
        count = layouts.hue.size
        altered = draw_alterations(augmentation, count, generator, self.device)
        picture = self.compose(layouts, altered)
        return soften(picture, augmentation, generator).clamp(0, 1)

    @torch.no_grad()
    def compose(self, layouts: SceneBatch, alterations: Alterations | None = None) -> Tensor:
        """Render scenes as (B, 3, H, W) float, things altered by factors of shape (B * N,)."""
        parts: Mapping[str, Tensor] = {
            name: to_device(getattr(layouts, name), self.device)
            for name in ("things", "hue", "keeps", "grounds", "words")
        }
        x, y = _pixels(layouts.width, layouts.height, self.device)
        ground_x, ground_y = x / layouts.width, y / layouts.width
        if layouts.cuts is not None:
            left, top, width = to_device(layouts.cuts, self.device).view(-1, 3, 1, 1).unbind(1)
            ground_x, ground_y = (x + left) / width, (y + top) / width
        picture = _grounds(parts["grounds"], ground_x, ground_y)
        # Each thing is drawn in a window that holds it at any rotation; at the edge the window
        # reaches beyond the picture.
        window = math.ceil(float(layouts.things[..., 3].max()) * TEXTURE_SIDE * 2**0.5) + 4
        # A thing of a cut may have its centre outside of the cut.
        sides = np.array((layouts.width, layouts.height))
        centres = layouts.things[..., 1:3]
        outside = float(np.maximum(-centres, centres - sides).max(initial=0.0))
        margin = window // 2 + 1 + math.ceil(max(0.0, outside))
        picture = self._put_things(picture, parts, window, margin, alterations)
        for number in range(layouts.words.shape[1]):
            # Words are few: they are written on the pictures that have one.
            rows = np.flatnonzero(layouts.words[:, number, 0] >= 0)
            if len(rows):
                where = to_device(rows, self.device)
                words = parts["words"][where, number]
                picture[where] = self._write(picture[where], words, x, y)
        return picture

    def _put_things(
        self,
        picture: Tensor,
        parts: Mapping[str, Tensor],
        window: int,
        margin: int,
        alterations: Alterations | None,
    ) -> Tensor:
        """The picture (B, 3, H, W) with all things pasted."""
        batch, most = parts["hue"].shape
        things = parts["things"].flatten(0, 1)
        left = (things[:, 1] - window / 2).floor().long().view(-1, 1, 1)
        top = (things[:, 2] - window / 2).floor().long().view(-1, 1, 1)
        x, y = _pixels(window, window, self.device)
        x, y = x.long() + left, y.long() + top
        hue, keeps = parts["hue"].flatten(), parts["keeps"].flatten()
        drawn = self._draw_things(things, hue, keeps, x, y, alterations)
        drawn = drawn.view(batch, most, 4, window, window).permute(1, 0, 3, 4, 2)
        colours, behind = drawn[..., :3], 1 - drawn[..., 3:]
        canvas = F.pad(picture, (margin,) * 4).permute(0, 2, 3, 1).contiguous()
        # One index for each pixel of a window: with few launches a GPU does not wait for the host.
        height, width = canvas.shape[1:3]
        scene = torch.arange(batch, device=self.device).view(-1, 1, 1, 1)
        place = (y + margin).view(batch, most, window, window) + scene * height
        place = place * width + (x + margin).view(batch, most, window, window)
        pixels = canvas.view(-1, 3)
        for n, where in enumerate(place.unbind(1)):
            pixels[where] = pixels[where] * behind[n] + colours[n]
        picture = canvas.permute(0, 3, 1, 2)[..., margin:-margin, margin:-margin]
        # Later operations are several times faster on contiguous memory.
        return picture.contiguous()

    def _draw_things(
        self,
        things: Tensor,
        hue: Tensor,
        keeps: Tensor,
        x: Tensor,
        y: Tensor,
        alterations: Alterations | None,
    ) -> Tensor:
        """Premultiplied colours and alpha (M, 4, h, w) of M things at pixels x, y (M, h, w)."""
        number = things[:, 0].long()
        image = self.textures[number.clamp(min=0)].float() / 255
        angle, stretch = things[:, 4], torch.ones_like(hue)
        if alterations is not None:
            hue = hue + alterations.hue * (~keeps)
            angle = angle + alterations.angle
            stretch = alterations.stretch
        rgb = turn_hue(image[:, :3], hue)
        if alterations is not None:
            rgb = alter_colours(rgb, alterations, keeps)
        alpha = image[:, 3:] * (number >= 0).view(-1, 1, 1, 1)
        grid = _grid(things, angle, stretch, x, y)
        return F.grid_sample(torch.cat((rgb * alpha, alpha), 1), grid, align_corners=False)

    def _write(self, picture: Tensor, words: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The pictures (B, 3, H, W) with one word each, (B, 8)."""
        number = words[:, 0].long()
        mask = self.masks[number].float().unsqueeze(1) / 255
        size = self.mask_sizes[number]
        # Fit the word into its box.
        scale = torch.minimum(words[:, 3] / size[:, 0], words[:, 4] / size[:, 1])
        u = (x - words[:, 1].view(-1, 1, 1) + 0.5) / scale.view(-1, 1, 1)
        v = (y - words[:, 2].view(-1, 1, 1) + 0.5) / scale.view(-1, 1, 1)
        grid = torch.stack((u * 2 / WORD_WIDTH, v * 2 / WORD_HEIGHT), -1)
        alpha = F.grid_sample(mask, grid, align_corners=False)
        return picture * (1 - alpha) + alpha * (words[:, 5:] / 255)[:, :, None, None]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device; asynchronous on a GPU."""
    values = torch.from_numpy(array)
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _pixels(width: int, height: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and y of every pixel, each (height, width)."""
    y, x = torch.meshgrid(
        torch.arange(height, device=device, dtype=torch.float32),
        torch.arange(width, device=device, dtype=torch.float32),
        indexing="ij",
    )
    return x, y


def texture(pixels: np.ndarray) -> np.ndarray:
    """A sprite (h, w, 4) centred in (4, S, S) uint8, with its longer side scaled to S."""
    height, width = pixels.shape[:2]
    scale = TEXTURE_SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(pixels, "RGBA").resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("RGBA", (TEXTURE_SIDE, TEXTURE_SIDE))
    canvas.paste(image, ((TEXTURE_SIDE - size[0]) // 2, (TEXTURE_SIDE - size[1]) // 2))
    return np.asarray(canvas).transpose(2, 0, 1)


@lru_cache(maxsize=2)
def _word_masks(words: tuple[tuple[str, int], ...]) -> tuple[Tensor, Tensor]:
    """Masks (K, WORD_HEIGHT, WORD_WIDTH) uint8 of K words in their fonts, sizes (K, 2) float32.

    Thousands of words take a second, and the renderers of a process draw the same ones. Without
    words, K is 1 and the mask is empty.
    """
    fitted = [_fitted_mask(word, font) for word, font in words]
    fitted = fitted or [(np.zeros((WORD_HEIGHT, WORD_WIDTH), np.uint8), (1.0, 1.0))]
    masks = np.stack([mask for mask, _ in fitted])
    return torch.from_numpy(masks), torch.tensor([size for _, size in fitted], dtype=torch.float32)


def _fitted_mask(word: str, font: int) -> tuple[np.ndarray, tuple[float, float]]:
    """A word's mask centred in (WORD_HEIGHT, WORD_WIDTH), and its (width, height) there."""
    mask = Image.fromarray(word_mask(word, font), "L")
    scale = min(WORD_WIDTH / mask.width, WORD_HEIGHT / mask.height)
    size = (max(1, round(mask.width * scale)), max(1, round(mask.height * scale)))
    canvas = Image.new("L", (WORD_WIDTH, WORD_HEIGHT))
    corner = ((WORD_WIDTH - size[0]) // 2, (WORD_HEIGHT - size[1]) // 2)
    canvas.paste(mask.resize(size, Image.Resampling.BICUBIC), corner)
    return np.asarray(canvas), (float(size[0]), float(size[1]))


def _grid(things: Tensor, angle: Tensor, stretch: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sampling coordinates of each pixel in its texture, (B, H, W, 2) in -1..1."""
    _, centre_x, centre_y, scale, _, mirrored = (part.view(-1, 1, 1) for part in things.unbind(1))
    cosine, sine = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    # Pixel centres are at half integers; y runs down, angles run anticlockwise.
    dx, dy = x + 0.5 - centre_x, y + 0.5 - centre_y
    u = (dx * cosine - dy * sine) / scale * mirrored * stretch.view(-1, 1, 1)
    v = (dx * sine + dy * cosine) / scale / stretch.view(-1, 1, 1)
    return torch.stack((u, v), -1) * (2 / TEXTURE_SIDE)


def _grounds(grounds: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Backgrounds (B, 3, H, W); x and y in units of the picture's width, see `Background`."""
    kind, angle, frequency = (grounds[:, i].view(-1, 1, 1) for i in (0, 7, 8))
    along = x * angle.cos() + y * angle.sin()
    across = y * angle.cos() - x * angle.sin()
    turns = 2 * math.pi * frequency
    wave = (1 + torch.sin(turns * along) * torch.sin(turns * across)) / 2
    share = torch.where(kind == 1, along.clamp(0, 1), torch.where(kind == 2, wave, 0.0))
    first, second = (grounds[:, i : i + 3, None, None] / 255 for i in (1, 4))
    return first + (second - first) * share.unsqueeze(1)
