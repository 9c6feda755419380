"""`mse`: the loss of stage 2 of each layer, on the teacher's hidden states.

Layers whose mixer imitates the attention badly keep the attention. The method needs no end-to-end
pass and is the baseline of the other methods.
"""

from __future__ import annotations

import torch

from mmmamba_cli.layer_selection.layer_walk import LayerWalk
from mmmamba_cli.layer_selection.probe_samples import ProbeSamples, SampleSums
from mmmamba_cli.ops.backends import upcast


class MixerError:
    """A `LayerMethod`: mean squared error of the mixer's output before W_O, over (T, H * P)."""

    def __init__(self, probe: ProbeSamples):
        self._probe = probe
        self._walk = LayerWalk(probe, probe.pair.teacher.model, {})

    def measure(self, layer: int) -> SampleSums:
        self._walk.advance_to(layer)
        pair = self._probe.pair
        teacher, student = pair.teacher.model.blocks[layer], pair.student.model.blocks[layer]
        sums, units = [], []
        for number in self._walk.numbers:
            normed, columns = self._walk.mixer_input(number), self._walk.layout(number)
            with torch.no_grad(), pair.autocast():
                expected = upcast(teacher.mixer.mix(normed, columns))
                actual = upcast(student.mixer.mix(normed, columns))
            squares = (actual - expected).square().sum(-1)
            mask = torch.ones_like(squares, dtype=torch.bool)
            if columns.mask is not None:
                mask = columns.mask
            sums.append(squares.masked_fill(~mask, 0).double().sum(1).cpu())
            units.append(mask.sum(1).double().cpu() * expected.shape[-1])
        return SampleSums(torch.cat(sums), torch.cat(units))
