"""Before anything is timed: the caches compute what a forward without a cache computes.

A fast wrong decoder is no result. The prompt is short, and read in two parts: some of it as a
prefill, the rest token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.profiling.contract import Decoder

PREFILL, STEPS = 24, 4
BATCH = 2
# Relative distances |a - b| / |b| of logits that rounding explains, by dtype.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class WrongDecoder(Exception):
    """A decoder whose logits are not the model's: a bug of ours, never the user's."""


@dataclass(frozen=True)
class Checked:
    """How far each way of decoding was from the reference, and what was allowed."""

    tolerance: float
    distances: Mapping[str, float]


def check_decoder(name: str, decoder: Decoder, seed: int = 0) -> Checked:
    """Hold all ways of decoding with these weights, its own too, against no cache at all.

    Raises `CheckpointError` if the model itself gives no finite logits, `WrongDecoder` if a way
    is farther off than rounding explains.
    """
    rng = torch.Generator().manual_seed(seed)
    ids = decoder.prompt(BATCH, PREFILL + STEPS, rng)
    reference = decoder.without_cache(ids)
    if not bool(reference.isfinite().all()):
        raise CheckpointError(
            f"{name} gives logits that are not finite numbers", "check its weights, or its --dtype"
        )
    tolerance = TOLERANCES[reference.dtype]
    distances = {}
    for way, other in {"as measured": decoder, **decoder.ways()}.items():
        distance = relative_distance(_decoded(other, ids), reference[:, PREFILL - 1 :])
        # Not "greater": a NaN is wrong too.
        if not distance <= tolerance:
            raise WrongDecoder(
                f"{name}, {way}: logits are {distance:.2g} from those without a cache, allowed is "
                f"{tolerance:.2g}; nothing was measured"
            )
        distances[way] = distance
    return Checked(tolerance, distances)


def relative_distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, in fp64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


def _decoded(decoder: Decoder, ids: Tensor) -> Tensor:
    """Logits (B, STEPS + 1, V) after the prefill and after each further token."""
    decoder.start(ids.shape[0], ids.shape[1])
    found = [decoder.read(ids[:, :PREFILL])]
    found += [decoder.step(ids[:, i : i + 1]) for i in range(PREFILL, ids.shape[1])]
    decoder.stop()
    return torch.stack(found, dim=1)
