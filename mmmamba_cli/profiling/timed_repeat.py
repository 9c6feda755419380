"""One turn of a loaded decoder: some tokens, or one prompt, with their time and their memory."""

from __future__ import annotations

import torch

from mmmamba_cli.profiling.interfaces import Decoder
from mmmamba_cli.profiling.result import Memory
from mmmamba_cli.profiling.timers import Instruments

Turn = tuple[tuple[float, ...], Memory]
WARM_READS = 2
# A prompt that is read within so many seconds is read so often: a host's hiccup is as long. One
# that takes no more than a hiccup longer at first gets a second try.
SHORT, READS_IF_SHORT, HICCUP = 0.2, 5, 0.5


def decode_turn(
    decoder: Decoder,
    meter: Instruments,
    *,
    batch: int,
    context: int,
    warm_up: int,
    repeats: int,
    burst: int,
    rng: torch.Generator,
    apart: bool = False,
) -> Turn:
    """Seconds a token after `context` others, forward and greedy choice, of each burst.

    `apart` says that no other model is in memory: then its peak is what the device's allocator
    held, all of it. Afterwards the decoder holds no cache. Raises whatever says that memory did
    not suffice.
    """
    before = meter.allocated()
    meter.reset_peak()
    decoder.start(batch, context + warm_up + repeats * burst)
    # What is captured now is held while tokens are made, where the allocator does not count it.
    captured = meter.peak()
    decoder.fill(batch, context, rng)
    meter.reset_peak()
    if warm_up:
        decoder.tokens(warm_up)
    seconds = tuple(meter.seconds(lambda: decoder.tokens(burst)) / burst for _ in range(repeats))
    return seconds, _memory(decoder, meter, before, captured, apart)


def prefill_turn(
    decoder: Decoder,
    meter: Instruments,
    *,
    batch: int,
    context: int,
    chunk: int | None,
    warm: bool,
    rng: torch.Generator,
) -> Turn:
    """Seconds of reading `context` tokens up to the logits after the last, more than once if short.

    `warm` reads them twice before: whatever is compiled or captured then is. The rest as in
    `decode_turn`.
    """
    ids = decoder.prompt(batch, context, rng)
    before = meter.allocated()
    meter.reset_peak()
    for _ in range(WARM_READS if warm else 0):
        decoder.start(batch, context)
        decoder.read(ids, chunk)
    seconds: list[float] = []
    while len(seconds) < READS_IF_SHORT and (
        not seconds or min(seconds) <= SHORT or (len(seconds) == 1 and seconds[0] <= HICCUP)
    ):
        decoder.start(batch, context)
        seconds.append(meter.seconds(lambda: decoder.read(ids, chunk)))
    return tuple(seconds), _memory(decoder, meter, before)


def _memory(
    decoder: Decoder,
    meter: Instruments,
    before: int | None,
    captured: int | None = None,
    apart: bool = False,
) -> Memory:
    """As `result.Memory` tells; the decoder lets go of its cache."""
    peak = meter.peak()
    weights, cache = decoder.weight_bytes, decoder.cache_bytes
    decoder.stop()
    if peak is None or before is None:
        return Memory(weights=weights, cache=cache)
    highest = max(peak, captured or 0)
    found = highest if apart else weights + highest - before
    return Memory(weights=weights, cache=cache, peak=found, apart=apart)
