"""A data index: sizes and positions of all samples of a corpus in one file, mapped into memory.

The file is a safetensors file, whose metadata is the `IndexKey`. Legend: N samples, K bad ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from mmmamba_cli.data.sample_size import SampleSize
from mmmamba_cli.errors import DataError

# Raised when the file or the way in which samples are counted changes.
FORMAT = 1
# Name of the key in the metadata, whose values safetensors restricts to text.
KEY = "mmmamba_data_index"
HEADER_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 1 << 20
# Names and dtypes of the tensors, by safetensors' name of the dtype.
SIZES = ("tokens", "required", "images", "tiles")
BAD = ("bad_samples", "bad_ends", "bad_text")
POSITIONS = "positions"
DTYPES = {"U8": np.uint8, "U32": np.uint32, "I64": np.int64}


@dataclass(frozen=True)
class IndexKey:
    """Everything that the sizes of samples depend on; another key is another index.

    Attributes:
        content: digest of the files and of some pictures of the corpus (`content_digest`).
        samples: number of samples.
        processor: digest of tokenizer, chat template and tiling (`processor_digest`).
        transformers: the version of transformers, which applies templates and tiles pictures.
        max_tiles: `data.max_tiles`.
        format: version of the file.
    """

    content: str
    samples: int
    processor: str
    transformers: str
    max_tiles: int | None = None
    format: int = FORMAT


@dataclass(frozen=True)
class IndexSummary:
    """Totals of an index for one maximum length.

    Attributes:
        samples: all samples, the bad ones included.
        images, tiles, tokens: of the samples that can be used, tokens after truncation.
        longest: tokens of the longest sample before truncation, 0 without samples.
        cut: number of samples that are truncated.
        bad: number of samples that cannot be used, those included whose pictures would be cut.
    """

    samples: int
    images: int
    tiles: int
    tokens: int
    longest: int
    cut: int
    bad: int


class SampleIndex:
    """The sizes of all samples, and why the bad ones cannot be used.

    Args:
        key: what the sizes depend on.
        tensors: `tokens`, `required`, `images` and `tiles` (N,) uint32, the fields of `SampleSize`,
            0 for bad samples; `bad_samples` (K,) int64, their indices in ascending order;
            `bad_ends` (K,) int64, the ends of their reasons in `bad_text`, uint8 in UTF-8. Of a
            JSON file also `positions` (2, N) int64, as `JsonLines` and `JsonList` have them.
    """

    def __init__(self, key: IndexKey, tensors: Mapping[str, np.ndarray]):
        self.key = key
        self._tensors = dict(tensors)
        self._bad, self._ends = tensors["bad_samples"], tensors["bad_ends"]

    def __len__(self) -> int:
        return self.key.samples

    @property
    def positions(self) -> np.ndarray | None:
        """Positions of the records, (2, N) int64, of a JSON file; None for other corpora."""
        return self._tensors.get(POSITIONS)

    def size(self, sample: int) -> SampleSize:
        """The sizes of a sample. Raises `DataError` with the reason if it is bad."""
        reason = self.reason(sample)
        if reason is not None:
            raise DataError(reason)
        return SampleSize(*(int(self._tensors[name][sample]) for name in SIZES))

    def length(self, sample: int, max_length: int) -> int:
        """Tokens of a sample after truncation. Raises `DataError` if it cannot be used."""
        return self.size(sample).truncated(max_length)

    def reason(self, sample: int) -> str | None:
        """Why a sample is bad at any maximum length; None if it is not."""
        place = int(np.searchsorted(self._bad, sample))
        if place == len(self._bad) or self._bad[place] != sample:
            return None
        start = int(self._ends[place - 1]) if place else 0
        text = bytes(self._tensors["bad_text"][start : int(self._ends[place])])
        return text.decode("utf-8", "surrogatepass")

    def summary(self, max_length: int) -> IndexSummary:
        """Totals for a maximum length in tokens."""
        # In int64, which holds any maximum length.
        tokens, required, images, tiles = (self._tensors[x].astype(np.int64) for x in SIZES)
        usable = (tokens <= max_length) | (required <= max_length)
        usable[self._bad] = False
        return IndexSummary(
            samples=len(self),
            images=int(images[usable].sum()),
            tiles=int(tiles[usable].sum()),
            tokens=int(np.minimum(tokens[usable], max_length).sum()),
            longest=int(tokens.max(initial=0)),
            cut=int((tokens[usable] > max_length).sum()),
            bad=len(self) - int(usable.sum()),
        )

    def to_bytes(self) -> bytes:
        """The content of the file."""
        return bytes(save(self._tensors, {KEY: json.dumps(asdict(self.key))}))


def read_index(file: Path) -> SampleIndex:
    """Open an index; its tensors are mapped into memory and read on access.

    Raises:
        DataError: the file cannot be read, is not complete, or is not an index of this version.
    """
    try:
        key, header, start = _read_header(file)
        if key.format == FORMAT:
            names = (*SIZES, *BAD, *([POSITIONS] if POSITIONS in header else []))
            tensors = {name: _map(file, header[name], start) for name in names}
            _check_shapes(key, tensors)
            return SampleIndex(key, tensors)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise _incomplete(file, str(error)) from error
    except RecursionError as error:
        raise _incomplete(file, "its header is nested too deeply") from error
    raise DataError(f"{file} is a data index of format {key.format}, expected {FORMAT}")


def _incomplete(file: Path, why: str) -> DataError:
    return DataError(f"{file} is not a complete data index: {why}", "delete it and build it again")


def read_key(file: Path) -> IndexKey:
    """The key of an index file. Raises `DataError` as `read_index` does."""
    return read_index(file).key


def _read_header(file: Path) -> tuple[IndexKey, dict[str, Any], int]:
    """The key, the description of each tensor, and the position of the first one."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(HEADER_LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError("it has no header")
        header = json.loads(handle.read(length))
    key = IndexKey(**json.loads(header["__metadata__"][KEY]))
    return key, header, HEADER_LENGTH_BYTES + length


def _map(file: Path, described: Mapping[str, Any], start: int) -> np.ndarray:
    begin, end = described["data_offsets"]
    shape, dtype = tuple(described["shape"]), DTYPES[described["dtype"]]
    if begin < 0 or math.prod(shape) * np.dtype(dtype).itemsize != end - begin:
        raise ValueError(f"a tensor of shape {shape} does not take {end - begin} bytes")
    if begin == end:
        return np.empty(shape, dtype)
    # Raises `ValueError` for a file that has been cut.
    return np.memmap(file, dtype, mode="r", offset=start + begin, shape=shape)


def _check_shapes(key: IndexKey, tensors: Mapping[str, np.ndarray]) -> None:
    """Raise `ValueError` unless the tensors belong together."""
    expected = {**dict.fromkeys(SIZES, (key.samples,)), POSITIONS: (2, key.samples)}
    for name, tensor in tensors.items():
        if tensor.shape != expected.get(name, tensor.shape[:1]):
            raise ValueError(f"{name} has the shape {tensor.shape}")
    bad, ends, text = (tensors[name] for name in BAD)
    if len(bad) != len(ends) or (len(ends) and int(ends[-1]) != len(text)):
        raise ValueError("the reasons of bad samples do not belong to these samples")
