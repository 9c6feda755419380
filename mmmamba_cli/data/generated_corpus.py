"""Corpora that make their samples while training: `NAME:KIND?option=value&option=value`.

A corpus is an entry point of the group `mmmamba.corpora` of an installed package. Its samples are a
pure function of seed, stream and index, so that a run resumes with the same bits. Its pictures may
be layouts: loader processes make them, and the training process draws the pixels on its device.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmmamba_cli.data.corpus import CorpusPart
from mmmamba_cli.data.file_version import FileVersion
from mmmamba_cli.data.sample import Drawing, ImageLocation, Sample
from mmmamba_cli.errors import DataError, name_some
from mmmamba_cli.plugins import entry_points
from mmmamba_cli.processing import Tiling

GROUP = "mmmamba.corpora"
SPEC = re.compile(r"(?P<name>[a-z][a-z0-9_-]+):(?P<kind>[^?]*)(\?(?P<options>.*))?")
# The stream of held-out samples; no stage can have a name with a space.
HELD_OUT = "held out"
# How many samples it has unless the spec says otherwise.
HELD_OUT_SAMPLES = 512
# Length of a corpus without an end; larger than any number of samples that a run can read.
ENDLESS = 1 << 40
# The option that this module reads itself.
SAMPLES = "samples"


@dataclass(frozen=True)
class CorpusSpec:
    """A parsed source: `scenes:lessons?long=0.33` has name `scenes` and kind `lessons`."""

    text: str
    name: str
    kind: str
    options: Mapping[str, str]


class SampleGenerator(Protocol):
    """What an entry point of `mmmamba.corpora` returns, given (`CorpusSpec`, seed, stream)."""

    @property
    def identity(self) -> str:
        """Everything that samples depend on besides seed, stream and index.

        Kind, values of all options, a version of the code, digests of files. A run does not resume
        on a corpus of another identity.
        """
        ...

    def sample(self, index: int, name: str) -> Sample:
        """Sample `index` of the stream, with this name; pictures may be `Drawing`s."""
        ...

    def stack(self, drawings: Sequence[Drawing], tiling: Tiling) -> Any:
        """The layouts of a micro batch as one value that can be pickled; called in the loader."""
        ...

    def to_pixels(self, layouts: Any, device: torch.device) -> Tensor:
        """Tiles (N, 3, S, S) uint8 of stacked layouts, in order, drawn on `device`.

        Each picture has the tiles that `count_tiles` gives for its size and the tiling.
        """
        ...


GeneratorFactory = Callable[[CorpusSpec, int, str], SampleGenerator]


@dataclass(frozen=True)
class Drawings:
    """Pictures of a micro batch that are drawn on the device of training.

    `layouts` is what the generator stacked, `num_tiles` (N) and `image_size` (S) the shape of the
    pixels. `to_pixels` is None in a loader process, which has no use for it.
    """

    layouts: Any
    num_tiles: int
    image_size: int
    to_pixels: Callable[[Any, torch.device], Tensor] | None = None

    def draw(self, device: torch.device) -> Tensor:
        """Draw the tiles (N, 3, S, S) uint8. Raises `DataError` for other shapes or types."""
        assert self.to_pixels is not None
        pixels = self.to_pixels(self.layouts, device)
        expected = (self.num_tiles, 3, self.image_size, self.image_size)
        if tuple(pixels.shape) != expected or pixels.dtype != torch.uint8:
            raise DataError(
                f"the corpus drew pixels {tuple(pixels.shape)} of {pixels.dtype}, expected "
                f"{expected} of torch.uint8",
                "correct to_pixels of its package",
            )
        return pixels


class GeneratedCorpus:
    """A `Corpus` of generated samples: `count` of them, or endless if `count` is None."""

    def __init__(self, spec: CorpusSpec, generator: SampleGenerator, count: int | None):
        self.spec = spec
        self.generator = generator
        self.endless = count is None
        self._length = ENDLESS if count is None else count
        self.parts = (CorpusPart(spec.text, self._length),)
        self.ignored: tuple[str, ...] = ()
        self.pictures: dict[str, ImageLocation] = {}
        self.files: tuple[FileVersion, ...] = ()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        return self.generator.sample(index, self.name(index))

    def name(self, index: int) -> str:
        return f"{self.spec.name}:{self.spec.kind}#{index}"

    @property
    def identity(self) -> str:
        """The text that the fingerprint covers."""
        count = "endless" if self.endless else str(self._length)
        return f"{self.spec.name}:{self.spec.kind} {count} {self.generator.identity}"


def parse_spec(source: str) -> CorpusSpec | None:
    """Parse a source; None for a path.

    Raises:
        DataError: an option has no value, or is given twice.
    """
    match = SPEC.fullmatch(source)
    if match is None or Path(source).exists():
        return None
    options: dict[str, str] = {}
    for pair in filter(None, (match["options"] or "").split("&")):
        key, equals, value = pair.partition("=")
        if not equals or not key or not value or key in options:
            what = "is given twice" if key in options else "has no value"
            raise DataError(f"{source}: option {key!r} {what}", "write ?option=value&option=value")
        options[key] = value
    return CorpusSpec(source, match["name"], match["kind"], options)


def open_generated(spec: CorpusSpec, seed: int, stream: str) -> GeneratedCorpus:
    """Open a corpus of an installed package.

    A held-out stream ends after `samples=N` samples, by default 512; another one is endless without
    that option.

    Raises:
        DataError: no package has such a corpus, or the corpus refuses the spec.
    """
    found = dict(entry_points(GROUP))
    if spec.name not in found:
        raise DataError(
            f"no installed package has a corpus {spec.name!r}",
            f"installed: {name_some(sorted(found))}"
            if found
            else "install the package that has it",
        )
    count = HELD_OUT_SAMPLES if stream == HELD_OUT else None
    options = dict(spec.options)
    if SAMPLES in options:
        text = options.pop(SAMPLES)
        if not text.isdecimal() or not 1 <= int(text) < ENDLESS:
            raise DataError(
                f"{spec.text}: {SAMPLES} is {text!r}, expected a whole number from 1",
                f"leave {SAMPLES} out for an endless corpus",
            )
        count = int(text)
    factory: GeneratorFactory = found[spec.name]()
    rest = CorpusSpec(spec.text, spec.name, spec.kind, options)
    return GeneratedCorpus(spec, factory(rest, seed, stream), count)
