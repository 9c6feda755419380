"""Our mixers in the place of `self_attn` of a transformers decoder layer.

A module here is a mixer of `model.mixers` whose W_Q, W_K, W_V, W_O and norms of q and k are the
teacher's own modules, under their names: a student's tensors are the teacher's plus those that the
mixer adds. Legend: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, initialization

from mmmamba_cli.architecture import TextStack
from mmmamba_cli.model.cache import resolve_cache
from mmmamba_cli.model.mixer import mixer_class, parameter_generator
from mmmamba_cli.teachers.anatomy import PROJECTIONS, QK_NORMS
from mmmamba_cli.teachers.cache_slot import recurrent_slot
from mmmamba_cli.teachers.call_context import CallContext

ADOPTED = (*PROJECTIONS, *QK_NORMS)


class MixerInPlace(nn.Module):
    """Base of the classes that `in_place_class` makes, each with a mixer as its second base.

    `mix` and `mixing_matrix` are the mixer's. `context` is shared by all layers of a model.
    """

    mixer_name: ClassVar[str]
    layer_idx: int

    def __init__(
        self,
        attention: Any,
        shape: TextStack,
        layer_idx: int,
        context: CallContext,
    ):
        device, dtype = attention.q_proj.weight.device, attention.q_proj.weight.dtype
        with torch.device("meta"):
            super().__init__(shape, layer_idx)
        for name in ADOPTED:
            if hasattr(attention, name):
                setattr(self, name, getattr(attention, name))
        # The teacher's, whose attn_implementation may change later.
        self.config = getattr(attention, "config", None)
        self.context = context
        self.adopted: tuple[str, ...] = tuple(name for name in ADOPTED if hasattr(attention, name))
        self.is_initialized = False
        for owner, name, parameter in self.new_parameters():
            kind = dtype if parameter.is_floating_point() else parameter.dtype
            empty = torch.empty_like(parameter, device=device, dtype=kind)
            setattr(owner, name.rpartition(".")[2], nn.Parameter(empty))

    @property
    def uses_rope(self) -> bool:
        """Whether the mixer turns q and k, as the teacher's attention does."""
        return bool(getattr(self, "rope", True))

    def new_parameters(self) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        """Owner, name in this module and value of each parameter that the teacher lacks."""
        for name, parameter in list(self.named_parameters()):
            if name.split(".")[0] not in self.adopted:
                yield self.get_submodule(name.rpartition(".")[0]), name, parameter

    @torch.no_grad()
    def initialize(self, mimic: bool = True, seed: int = 0) -> None:
        """Set the new parameters to the values with which training begins; see `new_value`."""
        for _, name, parameter in self.new_parameters():
            value = new_value(
                self.mixer_name, self.layer_idx, name, tuple(parameter.shape), mimic, seed
            )
            # Keeps what a checkpoint has set.
            initialization.copy_(parameter, value.to(parameter.device))
        self.is_initialized = True

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Mix hidden_states (B, T, D), as attention modules of transformers are called.

        transformers 5.24 calls the cache `cache`, older releases `past_key_values`. `unused` are
        inputs of attention that families add; padding and packing come from the context, since
        `attention_mask` has a form for each backend.

        Returns the output (B, T, D), and None in place of the attention weights.
        """
        cache = resolve_cache(past_key_values, cache)
        slot = None if cache is None else recurrent_slot(cache, self.layer_idx)
        layout = self.context.layout(
            hidden_states,
            position_embeddings,
            past=0 if slot is None else slot.columns,
            is_cached=slot is not None,
            uses_rope=self.uses_rope,
        )
        mixed = self.o_proj(self.mix(hidden_states, layout, cache))  # type: ignore[operator]
        if slot is not None:
            slot.advance(layout.length)
        return mixed, None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Implement pickle, which does not find a class that is made at run time."""
        return new_mixer, (self.mixer_name,), self.__dict__


def new_mixer(name: str) -> MixerInPlace:
    """A mixer without parameters, which `pickle` sets."""
    mixer_class = in_place_class(name)
    return mixer_class.__new__(mixer_class)


@cache
def in_place_class(mixer: str) -> type[MixerInPlace]:
    """The class of mixer `mixer` in the place of attention."""
    base = mixer_class(mixer)
    return type(f"{base.__name__}InPlace", (MixerInPlace, base), {"mixer_name": mixer})


def new_value(
    mixer: str, layer: int, name: str, shape: tuple[int, ...], mimic: bool, seed: int
) -> Tensor:
    """The initial value of parameter `name` of the mixer in text layer `layer`: `shape`, fp32.

    Random numbers depend on the seed, the layer and the name alone. See `Mixer.initial_value` for
    `mimic`.
    """
    if name.split(".")[0] in QK_NORMS:
        return torch.ones(shape)
    rng = parameter_generator(f"layers.{layer}.{name}", seed)
    value: Tensor = mixer_class(mixer).initial_value(name, shape, mimic, rng)
    return value
