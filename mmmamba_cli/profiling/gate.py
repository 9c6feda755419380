"""Before anything is timed: a decoder computes what a forward without a cache computes.

A fast wrong decoder is no result. A prompt is read as a prefill, a few more tokens one by one; it
is short, and where the device is fast, one more is as long as what will be measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.profiling.contract import Decoder

PREFILL, STEPS = 24, 4
BATCH = 2
# Relative distances |a - b| / |b| of logits that rounding explains, by dtype.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
AS_MEASURED = "as measured"


class WrongDecoder(Exception):
    """A decoder whose logits are not the model's: a bug of ours, never the user's.

    `way` and `distance` say which, and how far off; `tolerance`, what was allowed.
    """

    def __init__(self, message: str, way: str, distance: float, tolerance: float):
        super().__init__(message)
        self.way = way
        self.distance = distance
        self.tolerance = tolerance


@dataclass(frozen=True)
class Checked:
    """How far each way of decoding was from the reference, and what was allowed."""

    tolerance: float
    distances: Mapping[str, float]


def check_decoder(
    name: str, decoder: Decoder, seed: int = 0, columns: Sequence[int] = ()
) -> Checked:
    """Hold all ways of decoding with these weights, its own too, against no cache at all.

    `columns` are lengths of further prompts, of one row each, for the decoder's own way only.
    Raises `CheckpointError` if the model itself gives no finite logits, `WrongDecoder` if a way is
    farther off than rounding explains.
    """
    ways = {AS_MEASURED: decoder, **decoder.ways()}
    distances: dict[str, float] = {}
    tolerance = _compare(name, decoder, ways, (BATCH, PREFILL), seed, distances)
    for length in columns:
        ways = {at_length(length): decoder}
        _compare(name, decoder, ways, (1, length), seed, distances)
    return Checked(tolerance, distances)


def at_length(columns: int) -> str:
    """As `check_decoder` calls a prompt of so many columns."""
    return f"{AS_MEASURED}, after {columns:,} tokens"


def relative_distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, in fp64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


def _compare(
    name: str,
    decoder: Decoder,
    ways: Mapping[str, Decoder],
    shape: tuple[int, int],
    seed: int,
    distances: dict[str, float],
) -> float:
    """Add the distance of each way, over a prompt of `shape`; the tolerance."""
    batch, length = shape
    rng = torch.Generator().manual_seed(seed)
    ids = decoder.prompt(batch, length + STEPS, rng)
    reference = decoder.without_cache(ids, STEPS + 1)
    if not bool(reference.isfinite().all()):
        raise CheckpointError(
            f"{name} gives logits that are not finite numbers", "check its weights, or its --dtype"
        )
    tolerance = TOLERANCES[reference.dtype]
    for way, other in ways.items():
        distance = relative_distance(_decoded(other, ids, length), reference)
        # Not "greater": a NaN is wrong too.
        if not distance <= tolerance:
            raise WrongDecoder(
                f"{name}, {way}: logits are {distance:.2g} from those without a cache, allowed is "
                f"{tolerance:.2g}",
                way,
                distance,
                tolerance,
            )
        distances[way] = distance
    return tolerance


def _decoded(decoder: Decoder, ids: Tensor, length: int) -> Tensor:
    """Logits (B, STEPS + 1, V) after the prefill of `length` columns and each further token."""
    decoder.start(ids.shape[0], ids.shape[1])
    # Cloned: the next step may write into the same tensor.
    found = [decoder.read(ids[:, :length]).clone()]
    for column in range(length, ids.shape[1]):
        found.append(decoder.step(ids[:, column : column + 1]).clone())
    decoder.stop()
    return torch.stack(found, dim=1)
