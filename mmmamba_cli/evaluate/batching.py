"""Batches of prompts by length.

Prompts are left-padded to the longest of their batch, so each batch has prompts of similar length.
The longest come first, so that out of memory shows early. A plan depends only on the lengths and
the limit, which makes a resumed evaluation reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

# Larger batches gain little on a busy device, and lose more if a batch has to be repeated.
MAX_BATCH_SIZE = 64


@dataclass(frozen=True)
class BatchLimit:
    """The largest batch: `prompts` prompts and `columns` padded tokens (0: no limit).

    `given` is the batch size that the user chose, 0 if the limit was measured. A batch may always
    have one prompt.
    """

    prompts: int
    columns: int = 0
    given: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def halved(self, prompts: int, longest: int) -> BatchLimit:
        """The limit after a batch of `prompts` prompts of length `longest` ran out of memory."""
        half = max(1, prompts // 2)
        if self.columns:
            return BatchLimit(self.prompts, half * longest, self.given)
        return BatchLimit(half, 0, self.given)


def plan_batches(lengths: Sequence[int], limit: BatchLimit) -> list[list[int]]:
    """Batches of indexes into `lengths`, longest first; equal lengths keep their order."""
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    batches: list[list[int]] = []
    longest = 0
    for place in order:
        size = len(batches[-1]) + 1 if batches else 0
        fits = not limit.columns or size * longest <= limit.columns
        if batches and size <= limit.prompts and fits:
            batches[-1].append(place)
        else:
            batches.append([place])
            longest = lengths[place]
    return batches
