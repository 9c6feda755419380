"""The interface of a mixer, and the registry of mixer classes.

Legend: B batch, T tokens, D hidden size, H query heads, P head dim.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import Cache

from mmmamba_cli.architecture import MixerShape
from mmmamba_cli.model.norm import RMSNorm
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.ops.backends import without_autocast


class Mixer(Protocol):
    """Mixes the columns of a sequence, (B, T, D) -> (B, T, D); an `nn.Module`.

    All mixers have W_Q, W_K, W_V and W_O under the names of attention, so that a teacher's weights
    fit. The constructor takes a `MixerShape`, such as the config, and the layer, counted through
    both stacks.

    Attributes:
        input_projections: names of the projections of the mixer's input, in the order in which they
            are packed into one weight for decoding.
        output_norm: norm between the read-out and W_O; None if there is none.
    """

    input_projections: ClassVar[tuple[str, ...]]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    o_proj: Any
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None

    @property
    def output_norm(self) -> RMSNorm | None: ...

    def __call__(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """Mix and project by W_O. Attention appends its softmax to `weights` if given."""
        ...

    def mix(self, hidden: Tensor, layout: SequenceLayout, cache: Cache | None = None) -> Tensor:
        """The output before W_O, (B, T, H * P)."""
        ...

    def mixing_matrix(self, hidden: Tensor, layout: SequenceLayout) -> Tensor:
        """The matrix that maps values to read-outs, (B, H, T, T) fp32, 0 at masked keys."""
        ...

    def empty_states(self, batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Zeroed conv and recurrent states of `batch` rows, on the device of `like`.

        Only mixers of "linear_attention" layers have them.
        """
        ...

    def reset_parameters(self) -> None:
        """Set the parameters that are neither projections nor norms to their initial values."""
        ...

    @staticmethod
    def initial_value(
        name: str, shape: tuple[int, ...], mimic: bool, rng: torch.Generator
    ) -> Tensor:
        """The value, fp32, with which seeding begins a parameter that attention lacks.

        With `mimic` the mixer imitates attention as closely as it can; otherwise the value is the
        default of the mixer's own paper.
        """
        ...


MixerClass = TypeVar("MixerClass", bound=Callable[[MixerShape, int], Any])
_CLASSES: dict[str, Any] = {}


def register_mixer(name: str) -> Callable[[MixerClass], MixerClass]:
    """Class decorator: register the mixer that `config.mixers` calls `name`."""

    def register(cls: MixerClass) -> MixerClass:
        _CLASSES[name] = cls
        return cls

    return register


def mixer_class(name: str) -> Any:
    """The class of mixer `name`, which `MixerSpec` describes."""
    if name not in _CLASSES:
        importlib.import_module(f"{__package__}.mixers.{name}")
    return _CLASSES[name]


def parameter_generator(name: str, seed: int) -> torch.Generator:
    """A random generator that depends on a parameter's name and the seed alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def query_key_products(q: Tensor, k: Tensor) -> Tensor:
    """q_t . k_s for all t and s, (B, H, T, T), from q (B, T, H, P) and k (B, T, K, P).

    In the dtype of q and k; autocast is disabled, which would round the products to bf16.
    """
    groups = q.shape[2] // k.shape[2]
    with without_autocast(q):
        return torch.einsum("bthp,bshp->bhts", q, k.repeat_interleave(groups, dim=2))
