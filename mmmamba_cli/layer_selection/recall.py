"""`recall`: the teacher with one layer's trained mixer in the place of its attention.

The score of a layer is the fall of the log-likelihood of answers, over the questions that the
teacher answers correctly. Jet-Nemotron (arXiv 2508.15884) ranks layers by the fall of retrieval;
here the questions decide which ability is measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmmamba_cli.data import IGNORE_INDEX
from mmmamba_cli.distill.kl_loss import shift_labels
from mmmamba_cli.errors import DataError
from mmmamba_cli.layer_selection.layer_walk import LayerWalk
from mmmamba_cli.layer_selection.probe_samples import ProbeSamples, SampleSums, row_sums
from mmmamba_cli.ops.backends import upcast


class ReplacedAttention:
    """A `LayerMethod`: the fall of the answers' log-likelihood, in nats a token of an answer.

    Counted are the questions whose answer is, token by token, the teacher's first choice.

    Raises:
        DataError: the teacher answers none of the questions correctly.
    """

    def __init__(self, probe: ProbeSamples):
        self._probe = probe
        self._walk = LayerWalk(probe, probe.pair.teacher.model, {})
        found = [self._answers(i, self._walk.output(i)) for i in self._walk.numbers]
        self._before = torch.cat([likelihood for likelihood, _, _ in found])
        tokens = torch.cat([units for _, _, units in found])
        right = torch.cat([hits for _, hits, _ in found])
        answered = (right == tokens) & (tokens > 0)
        if not bool(answered.any()):
            raise DataError(
                f"the teacher answers none of the {len(tokens)} questions correctly, and --select "
                "recall scores layers on correct answers of the teacher",
                "give questions with short answers that it knows with --held-out, or raise "
                "--samples",
            )
        self._units = tokens * answered

    def measure(self, layer: int) -> SampleSums:
        self._walk.advance_to(layer)
        mixer = self._probe.pair.student.model.blocks[layer].mixer
        after = torch.cat(
            [self._answers(i, self._walk.output(i, mixer))[0] for i in self._walk.numbers]
        )
        falls = torch.where(self._units > 0, self._before - after, torch.zeros_like(after))
        return SampleSums(falls, self._units)

    def _answers(self, number: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per row: log-likelihood of the answer, its first-choice tokens, and all its tokens."""
        batch, pair = self._probe.batches[number], self._probe.pair
        targets = shift_labels(batch)
        mask = targets != IGNORE_INDEX
        with torch.no_grad(), pair.autocast():
            logits = upcast(pair.teacher.lm_head(hidden[mask]))
        wanted = targets[mask]
        likelihood = torch.log_softmax(logits, -1).gather(1, wanted.unsqueeze(1)).squeeze(1)
        first = logits.argmax(-1) == wanted
        tokens = torch.ones_like(likelihood)
        return row_sums(likelihood, mask), row_sums(first, mask), row_sums(tokens, mask)
