"""Hues of drawings: which one dominates, and turning a drawing to another one."""

from __future__ import annotations

import numpy as np

# A pixel has a hue worth naming from this saturation and brightness on (0 to 1).
SATURATED, BRIGHT = 0.45, 0.55
# Of the seen pixels, so many must be like that; of those, so many within NEAR of one hue (turns).
COLOURED, AGREEING, NEAR = 0.55, 0.85, 14 / 360
BINS = 72


def to_hsv(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) RGB of 0..1 to hue, saturation, value, each of 0..1."""
    high, low = rgb.max(-1), rgb.min(-1)
    spread = high - low
    safe = np.where(spread == 0, 1, spread)
    r, g, b = (rgb[..., i] for i in range(3))
    hue = np.where(
        high == r,
        (g - b) / safe % 6,
        np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4),
    )
    saturation = np.where(high == 0, 0, spread / np.where(high == 0, 1, high))
    return np.stack((np.where(spread == 0, 0, hue) / 6, saturation, high), -1)


def to_rgb(hsv: np.ndarray) -> np.ndarray:
    """The way back: value less the share of saturation that a hue lacks in each part."""
    hue, saturation, value = (hsv[..., i : i + 1] for i in range(3))
    k = (np.array([5.0, 3.0, 1.0]) + hue * 6) % 6
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)


def dominant_hue(pixels: np.ndarray) -> float | None:
    """The hue in turns that a drawing (h, w, 4) uint8 has, if anyone would call it by one colour.

    None if it is pale or dark, or of several hues. Browns, which are dark oranges, are left out.
    """
    seen = pixels[..., 3] >= 128
    if not seen.any():
        return None
    hsv = to_hsv(pixels[seen][:, :3] / 255)
    coloured = (hsv[:, 1] >= SATURATED) & (hsv[:, 2] >= BRIGHT)
    if coloured.mean() < COLOURED:
        return None
    hues = hsv[coloured, 0]
    counts, edges = np.histogram(hues, BINS, (0, 1))
    # Smoothed around the circle, so that a hue between two bins is not split.
    smooth = counts + np.roll(counts, 1) + np.roll(counts, -1)
    peak = edges[int(smooth.argmax())] + 0.5 / BINS
    offsets = (hues - peak + 0.5) % 1 - 0.5
    near = np.abs(offsets) <= NEAR
    if near.mean() < AGREEING:
        return None
    return float((peak + np.median(offsets[near])) % 1)


def turn_hue(rgb: np.ndarray, by: float) -> np.ndarray:
    """(..., 3) RGB of 0..1 with every hue turned by so many turns."""
    hsv = to_hsv(rgb)
    hsv[..., 0] = (hsv[..., 0] + by) % 1
    return to_rgb(hsv)
