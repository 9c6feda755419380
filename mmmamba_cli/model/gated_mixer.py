"""Base of the recurrent mixers: projections, short convolution, gated norm, and a scan between.

W_Q, W_K, W_V and W_O come from the teacher, with its biases and its norm on q and k if present. New
are a short convolution over [v, k, q], a gated norm on the output (mmMamba, arXiv 2502.13145,
section 3), and what the scan of each mixer needs. Legend: B batch, T tokens, D hidden size, H query
heads, K key/value heads shared by H / K query heads each, P head dim = state dim, W conv width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, initialization

from mmmamba_cli.architecture import MixerConfig, MixerShape, StackConfig, layer_options
from mmmamba_cli.model.cache import read_ssm_state, write_ssm_state
from mmmamba_cli.model.norm import GatedRMSNorm, RMSNorm
from mmmamba_cli.model.rope import apply_rope
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.model.tiles import add_tile_taps
from mmmamba_cli.ops import causal_conv
from mmmamba_cli.ops.backends import compute_dtype, upcast

GATED_NORM_EPS = 1e-5
GATE_GAIN = 2**-2.5
DT_MIN, DT_MAX = 1e-3, 1e-1


class CausalConv(nn.Conv1d):
    """Depthwise causal convolution and SiLU over the channels of [v, k, q], (B, T, channels).

    `tile_taps` (3, channels) are three more taps inside tiles; see `add_tile_taps`. A separate
    module, so that hooks that move weights to a device (accelerate) see its call.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        layout: SequenceLayout,
        state: Tensor | None = None,
        tile_taps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        weight = self.weight.squeeze(1)
        if tile_taps is None:
            return causal_conv(
                x,
                weight,
                self.bias,
                initial_state=state,
                mask=layout.mask,
                seq_idx=layout.seq_idx,
            )
        # In fp32, as the op computes: with the reference, taps of 0 leave the bits as they are.
        y, state = causal_conv(
            upcast(x),
            weight,
            self.bias,
            activation=None,
            initial_state=state,
            mask=layout.mask,
            seq_idx=layout.seq_idx,
        )
        tiles = layout.tiles
        if tiles is None:
            tiles = torch.zeros(0, 1, 1, dtype=torch.long, device=x.device)
        return F.silu(add_tile_taps(y, x, tile_taps, tiles)).to(x.dtype), state.to(x.dtype)


class GatedMixer(nn.Module):
    """A recurrent mixer, (B, T, D) -> (B, T, D); `mix` omits W_O.

    A subclass adds its parameters in `add_gates` and implements `scan`. The state (B, H, P, P) is
    fp32 for weights of any dtype.
    """

    def __init__(self, config: MixerShape, layer_idx: int):
        super().__init__()
        stack, options = config.stack_of(layer_idx), layer_options(config, layer_idx)
        hidden_size = config.hidden_size
        self.layer_idx = layer_idx
        self.num_heads = stack.num_heads
        self.num_kv_heads = stack.num_kv_heads
        self.head_dim = stack.head_dim
        self.rope = options.rope
        self.width = stack.num_heads * stack.head_dim
        self.kv_width = stack.num_kv_heads * stack.head_dim
        channels = self.width + 2 * self.kv_width
        self.q_proj = nn.Linear(hidden_size, self.width, bias=stack.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, self.kv_width, bias=stack.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, self.kv_width, bias=stack.qkv_bias)
        self.o_proj = nn.Linear(self.width, hidden_size, bias=stack.output_bias)
        self.g_proj = nn.Linear(hidden_size, self.width, bias=False)
        self.add_gates(hidden_size, stack, options)
        self.tile_taps = nn.Parameter(torch.zeros(3, channels)) if options.tile_taps else None
        self.conv1d = CausalConv(channels, channels, options.conv_width, groups=channels)
        self.g_norm = GatedRMSNorm(stack.head_dim, GATED_NORM_EPS)
        qk_norm = options.qk_norm or stack.qk_norm
        self.q_norm = RMSNorm(stack.head_dim, stack.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(stack.head_dim, stack.rms_norm_eps) if qk_norm else None

    def add_gates(self, hidden_size: int, stack: StackConfig, options: MixerConfig) -> None:
        """Add the parameters of the scan: projections of the input, and vectors."""
        raise NotImplementedError

    def scan(
        self,
        v: Tensor,
        k: Tensor,
        q: Tensor,
        hidden: Tensor,
        layout: SequenceLayout,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The read-out (B, T, H, P) and the state (B, H, P, P) after the last column.

        v and k are (B, T, K, P), q is (B, T, H, P); `hidden` (B, T, D) is the mixer's input.
        """
        raise NotImplementedError

    def log_decay(self, hidden: Tensor) -> Tensor:
        """log gamma of each token, (B, T, H), or (B, T, H, P) for a decay per key channel.

        fp32, or fp64 for fp64 weights; at most 0. `hidden` (B, T, D) is the mixer's input.
        """
        raise NotImplementedError

    def max_log_decay(self, input_gain: Tensor) -> Tensor:
        """The least upper bound of `log_decay` over all inputs, (H,) or (H, P), below 0.

        Inputs are `input_gain` (D,) times a vector whose norm is at most sqrt(D), as those of an
        RMSNorm with that weight.
        """
        raise NotImplementedError

    @staticmethod
    def projection_reach(weight: Tensor, input_gain: Tensor) -> Tensor:
        """The largest |w x| of each row w of `weight` (N, D), (N,), dtype of `compute_dtype`.

        x = g * u with g = `input_gain` (D,) and |u| <= sqrt(D): |w x| <= sqrt(D) |w * g| by
        Cauchy-Schwarz, with equality for a u in the direction of w * g.
        """
        rows = upcast(weight) * upcast(input_gain)
        return math.sqrt(weight.shape[-1]) * torch.linalg.vector_norm(rows, dim=-1)

    def write_strength(self, hidden: Tensor) -> Tensor:
        """The factor of v k^T that a token adds to the state, (B, T, H), dtype as `log_decay`.

        1 for every token, unless a subclass computes it.
        """
        return upcast(hidden).new_ones(*hidden.shape[:2], self.num_heads)

    def reset_parameters(self) -> None:
        """Set the parameters outside of modules to their initial values."""
        if self.tile_taps is not None:
            initialization.zeros_(self.tile_taps)

    @property
    def output_norm(self) -> RMSNorm:
        return self.g_norm

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """Apply the mixer. `weights` is ignored: it collects the softmax of attention layers."""
        return self.o_proj(self.mix(hidden, layout, cache))

    def mix(self, hidden: Tensor, layout: SequenceLayout, cache: Cache | None = None) -> Tensor:
        """Compute the gated, normed read-out before W_O, (B, T, H * P)."""
        batch, length, _ = hidden.shape
        conv_state, state = read_ssm_state(cache, self.layer_idx)
        v, k, q, conv_state = self.values_keys_queries(hidden, layout, conv_state)
        y, state = self.scan(v, k, q, hidden, layout, state)
        write_ssm_state(cache, self.layer_idx, conv_state, state)
        gate = self.g_proj(hidden).view(batch, length, self.num_heads, self.head_dim)
        return self.g_norm(y, gate).reshape(batch, length, self.width)

    def empty_states(self, batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Conv state (B, channels, W - 1), and state (B, H, P, P) in fp32, or fp64 for fp64."""
        channels, _, width = self.conv1d.weight.shape
        shape = (batch, self.num_heads, self.head_dim, self.head_dim)
        return (
            like.new_zeros(batch, channels, width - 1),
            like.new_zeros(shape, dtype=compute_dtype(like)),
        )

    def values_keys_queries(
        self, hidden: Tensor, layout: SequenceLayout, conv_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """v and k (B, T, K, P), q (B, T, H, P), the inputs of the scan, and the conv state."""
        batch, length, _ = hidden.shape
        vkq = torch.cat((self.v_proj(hidden), self.k_proj(hidden), self.q_proj(hidden)), dim=-1)
        vkq, conv_state = self.conv1d(vkq, layout, conv_state, self._taps_for(layout))
        v, k, q = vkq.split((self.kv_width, self.kv_width, self.width), dim=-1)
        v = v.view(batch, length, self.num_kv_heads, self.head_dim)
        k = k.view(batch, length, self.num_kv_heads, self.head_dim)
        q = q.view(batch, length, self.num_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            # A norm of transformers returns fp32 where its weight is an fp32 master, and the scan
            # would then be one of fp32 inputs.
            q, k = self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)
        if self.rope:
            q = apply_rope(q, layout.cos, layout.sin)
            k = apply_rope(k, layout.cos, layout.sin)
        return v, k, q, conv_state

    def _taps_for(self, layout: SequenceLayout) -> Tensor | None:
        """The taps inside tiles; None where the layer has none or the call holds no tile.

        Taps that learn are used for text too: FSDP needs gradients of the same parameters on all
        processes, whose batches may or may not hold tiles.
        """
        taps = self.tile_taps
        if taps is None or layout.tiles is not None:
            return taps
        return taps if taps.requires_grad and torch.is_grad_enabled() else None


def initial_gated_value(
    name: str, shape: tuple[int, ...], mimic: bool, rng: torch.Generator
) -> Tensor:
    """The initial value of a parameter of recurrent mixers; see `Mixer.initial_value`.

    To mimic attention, the convolution begins as the identity, the gate small, and the projections
    of the decay and of beta as zeros, so that all tokens are alike; of two in a row only the second
    (`_up_proj`). Otherwise they have the defaults of arXiv 2405.21060, as `dt_bias` and `A_log`.
    """
    if name == "dt_bias":
        return dt_bias(shape, rng)
    if name == "A_log":
        return torch.ones(shape) if mimic else torch.log(torch.rand(shape, generator=rng) * 15 + 1)
    if name.endswith("_down_proj.weight"):
        return linear_default(shape, rng)
    if name.endswith(("_up_proj.weight", "dt_proj.weight", "beta_proj.weight")):
        return torch.zeros(shape) if mimic else linear_default(shape, rng)
    if name == "g_norm.weight":
        return torch.ones(shape)
    if name == "g_proj.weight" and mimic:
        return uniform(shape, GATE_GAIN * math.sqrt(6 / (shape[0] + shape[1])), rng)
    if name == "conv1d.weight" and not mimic:
        return uniform(shape, 1 / math.sqrt(shape[-1]), rng)
    value = torch.zeros(shape)
    if name == "conv1d.weight":
        value[..., -1] = 1
    elif name == "g_proj.weight":
        return linear_default(shape, rng)
    elif name not in ("conv1d.bias", "tile_taps"):
        raise KeyError(name)
    return value


def dt_bias(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """(H,) softplus^-1 of exp(U[log 1e-3, log 1e-1]), clamped at 1e-3."""
    span = math.log(DT_MAX) - math.log(DT_MIN)
    dt = torch.exp(torch.rand(shape, generator=rng) * span + math.log(DT_MIN)).clamp(min=DT_MIN)
    return dt + torch.log(-torch.expm1(-dt))


def linear_default(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """PyTorch's default of a linear layer: U[-1/sqrt(fan_in), 1/sqrt(fan_in)]."""
    return uniform(shape, 1 / math.sqrt(shape[-1]), rng)


def uniform(shape: tuple[int, ...], bound: float, rng: torch.Generator) -> Tensor:
    """U[-bound, bound]."""
    return torch.rand(shape, generator=rng).mul_(2).sub_(1).mul_(bound)
