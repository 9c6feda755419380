"""How many tokens a picture adds to a prompt, by its size, without its pixels.

A processor's own count is used where it differs from what the processor does by a constant.
Elsewhere a blank picture of the size is processed once, and its count is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

from mmmamba_cli.errors import DataError

Size = tuple[int, int]

# Width and height in pixels: wide, tall and small pictures, on which a processor's count is tried.
PROBE_SIZES: tuple[Size, ...] = ((640, 360), (210, 560), (56, 56), (900, 300))
# Counts that are kept; a data set has as many as it has picture sizes.
MAX_COUNTS = 1 << 16
# Errors of processors for sizes that they do not take.
SIZE_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class PictureTokens:
    """Tokens that a picture adds to the rendered prompt, which has a placeholder for it.

    Args:
        measure: the tokens added by blank pictures of these sizes (width, height) in one prompt.
        processor: the processor, which may know its counts (`_get_num_multimodal_tokens`).
    """

    def __init__(self, measure: Callable[[Sequence[Size]], int], processor: Any):
        self._measure = measure
        self._processor = processor
        self._measured = lru_cache(MAX_COUNTS)(self._measure_one)
        # A processor checks all of its options at each count: a millisecond for a sample.
        self._own = lru_cache(MAX_COUNTS)(self._own_count)

    def count(self, sizes: Sequence[Size]) -> int:
        """Tokens that the pictures of one prompt add.

        Some processors cut a picture into tiles only where it is alone, so that a picture's count
        depends on whether there are others.

        Raises:
            DataError: the processor does not take a picture of this size.
        """
        alone = len(sizes) == 1
        return round(sum(self._one(size, alone) for size in sizes))

    def _one(self, size: Size, alone: bool) -> float:
        constant = self._constants[alone]
        try:
            if constant is not None:
                return self._own(size) + constant
            return self._measured(size, alone)
        except SIZE_ERRORS as error:
            raise refused_picture(size, error) from error

    def _measure_one(self, size: Size, alone: bool) -> float:
        copies = 1 if alone else 2
        return self._measure([size] * copies) / copies

    def _own_count(self, size: Size) -> float:
        width, height = size
        counted = self._processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        return float(counted.num_image_tokens[0])

    @cached_property
    def _constants(self) -> dict[bool, float | None]:
        """What the own count lacks, by whether a picture is alone; None if that varies."""
        return {alone: self._constant(alone) for alone in (True, False)}

    def _constant(self, alone: bool) -> float | None:
        if not hasattr(self._processor, "_get_num_multimodal_tokens"):
            return None
        try:
            lacking = {self._measure_one(size, alone) - self._own(size) for size in PROBE_SIZES}
        except (*SIZE_ERRORS, NotImplementedError):
            return None
        return lacking.pop() if len(lacking) == 1 else None


def refused_picture(size: Size, error: Exception) -> DataError:
    """The error of a picture that a processor does not take."""
    width, height = size
    return DataError(
        f"the processor does not take a picture of {width} x {height} pixels: {first_line(error)}"
    )


def first_line(error: Exception) -> str:
    """The first line of a message, or the name of the error without one."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
