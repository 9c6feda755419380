"""Sizes of a sample before truncation, from which batches are planned."""

from __future__ import annotations

from dataclasses import dataclass

from mmmamba_cli.errors import DataError


@dataclass(frozen=True)
class SampleSize:
    """Sizes of a sample that can be read, whatever the maximum length is.

    Attributes:
        tokens: its tokens, those of pictures and videos included.
        required: tokens up to the end of its last picture or video, which truncation must not cut;
            0 without any.
        images: number of pictures, those of videos left out.
        tiles: tiles of all pictures; 0 where the model's processor does not count tiles.
    """

    tokens: int
    required: int = 0
    images: int = 0
    tiles: int = 0

    def truncated(self, max_length: int) -> int:
        """Tokens after truncation. Raises `DataError` if that would cut a picture or a video."""
        if self.tokens <= max_length:
            return self.tokens
        if self.required > max_length:
            raise DataError(
                f"has {self.tokens} tokens, and cut to data.max_length = {max_length} it would "
                f"lose part of {'an image' if self.images else 'a video'}"
            )
        return max_length
