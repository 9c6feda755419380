"""A walk through a decoder that keeps the hidden states in front of one layer.

Variants of a model that differ in one layer share everything below it, so that all L variants take
about L / 2 forward passes instead of L. Legend: B rows, T columns, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmmamba_cli.layer_selection.probe_samples import ProbeSamples
from mmmamba_cli.model.decoder import HolisticDecoder
from mmmamba_cli.model.mixer import Mixer
from mmmamba_cli.model.sequence_layout import SequenceLayout


class LayerWalk:
    """The inputs of one layer of `decoder` for all batches, from the first layer upwards.

    `mixers` has the layers whose mixer is another one than the decoder's.
    """

    def __init__(
        self, probe: ProbeSamples, decoder: HolisticDecoder, mixers: Mapping[int, Mixer]
    ) -> None:
        self.layer = 0
        self._pair = probe.pair
        self._decoder = decoder
        self._blocks = decoder.blocks
        self._mixers = [mixers.get(i, block.mixer) for i, block in enumerate(self._blocks)]
        self._prompts = [probe.pair.prepare(batch) for batch in probe.batches]
        with torch.no_grad(), self._pair.autocast():
            self._hidden = [
                self._enter(i, decoder.embed(self._prompts[i]), 0) for i in self.numbers
            ]

    @property
    def numbers(self) -> range:
        """The numbers of the batches."""
        return range(len(self._prompts))

    def layout(self, number: int) -> SequenceLayout:
        """The columns that the current layer sees in a batch."""
        prompt = self._prompts[number]
        in_embedding = self.layer < self._decoder.num_embedding_layers
        if in_embedding and prompt.embedding_layout is not None:
            return prompt.embedding_layout
        return prompt.language_layout

    def mixer_input(self, number: int) -> Tensor:
        """The normed hidden state that the mixer of the current layer reads, (B, T, D)."""
        with torch.no_grad(), self._pair.autocast():
            return self._blocks[self.layer].mixer_norm(self._hidden[number])

    def advance_to(self, layer: int) -> None:
        """Pass all batches through the layers below `layer`."""
        while self.layer < layer:
            for number in self.numbers:
                self._hidden[number] = self._pass(number, self._hidden[number], self.layer)
            self.layer += 1

    def output(self, number: int, mixer: Mixer | None = None) -> Tensor:
        """The normed output (B, T, D) for a batch, with `mixer` in the current layer if given."""
        hidden = self._pass(number, self._hidden[number], self.layer, mixer)
        for layer in range(self.layer + 1, len(self._blocks)):
            hidden = self._pass(number, hidden, layer)
        with torch.no_grad(), self._pair.autocast():
            return self._decoder.norm(hidden)

    def _pass(self, number: int, hidden: Tensor, layer: int, mixer: Mixer | None = None) -> Tensor:
        """The output of `layer`, as the next layer reads it."""
        prompt, block = self._prompts[number], self._blocks[layer]
        columns = prompt.language_layout
        if layer < self._decoder.num_embedding_layers and prompt.embedding_layout is not None:
            columns = prompt.embedding_layout
        # One autocast context per layer: it keeps bf16 copies of fp32 weights until it exits.
        with torch.no_grad(), self._pair.autocast():
            mix = self._mixers[layer] if mixer is None else mixer
            mixed = mix(block.mixer_norm(hidden), columns)
            return self._enter(number, block.after_mixer(hidden, mixed), layer + 1)

    def _enter(self, number: int, hidden: Tensor, layer: int) -> Tensor:
        """`hidden` as the input of `layer`: the language stack begins with merged images."""
        prompt = self._prompts[number]
        if layer == self._decoder.num_embedding_layers and prompt.embedding_layout is not None:
            return self._decoder.embedding_to_language(hidden, prompt)
        return hidden
