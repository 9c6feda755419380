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
from mmmamba_cli.profiling.contract import Decoder, OutOfMemory
from mmmamba_cli.profiling.instruments import or_out_of_memory

PREFILL, STEPS = 24, 4
BATCH = 2
# Relative distances |a - b| / |b| of logits that rounding explains, by dtype. What 16 bits lose
# depends on the model, random weights losing most: there the reference's own distance from fp32 is
# measured, and as two of that kind may lie so far apart each, twice that is allowed, if it is more.
# A small fault could hide behind it, so such a decoder is also held against the reference in fp32.
# Sums of thousands of terms in another order are off there by about a thousandth of what bf16
# rounds, and a model makes as much more of the one as of the other.
FP32_SHARE = 2.0**-10
HALVES = (torch.float16, torch.bfloat16)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
AS_MEASURED, IN_FP32 = "as measured", "in fp32"


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
    distances: dict[str, float] = {}
    short = _reference(name, decoder, (BATCH, PREFILL), seed)
    tolerance = TOLERANCES[short.logits.dtype]
    if short.logits.dtype in HALVES:
        tolerance = max(tolerance, 2 * _check_in_fp32(name, decoder, short, distances))
    _compare(name, _all_ways(decoder), short, tolerance, distances)
    del short
    for length in columns:
        found = _reference(name, decoder, (1, length), seed)
        _compare(name, {at_length(length): decoder}, found, tolerance, distances)
    return Checked(tolerance, distances)


def at_length(columns: int) -> str:
    """As `check_decoder` calls a prompt of so many columns."""
    return f"{AS_MEASURED}, after {columns:,} tokens"


def relative_distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, in fp64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


@dataclass(frozen=True)
class _Reference:
    """ids (B, T + STEPS), and the logits (B, STEPS + 1, V) behind the last columns, at once."""

    ids: Tensor
    logits: Tensor


def _reference(name: str, decoder: Decoder, shape: tuple[int, int], seed: int) -> _Reference:
    batch, length = shape
    ids = decoder.prompt(batch, length + STEPS, torch.Generator().manual_seed(seed))
    logits = decoder.without_cache(ids, STEPS + 1)
    if not bool(logits.isfinite().all()):
        raise CheckpointError(
            f"{name} gives logits that are not finite numbers", "check its weights, or its --dtype"
        )
    return _Reference(ids, logits)


def _check_in_fp32(
    name: str, decoder: Decoder, found: _Reference, distances: dict[str, float]
) -> float:
    """Check the same decoder in fp32; how far the 16-bit reference is from that one's.

    0 where there is no memory for it.
    """
    try:
        return or_out_of_memory(lambda: _distance_in_fp32(name, decoder, found, distances))
    except OutOfMemory:
        return 0.0


def _distance_in_fp32(
    name: str, decoder: Decoder, found: _Reference, distances: dict[str, float]
) -> float:
    wide = decoder.in_fp32()
    exact = _Reference(found.ids, wide.without_cache(found.ids, STEPS + 1))
    rounded = relative_distance(found.logits, exact.logits)
    tolerance = max(TOLERANCES[exact.logits.dtype], 2 * FP32_SHARE * rounded)
    ways = {f"{way}, {IN_FP32}": other for way, other in _all_ways(wide).items()}
    _compare(name, ways, exact, tolerance, distances)
    return rounded


def _all_ways(decoder: Decoder) -> dict[str, Decoder]:
    return {AS_MEASURED: decoder, **decoder.ways()}


def _compare(
    name: str,
    ways: Mapping[str, Decoder],
    reference: _Reference,
    tolerance: float,
    distances: dict[str, float],
) -> None:
    """Add the distance of each way."""
    for way, other in ways.items():
        length = reference.ids.shape[1] - STEPS
        distance = relative_distance(_decoded(other, reference.ids, length), reference.logits)
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


def _decoded(decoder: Decoder, ids: Tensor, length: int) -> Tensor:
    """Logits (B, STEPS + 1, V) after the prefill of `length` columns and each further token."""
    decoder.start(ids.shape[0], ids.shape[1])
    # Cloned: the next step may write into the same tensor.
    found = [decoder.read(ids[:, :length]).clone()]
    for column in range(length, ids.shape[1]):
        found.append(decoder.step(ids[:, column : column + 1]).clone())
    decoder.stop()
    return torch.stack(found, dim=1)
