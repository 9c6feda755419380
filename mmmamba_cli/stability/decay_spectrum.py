"""Decays of recurrent layers over a text, and their certificates from the weights alone.

A head's state is S_t = gamma_t S_{t-1} + write. Given the inputs, a token multiplies a deviation of
the state by gamma_t, so that the Lyapunov exponent of the head is the mean of log gamma_t. Legend:
B batch, T tokens, D hidden size, H query heads, K key/value heads, P head dim. "(H, ...)" stands
for (H,), or (H, P) for a decay per key channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from mmmamba_cli.architecture import EXACT_DECAY, MixerSpec
from mmmamba_cli.model.cache import read_ssm_state
from mmmamba_cli.model.gated_mixer import GatedMixer
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.stability.model_layers import decaying_layers, input_gain, layer_specs

# Below this -log gamma, gamma is 1 in fp32: half the distance from 1 to the next smaller number.
FP32_HALF_STEP = 2.0**-25
# Relative range of log gamma over tokens within which a decay does not depend on its input.
CONSTANT_RANGE = 1e-6
MIX = "mix"


def certified_exponents(model: Any, layer: int) -> Tensor:
    """The least upper bound of log gamma of a layer over all prompts, (H, ...), below 0.

    It follows from the weights, because the mixer's input is normed; see
    `GatedMixer.max_log_decay`.
    """
    return decaying_layers(model)[layer].max_log_decay(input_gain(model, layer))


def state_log_decay(spec: MixerSpec, mixer: GatedMixer, hidden: Tensor) -> Tensor:
    """log of the factor that a token applies to a deviation of the state, (T, H, ...).

    That of each key channel where the decay alone moves a deviation. A delta rule moves a deviation
    from channel to channel, so that only the slowest channel bounds it: (T, H). `hidden` is
    (1, T, D).
    """
    found = mixer.log_decay(hidden)[0]
    return found if spec.decay == EXACT_DECAY else slowest_channel(found, 1)


def error_gain(log_decay: Tensor) -> Tensor:
    """1 / (1 - gamma): errors of one size at every token add up to at most this multiple."""
    return -1 / torch.expm1(log_decay)


def slowest_channel(values: Tensor, heads_dim: int) -> Tensor:
    """The largest value of the key channels of each head; `values` without channels as they are."""
    return values.amax(-1) if values.dim() > heads_dim + 1 else values


@dataclass
class DecayTotals:
    """Sums over the tokens of a text, of one layer: decays, writes and read-outs."""

    tokens: int = 0
    # (H, ...) fp64 each.
    total: Tensor | None = None
    largest: Tensor | None = None
    smallest: Tensor | None = None
    # (H,) fp64 each, the largest over tokens: see `state_bounds`.
    write_rate: Tensor | None = None
    outer_norm: Tensor | None = None
    # Root mean square of each head's read-out before norm and gate, parts of (T, H).
    read_out_rms: list[Tensor] = field(default_factory=list)

    def add_decays(self, log_decay: Tensor) -> None:
        """Add log gamma of tokens, (T, H, ...)."""
        wide = log_decay.double()
        self.tokens += len(wide)
        self.total = _combine(torch.add, self.total, wide.sum(0))
        self.largest = _combine(torch.maximum, self.largest, wide.amax(0))
        self.smallest = _combine(torch.minimum, self.smallest, wide.amin(0))

    def add_writes(self, rate: Tensor, outer_norms: Tensor) -> None:
        """Add s_t / (1 - gamma_t) and |v_t| |k_t|, (T, H) each."""
        self.write_rate = _combine(torch.maximum, self.write_rate, rate.amax(0))
        self.outer_norm = _combine(torch.maximum, self.outer_norm, outer_norms.amax(0))

    @property
    def exponents(self) -> Tensor:
        """The finite-time exponents, the mean of log gamma over all tokens, (H, ...) fp64."""
        assert self.total is not None
        return self.total / self.tokens

    @property
    def is_constant(self) -> Tensor:
        """(H,) bool: the decay of a head does not depend on its input."""
        assert self.largest is not None and self.smallest is not None
        spread = self.largest - self.smallest
        same = spread <= CONSTANT_RANGE * self.smallest.abs()
        return same.all(-1) if same.dim() > 1 else same

    @property
    def is_accumulator(self) -> Tensor:
        """(H,) bool: gamma of the slowest channel rounds to 1 in fp32 at every token."""
        assert self.smallest is not None
        return slowest_channel(self.smallest, 0) > -FP32_HALF_STEP

    @property
    def error_gains(self) -> Tensor:
        """(H,) the largest 1 / (1 - gamma) over tokens and channels."""
        assert self.largest is not None
        return error_gain(slowest_channel(self.largest, 0))

    @property
    def state_bounds(self) -> Tensor:
        """(H,) a bound of the Frobenius norms of the states at all tokens.

        max_t (s_t / (1 - gamma_t)) max_t |v_t| |k_t| for writes s_t v_t k_t^T, by induction over
        tokens from a zero state, with the slowest decay of a head.
        """
        assert self.write_rate is not None and self.outer_norm is not None
        return self.write_rate * self.outer_norm


def _combine(
    reduce: Callable[[Tensor, Tensor], Tensor], total: Tensor | None, part: Tensor
) -> Tensor:
    return part if total is None else reduce(total, part)


MixerCall = Callable[[int, Tensor, SequenceLayout, Cache | None], None]
ReadOut = Callable[[int, Tensor], None]


@contextmanager
def observed_mixers(
    model: Any, on_call: MixerCall, on_read_out: ReadOut | None = None
) -> Iterator[None]:
    """Inside, report every call of the mixers whose state decays, before it runs.

    `on_call` gets the layer, the mixer's input (B, T, D), its layout and its cache, `on_read_out`
    the layer and the read-out (B, T, H, P) before norm and gate.
    """
    handles, wrapped = [], []
    try:
        for layer, mixer in decaying_layers(model).items():
            # Modules of both kinds of models call `mix` with the same arguments, and are themselves
            # called with others.
            setattr(mixer, MIX, partial(_report_call, on_call, layer, mixer.mix))
            wrapped.append(mixer)
            if on_read_out is not None:
                hook = partial(_report_read_out, on_read_out, layer)
                handles.append(mixer.output_norm.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for mixer in wrapped:
            # The method of the class is left.
            delattr(mixer, MIX)


def _report_call(
    on_call: MixerCall,
    layer: int,
    mix: Callable[[Tensor, SequenceLayout, Cache | None], Tensor],
    hidden: Tensor,
    layout: SequenceLayout,
    cache: Cache | None = None,
) -> Tensor:
    on_call(layer, hidden, layout, cache)
    return mix(hidden, layout, cache)


def _report_read_out(
    on_read_out: ReadOut, layer: int, module: nn.Module, arguments: tuple[Tensor, ...]
) -> None:
    on_read_out(layer, arguments[0])


class DecayObserver:
    """The totals of every layer whose state decays, while a text of one row passes."""

    def __init__(self, model: Any):
        self._mixers = decaying_layers(model)
        self._specs = layer_specs(model)
        self.totals = {layer: DecayTotals() for layer in self._mixers}

    def on_call(
        self, layer: int, hidden: Tensor, layout: SequenceLayout, cache: Cache | None
    ) -> None:
        mixer, totals = self._mixers[layer], self.totals[layer]
        log_decay = state_log_decay(self._specs[layer], mixer, hidden)
        totals.add_decays(log_decay)
        conv_state, _ = read_ssm_state(cache, layer)
        v, k, _, _ = mixer.values_keys_queries(hidden, layout, conv_state)
        slowest = slowest_channel(log_decay, 1).double()
        rate = mixer.write_strength(hidden)[0].double() * error_gain(slowest)
        totals.add_writes(rate, head_norms(mixer, v) * self._key_norms(layer, k))

    def on_read_out(self, layer: int, read_out: Tensor) -> None:
        self.totals[layer].read_out_rms.append(root_mean_square(read_out[0]))

    def _key_norms(self, layer: int, k: Tensor) -> Tensor:
        norms = head_norms(self._mixers[layer], k)
        # A delta rule divides keys by their norm.
        return norms if self._specs[layer].decay == EXACT_DECAY else torch.ones_like(norms)


def head_norms(mixer: GatedMixer, tokens: Tensor) -> Tensor:
    """Norms of the values or keys (1, T, K, P) that each head reads, (T, H) fp64."""
    norms = torch.linalg.vector_norm(tokens[0].double(), dim=-1)
    return norms.repeat_interleave(mixer.num_heads // mixer.num_kv_heads, dim=-1)


def root_mean_square(values: Tensor) -> Tensor:
    """Over the last dimension, in fp64."""
    return values.double().square().mean(-1).sqrt()
