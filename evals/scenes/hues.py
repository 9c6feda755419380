"""The dominant hue of a drawing, and hue rotation."""

from __future__ import annotations

import numpy as np

# Smallest saturation and value (0 to 1) of a coloured pixel.
MIN_SATURATION, MIN_VALUE = 0.45, 0.55
# Smallest share of coloured pixels among the visible ones, and of those within MAX_HUE_OFFSET
# (turns) of the dominant hue.
MIN_COLOURED_SHARE, MIN_AGREEING_SHARE, MAX_HUE_OFFSET = 0.55, 0.85, 14 / 360
HUE_BINS = 72


def to_hsv(rgb: np.ndarray) -> np.ndarray:
    """Convert (..., 3) RGB to hue, saturation and value, all in 0..1."""
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
    """Convert (..., 3) hue, saturation and value to RGB, all in 0..1."""
    hue, saturation, value = (hsv[..., i : i + 1] for i in range(3))
    k = (np.array([5.0, 3.0, 1.0]) + hue * 6) % 6
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)


def dominant_hue(pixels: np.ndarray) -> float | None:
    """The dominant hue, in turns, of a drawing (h, w, 4) uint8 RGBA.

    None if the drawing is pale, dark or of several hues. Browns (dark oranges) count as dark.
    """
    visible = pixels[..., 3] >= 128
    if not visible.any():
        return None
    hsv = to_hsv(pixels[visible][:, :3] / 255)
    coloured = (hsv[:, 1] >= MIN_SATURATION) & (hsv[:, 2] >= MIN_VALUE)
    if coloured.mean() < MIN_COLOURED_SHARE:
        return None
    hues = hsv[coloured, 0]
    counts, edges = np.histogram(hues, HUE_BINS, (0, 1))
    # Smooth circularly, so that a hue between two bins is not split.
    smooth = counts + np.roll(counts, 1) + np.roll(counts, -1)
    peak = edges[int(smooth.argmax())] + 0.5 / HUE_BINS
    offsets = (hues - peak + 0.5) % 1 - 0.5
    near = np.abs(offsets) <= MAX_HUE_OFFSET
    if near.mean() < MIN_AGREEING_SHARE:
        return None
    return float((peak + np.median(offsets[near])) % 1)


def turn_hue(rgb: np.ndarray, by: float) -> np.ndarray:
    """Rotate the hues of (..., 3) RGB in 0..1 by `by` turns."""
    hsv = to_hsv(rgb)
    hsv[..., 0] = (hsv[..., 0] + by) % 1
    return to_rgb(hsv)
