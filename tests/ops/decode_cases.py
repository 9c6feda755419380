"""Random mixers, and plain implementations of RoPE and attention, for tests of decoding steps."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.ops import causal_conv, ssd
from mmmamba_cli.ops.decode import MixerWeights


@dataclass(frozen=True)
class Sizes:
    batch: int = 2
    kv_heads: int = 2
    share: int = 2
    P: int = 6
    N: int = 5
    taps: int = 4

    @property
    def heads(self) -> int:
        return self.kv_heads * self.share

    @property
    def channels(self) -> int:
        return self.kv_heads * (self.P + self.N) + self.heads * self.N


def random(seed: int, dtype: torch.dtype = torch.float64):
    """A function of a shape that draws normal numbers on the CPU, the same on every device."""
    rng = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def mixer_weights(
    sizes: Sizes,
    dtype: torch.dtype = torch.float64,
    *,
    without: str = "",
) -> MixerWeights:
    """Mixer weights of a model in `dtype`; parameters of heads stay in fp32, or fp64."""
    normal = random(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = MixerWeights(
        normal(sizes.channels, sizes.taps).to(dtype),
        normal(sizes.channels).to(dtype),
        -normal(sizes.heads).exp().to(wide),
        normal(sizes.heads).to(wide),
        normal(sizes.heads).to(wide),
    )
    return weights._replace(**{without: None}) if without else weights


def whole_mixer(
    vkq: Tensor, dt: Tensor, sizes: Sizes, weights: MixerWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H, P), and the states of the two ops, of tokens vkq (B, T, Ch) and dt (B, T, H)."""
    mixed, conv_state = causal_conv(vkq, weights.conv_weight, weights.conv_bias)
    widths = (sizes.kv_heads * sizes.P, sizes.kv_heads * sizes.N, sizes.heads * sizes.N)
    v, k, q = mixed.split(widths, dim=-1)
    y, state = ssd(
        v.unflatten(-1, (sizes.kv_heads, sizes.P)),
        dt,
        weights.A,
        k.unflatten(-1, (sizes.kv_heads, sizes.N)),
        q.unflatten(-1, (sizes.heads, sizes.N)),
        dt_bias=weights.dt_bias,
        dt_softplus=True,
        D=weights.D,
        backend="recurrent",
    )
    return y, conv_state, state


def from_ring_buffer(conv_ring: Tensor, position: int) -> Tensor:
    """Inverse of `to_ring_buffer`: the W - 1 tokens before `position`, (B, Ch, W - 1)."""
    return conv_ring.roll(-(position % conv_ring.shape[-1]), dims=-1)[..., 1:]


def angles(columns: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine (columns, P), both halves the same."""
    turns = columns.double().unsqueeze(1) * 0.7 ** torch.arange(dim // 2)
    return torch.cat((turns, turns), 1).cos(), torch.cat((turns, turns), 1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (p, p + P / 2) of x (..., P) as complex numbers times e^(i angle)."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(
        cos[..., :half], sin[..., :half]
    )
    return torch.cat((turned.real, turned.imag), -1)


def attention(q: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
    """One row's read-out (H, P): q (H, P) over columns `first` and on of keys (K, S, P), fp64."""
    share = q.shape[0] // keys.shape[0]
    found = []
    for head, query in enumerate(q):
        scores = keys[head // share, first:] @ query / math.sqrt(q.shape[1])
        found.append(torch.softmax(scores, 0) @ values[head // share, first:])
    return torch.stack(found)
