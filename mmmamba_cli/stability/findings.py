"""What a stability result says, in sentences; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median

from mmmamba_cli.architecture import DECAY_BOUND
from mmmamba_cli.stability.stability_record import (
    DeviationRecord,
    HeadDecay,
    LayerStability,
    PrecisionRecord,
    StabilityRecord,
)

# Half-lives, in tokens, that count as short and as long memory.
SHORT_MEMORY, LONG_MEMORY = 4.0, 1024.0
# A bound below this share of the slowest exponent is loose.
LOOSE_SHARE = 0.1
# Deviations of fp32 states below this share of their norm are rounding.
ROUNDING_SHARE = 1e-6


def half_life(exponent: float) -> float:
    """Tokens after which half of a deviation is left; infinite for an exponent of 0."""
    return math.inf if exponent >= 0 else math.log(2) / -exponent


def format_tokens(tokens: float) -> str:
    """A number of tokens with two digits below ten."""
    if not math.isfinite(tokens):
        return "infinitely many"
    return f"{tokens:,.0f}" if tokens >= 10 else f"{tokens:.2g}"


def share_of(heads: Sequence[HeadDecay], *, low: float = 0.0, high: float = math.inf) -> float:
    """Share of heads whose half-life is at least `low` and below `high` tokens."""
    if not heads:
        return 0.0
    inside = [low <= half_life(head.exponent) < high for head in heads]
    return sum(inside) / len(heads)


def find_sentences(record: StabilityRecord) -> list[str]:
    """All findings, the memory first."""
    found = [*_memory(record.layers), *_layers_without_decay(record.layers)]
    if record.precision is not None:
        found += _precision(record.precision)
    for deviation in record.deviations:
        found += _deviation(deviation)
    found += _tangents(record)
    return [*found, *_read_outs(record.layers, record.low_read_out)]


def _memory(layers: Sequence[LayerStability]) -> Iterator[str]:
    decaying = [layer for layer in layers if layer.heads]
    if not decaying:
        return
    heads = [head for layer in decaying for head in layer.heads]
    longest = max(decaying, key=lambda one: max(head.exponent for head in one.heads))
    slowest = max(longest.heads, key=lambda head: head.exponent)
    gain = max((head.gain or math.inf for head in longest.heads), default=math.inf)
    held = "without a bound" if math.isinf(gain) else f"to at most {gain:,.0f} times one"
    yield (
        f"Layer {longest.layer} remembers longest: half of a state is left after "
        f"{format_tokens(half_life(slowest.exponent))} tokens, and errors of one size at every "
        f"token add up {held}."
    )
    short, long = share_of(heads, high=SHORT_MEMORY), share_of(heads, low=LONG_MEMORY)
    yield (
        f"{short:.0%} of {len(heads)} heads have a half-life below {SHORT_MEMORY:g} tokens, "
        f"{long:.0%} of at least {LONG_MEMORY:,.0f}."
    )
    certified = max(head.certified for head in heads)
    if certified < 0:
        is_loose = certified > LOOSE_SHARE * max(head.exponent for head in heads)
        yield (
            f"Every head forgets, whatever the prompt: log gamma is at most {certified:.1e} a "
            f"token by the weights alone.{' The bound is loose.' if is_loose else ''}"
        )
    else:
        yield "The weights alone do not certify that every head forgets: a bound rounds to 0."
    yield from _marked_heads(decaying)
    bounds = [layer for layer in decaying if layer.decay == DECAY_BOUND]
    if bounds:
        titles = " and ".join(dict.fromkeys(layer.mixer for layer in bounds))
        yield (
            f"Exponents of {len(bounds)} layer{'s' if len(bounds) > 1 else ''} ({titles}) are "
            "upper bounds: a delta rule also "
            "removes what the state holds for a key."
        )


def _marked_heads(layers: Sequence[LayerStability]) -> Iterator[str]:
    heads = [head for layer in layers for head in layer.heads]
    accumulators = sum(head.is_accumulator for head in heads)
    if accumulators:
        yield (
            f"{_count(accumulators, 'head', 'forgets', 'forget', 'never ')} in fp32: gamma rounds "
            "to 1 at every token, so that the certificate does not hold in practice."
        )
    forgetful = sum(half_life(head.exponent) < 1 for head in heads)
    if forgetful:
        subject = _count(forgetful, "head", "loses", "lose")
        yield f"{subject} more than half of the state at each token."
    constant = sum(head.is_constant for head in heads)
    if constant:
        yield (
            f"{_count(constant, 'head', 'has', 'have')} a decay that does not depend on the input."
        )


def _count(number: int, noun: str, verb: str, plural_verb: str, adverb: str = "") -> str:
    """A number of things as the subject of a verb."""
    if number == 1:
        return f"{number} {noun} {adverb}{verb}"
    return f"{number} {noun}s {adverb}{plural_verb}"


def _layers_without_decay(layers: Sequence[LayerStability]) -> Iterator[str]:
    others = [layer for layer in layers if layer.decay is None]
    for mixer, forgetting in dict.fromkeys((one.mixer, one.forgetting) for one in others):
        number = sum((one.mixer, one.forgetting) == (mixer, forgetting) for one in others)
        yield (
            f"{number} of {len(layers)} layers {'has' if number == 1 else 'have'} {mixer}, which "
            f"{forgetting}: no decay and no certificate there."
        )


def _precision(found: PrecisionRecord) -> Iterator[str]:
    tokens = sum(span.end - span.begin for span in found.spans)
    mean = sum(span.mean_kl * (span.end - span.begin) for span in found.spans) / tokens
    same = 1 - found.top1_changes / tokens
    yield (
        f"{found.dtype} moves the logits by a KL of {mean:.1e} nats on average and keeps "
        f"{same:.1%} of the likeliest tokens; {found.top1_changes_at_spikes} of "
        f"{found.top1_changes} changes are at the {found.spikes:,} positions with more than 10 "
        "times the median KL."
    )
    slope = found.slope
    if slope is None:
        yield "The text is too short for a slope over its length."
        return
    verdict = "does not depend on"
    if slope.low > 0:
        verdict = "grows with"
    elif slope.high < 0:
        verdict = "falls with"
    yield (
        f"That error {verdict} the length: the slope of log KL over log position is "
        f"{slope.value:.2f} (95 % interval {slope.low:.2f} to {slope.high:.2f})."
    )


def _deviation(found: DeviationRecord) -> Iterator[str]:
    if not any(found.logits):
        return
    first, last, largest = found.logits[0], found.logits[-1], max(found.logits)
    if found.what == "input":
        last_span = found.tokens[-1] - (found.tokens[-2] if len(found.tokens) > 1 else 0)
        yield (
            f"Inputs off by one rounding to {found.dtype} at every token move the logits by "
            f"{largest:.2g} at most and by {last:.2g} over the last {last_span:,} tokens "
            "(norm of the difference)."
        )
        return
    yield (
        f"States off once by {found.size:g} of their norm move the logits by {first:.2g} at the "
        f"next token, by {largest:.2g} at most, and by {last:.2g} after "
        f"{found.tokens[-1]:,} tokens."
    )
    layer = min(found.layers)
    errors = [
        abs(there / said - 1)
        for there, said in zip(found.layers[layer], found.predicted, strict=True)
        if said > ROUNDING_SHARE
    ]
    if errors:
        yield (
            f"The state of layer {layer} follows its decays: it differs from what they predict by "
            f"at most {max(errors):.1e} of it."
        )


def _tangents(record: StabilityRecord) -> Iterator[str]:
    found = record.tangents
    if found is None:
        return
    second, predicted = found.halves[1], found.head_exponents[1]
    yield (
        f"The largest exponent of the whole student is {second:.4f} over the second half of the "
        f"text, that of a head {predicted:.4f}; a random error of the memory grows at most "
        f"{found.largest_growth:.2g}-fold before it dies."
    )
    if second > 0:
        yield "It is positive: over this text, errors grew, and a longer one is needed."


def _read_outs(layers: Sequence[LayerStability], low: float) -> Iterator[str]:
    decaying = [layer for layer in layers if layer.heads]
    if not decaying:
        return
    worst = max(decaying, key=lambda one: one.low_read_outs)
    smallest = min(head.read_out_smallest for layer in decaying for head in layer.heads)
    typical = median(head.read_out_median for layer in decaying for head in layer.heads)
    yield (
        f"Read-outs: the smallest rms is {smallest:.1e}, the median of heads {typical:.2g}; "
        f"layer {worst.layer} has most that the gated norm magnifies ({worst.low_read_outs:.1%} "
        f"below {low:.2g})."
    )
