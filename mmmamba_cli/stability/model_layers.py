"""The layers of a model that stability looks at: those of `HolisticVLM`, or of a student in place.

A student in place is a model of transformers with mixers in the place of the attention of its text
decoder. Its mixers are the same classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmmamba_cli.architecture import (
    ATTENTION,
    MixerConfig,
    MixerSpec,
    layer_options,
    mixer_spec,
    spec_of,
)
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.cache import CACHE_NAME, new_cache
from mmmamba_cli.model.gated_mixer import GatedMixer
from mmmamba_cli.teachers import student_plan
from mmmamba_cli.teachers.anatomy import text_decoder

# Relative difference from an RMSNorm that rounding to fp32 and the norm's epsilon make.
NORM_TOLERANCE = 1e-4
# Far above the epsilon of a norm.
PROBE_SIZE = 1e3


def is_in_place(model: Any) -> bool:
    """Whether a loaded model is of a class of transformers."""
    return not isinstance(model, HolisticVLM)


def layer_specs(model: Any) -> list[MixerSpec]:
    """The spec of the mixer of each layer: through both stacks, or of the text decoder."""
    if not is_in_place(model):
        return [spec_of(model.config, layer) for layer in range(model.config.num_hidden_layers)]
    plan = student_plan(model.config)
    layers = len(text_decoder(model).layers)
    return [mixer_spec(name) for name in ([ATTENTION] * layers if plan is None else plan.mixers)]


def options_of_layer(model: Any, layer: int) -> MixerConfig:
    """The options of a layer's mixer."""
    if not is_in_place(model):
        return layer_options(model.config, layer)
    plan = student_plan(model.config)
    return MixerConfig() if plan is None else plan.options


def decaying_layers(model: Any) -> dict[int, GatedMixer]:
    """The mixers whose state decays, by layer."""
    if is_in_place(model):
        mixers = [getattr(layer, "self_attn", None) for layer in text_decoder(model).layers]
    else:
        mixers = [block.mixer for block in model.model.blocks]
    return {
        layer: mixer
        for layer, (mixer, spec) in enumerate(zip(mixers, layer_specs(model), strict=True))
        if spec.decay is not None and isinstance(mixer, GatedMixer)
    }


def input_gain(model: Any, layer: int) -> Tensor:
    """g (D,) of a layer's mixer, whose input is g times a vector of a norm of at most sqrt(D).

    Raises:
        MmmambaError: what the mixer of a student in place reads is not the output of an RMSNorm.
    """
    if not is_in_place(model):
        weight: Tensor = model.model.blocks[layer].mixer_norm.weight
        return weight
    block = text_decoder(model).layers[layer]
    norm = getattr(block, "input_layernorm", None)
    gain = None if norm is None else _rms_gain(norm, decaying_layers(model)[layer])
    if gain is None:
        raise MmmambaError(
            f"layer {layer} of a {type(model).__name__} has no RMSNorm before its mixer, expected "
            "one, from which the certificate of a decay follows",
            "stability of such students cannot be measured",
        )
    return gain


@torch.no_grad()
def _rms_gain(norm: nn.Module, mixer: GatedMixer) -> Tensor | None:
    """The gain of an RMSNorm, which families store as g or as g - 1; None for another norm."""
    weight = mixer.k_proj.weight
    ones = weight.new_ones(weight.shape[1])
    gain: Tensor = norm(PROBE_SIZE * ones)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(len(ones), generator=generator).to(weight)
    unit = probe / probe.square().mean().sqrt()
    difference = (norm(PROBE_SIZE * probe) - gain * unit).abs().max()
    return gain if difference <= NORM_TOLERANCE * gain.abs().max() * unit.abs().max() else None


class TextPass:
    """A text that passes through a model chunk by chunk, with the model's own cache.

    `tokens` is the length of the whole text.
    """

    def __init__(self, model: Any, tokens: int):
        self.model = model
        self._lengths = torch.tensor([tokens], device=model.device)
        # That of a model of transformers is made by its first call.
        self._cache = None if is_in_place(model) else new_cache(model.config)

    def logits(self, chunk: Tensor) -> Tensor:
        """The logits (T, V) of the next tokens, chunk (1, T)."""
        if not is_in_place(self.model):
            found = self.model(
                chunk, cache=self._cache, use_cache=True, prompt_lengths=self._lengths
            )
            return found.logits[0]
        given = {} if self._cache is None else {CACHE_NAME: self._cache}
        found = self.model(input_ids=chunk, use_cache=True, **given)
        self._cache = found[CACHE_NAME]
        return found.logits[0]
