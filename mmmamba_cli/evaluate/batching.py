"""Which questions go through the model together.

Prompts are padded on the left to the longest of their batch, so those of like length belong
together. Longest first: what does not fit is found at once, and the pictures of later batches are
small. Plans depend on lengths and the limit only, never on time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

# More at once gains little once the device is busy, and loses more when a batch is done again.
MAX_BATCH_SIZE = 64


@dataclass(frozen=True)
class BatchLimit:
    """At most so many prompts in a batch, and so many padded tokens; 0 is any number of tokens.

    `given` is the number of prompts that was asked for, 0 where the limit was found by measuring. A
    single prompt is always a batch.
    """

    prompts: int
    columns: int = 0
    given: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def halved(self, prompts: int, longest: int) -> BatchLimit:
        """The limit after a batch of so many prompts, so long, did not fit."""
        half = max(1, prompts // 2)
        if self.columns:
            return BatchLimit(self.prompts, half * longest, self.given)
        return BatchLimit(half, 0, self.given)


def plan_batches(lengths: Sequence[int], limit: BatchLimit) -> list[list[int]]:
    """Places in `lengths`, in batches: longest first, ties in their order."""
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
