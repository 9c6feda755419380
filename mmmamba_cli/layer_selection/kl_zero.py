"""`kl-zero`: the teacher's attention restored in one layer, without training.

The score of a layer is the fall of KL(teacher || student) that its attention alone brings: the
one-layer restoration of arXiv 2512.20569, without its training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from mmmamba_cli.distill.kl_loss import LOGITS_PER_CHUNK, divergence
from mmmamba_cli.layer_selection.layer_walk import LayerWalk
from mmmamba_cli.layer_selection.probe_samples import ProbeSamples, SampleSums, row_sums
from mmmamba_cli.ops.backends import upcast


class RestoredAttention:
    """A `LayerMethod`: the fall of the divergence, in nats for each scored token.

    `kept` are layers in which the student has the teacher's attention already.
    """

    def __init__(self, probe: ProbeSamples, kept: Collection[int]):
        self._probe = probe
        self._teacher_hidden = list(teacher_hidden(probe))
        attention = {layer: probe.pair.teacher.model.blocks[layer].mixer for layer in kept}
        self._walk = LayerWalk(probe, probe.pair.student.model, attention)
        self._before = [self._divergence(i, self._walk.output(i)) for i in self._walk.numbers]

    def measure(self, layer: int) -> SampleSums:
        self._walk.advance_to(layer)
        mixer = self._probe.pair.teacher.model.blocks[layer].mixer
        falls = [
            before - self._divergence(i, self._walk.output(i, mixer))
            for i, before in enumerate(self._before)
        ]
        return SampleSums(torch.cat(falls), self._probe.count_scored())

    def _divergence(self, number: int, hidden: Tensor) -> Tensor:
        return divergence_sums(self._probe, number, self._teacher_hidden[number], hidden)


def teacher_hidden(probe: ProbeSamples) -> Iterator[Tensor]:
    """The teacher's last hidden states (N, D) at the scored columns of each batch."""
    walk = LayerWalk(probe, probe.pair.teacher.model, {})
    for number in walk.numbers:
        yield walk.output(number)[probe.scored_columns(number)]


def divergence_sums(
    probe: ProbeSamples, number: int, teacher_states: Tensor, student_states: Tensor
) -> Tensor:
    """KL(teacher || student) in nats, summed over each row's scored columns.

    Args:
        number: of the batch.
        teacher_states: (N, D) at its scored columns.
        student_states: (B, T, D).

    Returns (B,) float64 on the CPU.
    """
    pair, mask = probe.pair, probe.scored_columns(number)
    states = student_states[mask]
    found = [states.new_zeros(0, dtype=torch.float32)]
    chunk = max(1, LOGITS_PER_CHUNK // pair.student.lm_head.out_features)
    with torch.no_grad(), pair.autocast():
        for start in range(0, len(states), chunk):
            part = slice(start, start + chunk)
            teacher = upcast(pair.teacher.lm_head(teacher_states[part]))
            student = upcast(pair.student.lm_head(states[part]))
            found.append(divergence(teacher, student, "forward", 1.0))
    return row_sums(torch.cat(found), mask)
