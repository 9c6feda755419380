"""Counts of picture tokens: a processor is asked once for each size."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from mmmamba_cli.errors import DataError
from mmmamba_cli.processing.picture_tokens import PROBE_SIZES, PictureTokens, Size


class Processor:
    """Counts a token for each 14 pixels of a side, and refuses pictures of one pixel."""

    def __init__(self) -> None:
        self.asked: list[Size] = []

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[Size]) -> Any:
        ((height, width),) = image_sizes
        self.asked.append((width, height))
        if width == 1:
            raise ValueError("too narrow")
        return SimpleNamespace(num_image_tokens=[width // 14 + height // 14])


def test_a_size_is_counted_once() -> None:
    processor = Processor()
    # The prompt has three more tokens for each picture than the processor says.
    counts = PictureTokens(
        lambda sizes: sum(width // 14 + height // 14 + 3 for width, height in sizes), processor
    )
    assert [counts.count([(140, 70)]) for _ in range(4)] == [18] * 4
    assert counts.count([(140, 70), (28, 28), (140, 70)]) == 18 + 7 + 18
    assert processor.asked == [*PROBE_SIZES, (140, 70), (28, 28)]


def test_a_refused_size_is_refused_again() -> None:
    counts = PictureTokens(
        lambda sizes: sum(width // 14 + height // 14 for width, height in sizes), Processor()
    )
    for _ in range(2):
        with pytest.raises(DataError, match="does not take a picture of 1 x 5 pixels: too narrow"):
            counts.count([(1, 5)])
