"""Patch embedding and pixel shuffle: pixels to image tokens.

Legend: N tiles, S side in pixels, g patches per side, D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba_cli.model.config import VisionConfig


class VisionEmbedding(nn.Module):
    """Patch embedding with learned positions; pixel shuffle with a projector."""

    def __init__(self, config: VisionConfig, hidden_size: int):
        super().__init__()
        self.config = config
        patch, merged = config.patch_size, hidden_size * config.merge**2
        self.patch_embedding = nn.Conv2d(config.num_channels, hidden_size, patch, stride=patch)
        # Row 0 belongs to a class token, which the multimodal path does not use.
        self.position_embedding = nn.Parameter(torch.zeros(1, config.grid**2 + 1, hidden_size))
        self.projector = nn.Sequential(
            nn.Linear(merged, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed patches and add positions, (N, 3, S, S) -> (N, g * g, D), row by row."""
        pixels = pixel_values.to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(pixels)
        height, width = patches.shape[-2:]
        positions = self._positions(height, width).to(patches.dtype)
        return patches.flatten(2).transpose(1, 2) + positions

    def merge(self, patches: Tensor) -> Tensor:
        """Shuffle squares of patches into channels and project: (N, g * g, D) -> (N, g'^2, D)."""
        tiles, count, size = patches.shape
        side, m = round(count**0.5), self.config.merge
        squares = patches.view(tiles, side // m, m, side // m, m, size)
        squares = squares.permute(0, 1, 3, 2, 4, 5)
        return self.projector(squares.reshape(tiles, count // m**2, size * m**2))

    def _positions(self, height: int, width: int) -> Tensor:
        """Learned positions (1, height * width, D), resized bicubically in fp32 to another grid."""
        grid, table = self.config.grid, self.position_embedding[:, 1:]
        if (height, width) == (grid, grid):
            return table
        table = table.float().view(1, grid, grid, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2)
