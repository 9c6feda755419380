"""The result of `mmmamba inspect --stability` as JSON; read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmmamba_cli.runs.manifest import read_json_as

# Folder of a run with the results of its models, and the file of one.
STABILITY, STABILITY_FILE = "stability", "stability.json"

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _JsonModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HeadDecay(_JsonModel):
    """A head; of a mixer with a decay per key channel, its slowest channel.

    `exponent` is the mean of log gamma over the tokens, `certified` its bound over all prompts,
    `gain` the largest 1 / (1 - gamma); None where gamma rounds to 1. `start` is the exponent of the
    run's seeded student at an input of zeros, where the run still has it.
    """

    exponent: Finite
    certified: Finite
    gain: Finite | None
    state_bound: Finite | None
    start: Finite | None = None
    read_out_median: Finite
    read_out_smallest: Finite
    is_accumulator: bool = False
    is_constant: bool = False


class LayerStability(_JsonModel):
    """A layer. Without a decay it has no heads, and `forgetting` says how it forgets."""

    layer: int
    mixer: str
    # Whether the decay alone moves a deviation, or bounds it; see `MixerSpec.decay`.
    decay: str | None
    forgetting: str | None = None
    heads: tuple[HeadDecay, ...] = ()
    # Share of (token, head) with a read-out whose norm's epsilon matters.
    low_read_outs: Finite = 0.0


class SpanDivergence(_JsonModel):
    """Positions `begin` to `end` - 1."""

    begin: int
    end: int
    mean_kl: Finite
    largest_kl: Finite
    largest_difference: Finite
    same_top1: Finite


class SlopeRecord(_JsonModel):
    value: Finite
    low: Finite
    high: Finite
    blocks: int


class PrecisionRecord(_JsonModel):
    """Logits of the narrower dtype against those of fp32."""

    dtype: str
    spans: tuple[SpanDivergence, ...]
    slope: SlopeRecord | None
    median_kl: Finite
    spikes: int
    top1_changes: int
    top1_changes_at_spikes: int
    # Mean KL of each block of 64 positions.
    block_kl: tuple[Finite, ...]


class DeviationRecord(_JsonModel):
    """Two runs over the same tokens, of which one is disturbed; at `tokens` after it began.

    `what` is `state`: the states are off by `size` times their norm, once; or `input`: the
    embeddings are off by errors of one rounding to `dtype` at every token. `layers` is |dS| / |S|
    of each layer with a decay, `logits` the norm of the difference of logits, mean since the place
    before. `predicted` is what the decays say of the first of these layers, for `state` only.
    """

    what: Literal["state", "input"]
    size: Finite | None = None
    dtype: str | None = None
    tokens: tuple[int, ...]
    layers: dict[int, tuple[Finite, ...]]
    logits: tuple[Finite, ...]
    predicted: tuple[Finite, ...] = ()


class TangentRecord(_JsonModel):
    """Largest exponents of the whole recurrence by tangents, over both halves of the text.

    `head_exponents` are the largest exponents of a head over the same tokens.
    """

    vectors: int
    tokens: int
    halves: tuple[Finite, Finite]
    head_exponents: tuple[Finite, Finite]
    largest_growth: Finite


class StabilityRecord(_JsonModel):
    """`created` is an ISO date; `content_hash` that of a run's product, None for other models."""

    format: Literal[1] = 1
    name: str
    content_hash: str | None
    text: str
    tokens: int
    command: str | None = None
    created: str
    device: str
    versions: dict[str, str]
    seed: int
    layers: tuple[LayerStability, ...]
    # Read-outs whose root mean square is below this are `low_read_outs`.
    low_read_out: Finite
    precision: PrecisionRecord | None = None
    deviations: tuple[DeviationRecord, ...] = ()
    tangents: TangentRecord | None = None
    # Parts that were not measured, with the reason.
    not_measured: tuple[str, ...] = ()


def read_stability(file: Path) -> StabilityRecord:
    """Read a result. Raises `RunError` if it is missing or damaged."""
    return read_json_as(file, StabilityRecord)
