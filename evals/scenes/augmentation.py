"""Augmentation of drawn scenes: every sprite altered, so that a model does not overfit to a style.

Legend: M things, B scenes, S side of a texture, H and W of the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Largest changes of the augmentation; each is drawn uniformly.

    `aspect`, `brightness`, `saturation` and `contrast` are factors around 1, `tint` a shift of each
    colour channel, `hue` in turns (recoloured things keep theirs), `angle` in degrees, `blur` the
    share of blurred pictures, `noise` the standard deviation of Gaussian pixel noise.
    """

    aspect: float = 0.2
    brightness: float = 0.3
    saturation: float = 0.45
    contrast: float = 0.3
    tint: float = 0.12
    hue: float = 0.1
    blur: float = 0.25
    noise: float = 0.02
    angle: float = 12.0


@dataclass(frozen=True)
class Alterations:
    """Factors of the augmentation, (M,) each: those of `Augmentation`, drawn for every thing.

    `hue` in turns and `angle` in radians are added; `stretch`, `saturation`, `contrast` and
    `brightness` multiply; `tint` (M, 3) is added to the colours.
    """

    hue: Tensor
    angle: Tensor
    stretch: Tensor
    saturation: Tensor
    contrast: Tensor
    brightness: Tensor
    tint: Tensor


def draw_alterations(
    how: Augmentation, count: int, generator: torch.Generator | None, device: torch.device
) -> Alterations:
    """Random factors of `count` things."""
    draw = RandomFactors(count, generator, device)
    return Alterations(
        hue=draw.around_zero(how.hue),
        angle=math.radians(how.angle) * draw.around_zero(1.0),
        stretch=draw.around_one(how.aspect),
        saturation=draw.around_one(how.saturation),
        contrast=draw.around_one(how.contrast),
        brightness=draw.around_one(how.brightness),
        tint=torch.stack([draw.around_zero(how.tint) for _ in range(3)], 1),
    )


@dataclass
class RandomFactors:
    """Random numbers, one for each of `count` things or scenes."""

    count: int
    generator: torch.Generator | None
    device: torch.device

    def around_zero(self, most: float) -> Tensor:
        unit = torch.rand(self.count, generator=self.generator, device=self.device)
        return (2 * unit - 1) * most

    def around_one(self, most: float) -> Tensor:
        """A factor, log-uniform between 1 / (1 + most) and 1 + most."""
        return torch.exp(self.around_zero(math.log1p(most)))


def turn_hue(rgb: Tensor, by: Tensor) -> Tensor:
    """Rotate the hues of (B, 3, ...) RGB in 0..1 by (B,) turns, as `hues.turn_hue`."""
    high, low = rgb.amax(1), rgb.amin(1)
    spread = high - low
    safe = torch.where(spread == 0, 1.0, spread)
    r, g, b = rgb.unbind(1)
    hue = torch.where(
        high == r,
        ((g - b) / safe) % 6,
        torch.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4),
    )
    hue = torch.where(spread == 0, 0.0, hue) + 6 * by.view(-1, *[1] * (hue.dim() - 1))
    parts = []
    for offset in (5.0, 3.0, 1.0):
        k = (offset + hue) % 6
        parts.append(high - spread * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(parts, 1)


def alter_colours(rgb: Tensor, factors: Alterations, keeps: Tensor) -> Tensor:
    """Alter brightness, contrast, saturation and tint of (M, 3, S, S), less if `keeps`."""

    def each(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1)

    less = torch.where(keeps, 0.3, 1.0)
    saturation = 1 + (factors.saturation - 1) * less
    grey = rgb.mean(1, keepdim=True)
    rgb = grey + (rgb - grey) * each(saturation)
    rgb = 0.5 + (rgb - 0.5) * each(1 + (factors.contrast - 1) * less)
    rgb = rgb * each(1 + (factors.brightness - 1) * less)
    tint = factors.tint * less.unsqueeze(1)
    return (rgb + tint[:, :, None, None]).clamp(0, 1)


def blur(picture: Tensor) -> Tensor:
    """(B, 3, H, W) averaged over 3 x 3 pixels."""
    return F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, 1)


def soften(picture: Tensor, how: Augmentation, generator: torch.Generator | None) -> Tensor:
    """Blur a share of the pictures (B, 3, H, W) and add noise to all."""
    draw = RandomFactors(len(picture), generator, picture.device)
    blurred = blur(picture)
    soft = (draw.around_zero(0.5) + 0.5 < how.blur).view(-1, 1, 1, 1)
    noise = torch.randn(picture.shape, generator=generator, device=picture.device)
    return torch.where(soft, blurred, picture) + how.noise * noise
