"""The interface of a corpus: samples by index, in parts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mmmamba_cli.data.file_version import FileVersion
from mmmamba_cli.data.sample import ImageLocation, Sample


class Corpus(Protocol):
    """Samples by index. An unreadable sample raises `DataError` with its name."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def name(self, index: int) -> str:
        """The name of a sample, `set.jsonl:17`, also of an unreadable one."""
        ...

    @property
    def parts(self) -> Sequence[CorpusPart]:
        """The parts in order, with their sample counts and repeats."""
        ...

    @property
    def ignored(self) -> Sequence[str]:
        """Names of members that belong to no sample, with the reason."""
        ...

    @property
    def pictures(self) -> Mapping[str, ImageLocation]:
        """The pictures stored in the same files as the samples, by name."""
        ...

    @property
    def files(self) -> Sequence[FileVersion]:
        """The files that hold the samples, without separate picture files."""
        ...


@dataclass(frozen=True)
class CorpusPart:
    """`repeats` below 1 draws that share of the samples, newly in each pass."""

    name: str
    samples: int
    repeats: float = 1.0


def locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """The part, of those ending at `ends`, that holds sample `index`, and its index in it."""
    which = bisect_right(ends, index)
    return which, index - (ends[which - 1] if which else 0)
