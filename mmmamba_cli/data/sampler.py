"""The order of samples, a pure function of the seed and the position in the stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmmamba_cli.data.dataset import CorpusPart


class SampleOrder:
    """An endless stream of passes over the parts, each shuffled by (seed, pass) or in file order.

    With `repeats` 2.5, each pass takes every sample of a part twice, and a random half of them once
    more. All passes have the same length.
    """

    def __init__(self, parts: Sequence[CorpusPart], seed: int, shuffle: bool):
        self._parts = tuple(parts)
        self._seed = seed
        self._shuffle = shuffle
        self.length = sum(self._whole(part) + self._extra(part) for part in parts)
        self._drawn: dict[int, np.ndarray] = {}

    def __getitem__(self, number: int) -> int:
        """Index in the corpus of sample `number` of the stream."""
        count, place = divmod(number, self.length)
        if count not in self._drawn:
            # A batch may span two passes; older permutations are not needed again.
            self._drawn = {n: p for n, p in self._drawn.items() if n == count - 1}
            self._drawn[count] = self._draw(count)
        return int(self._drawn[count][place])

    @staticmethod
    def _whole(part: CorpusPart) -> int:
        return int(part.repeats) * part.samples

    @staticmethod
    def _extra(part: CorpusPart) -> int:
        share = part.repeats - int(part.repeats)
        extra = round(share * part.samples)
        # A share of a small part rounds to at least one sample, unless the part is empty.
        return min(max(extra, 1), part.samples) if part.repeats < 1 else extra

    def _draw(self, number: int) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64([self._seed, number]))
        chosen, first = [], 0
        for part in self._parts:
            own = np.arange(first, first + part.samples)
            chosen += [own] * int(part.repeats)
            chosen.append(np.sort(rng.permutation(own)[: self._extra(part)]))
            first += part.samples
        stream = np.concatenate(chosen)
        return rng.permutation(stream) if self._shuffle else stream
