"""Stage 3: the student's distribution over the next token against the teacher's, end to end.

Both models run over the student's own hidden states, layers with activation checkpointing; logits
exist for a few hundred tokens at a time only. Legend: B batch, T columns, N scored positions,
D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.data import IGNORED, Batch
from mmmamba_cli.distill.layer_losses import prepare
from mmmamba_cli.distill.teacher_student import Pair
from mmmamba_cli.ops.backends import upcast
from mmmamba_cli.recipe import KL

# Elements of the logits that exist at a time: 256 MiB of fp32.
CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class LogitsKL:
    """An `Objective`: (1 - w) KL + w CE, as a mean over tokens or in the reference's reduction."""

    settings: KL
    scale: float
    layer_local: bool = False

    @property
    def terms(self) -> tuple[str, ...]:
        return ("kl", "ce") if self.settings.ce_weight else ("kl",)

    def reaches(self, name: str) -> bool:
        """Every parameter: the loss is one of the whole model's output."""
        return True

    def reaches_part(self, name: str) -> bool:
        return False

    def count(self, pair: Pair, batch: Batch) -> Tensor:
        paper = self.settings.reduction == "paper"
        scored = batch.num_samples if paper else int(self.scored(batch).sum())
        units = [scored, int((next_tokens(batch) != IGNORED).sum())]
        return torch.tensor(units[: len(self.terms)], dtype=torch.float64)

    def weigh(self, units: Tensor) -> Tensor:
        share = self.settings.ce_weight
        parts = torch.tensor([1 - share, share], dtype=torch.float64)[: len(self.terms)]
        return self.scale * parts / units.clamp(min=1)

    def scored(self, batch: Batch) -> Tensor:
        """(B, T) bool: columns whose prediction is compared.

        `all`: every column that is not padding; `answer`: those that predict an answer's token.
        """
        if self.settings.mask == "answer" and self.settings.reduction == "token":
            return next_tokens(batch) != IGNORED
        if batch.attention_mask is None:
            return torch.ones_like(batch.input_ids, dtype=torch.bool)
        return batch.attention_mask.bool()

    def sums(self, pair: Pair, batch: Batch, weights: Tensor | None) -> Tensor:
        learns = weights is not None
        targets = next_tokens(batch)
        chosen = self.scored(batch)
        if len(self.terms) > 1:
            chosen = chosen | (targets != IGNORED)
        prompt = prepare(pair, batch)
        with pair.autocast():
            with torch.no_grad():
                taught = pair.teacher.model.forward_prepared(prompt)[chosen]
            with torch.set_grad_enabled(learns):
                learned = pair.student.model.forward_prepared(prompt)[chosen]
        kl_here = self.scored(batch)[chosen]
        total = torch.zeros(len(self.terms), dtype=torch.float64)
        gradient = torch.zeros_like(learned) if learns else None
        chunk = max(1, CHUNK_ELEMENTS // pair.student.lm_head.out_features)
        for start in range(0, learned.shape[0], chunk):
            part = slice(start, start + chunk)
            leaf = learned[part].detach().requires_grad_(learns)
            with pair.autocast(), torch.set_grad_enabled(learns):
                sums = self._chunk(pair, taught[part], leaf, targets[chosen][part], kl_here[part])
            if weights is not None and gradient is not None:
                (sums * weights.to(sums)).sum().backward()
                assert leaf.grad is not None
                gradient[part] = leaf.grad
            total += sums.detach().double().cpu()
        # Without a picture, nothing depends on a vision part that alone learns.
        if gradient is not None and learned.requires_grad:
            learned.backward(gradient)
        return total

    def _chunk(
        self, pair: Pair, taught: Tensor, learned: Tensor, targets: Tensor, kl_here: Tensor
    ) -> Tensor:
        """Sums of each term over (N, D) hidden states; the KL scores those of `kl_here` (N,)."""
        with torch.no_grad():
            expected = upcast(pair.teacher.lm_head(taught))
        actual = upcast(pair.student.lm_head(learned))
        settings = self.settings
        kl = divergence(expected, actual, settings.direction, settings.temperature)
        sums = [(kl * kl_here).sum()]
        if len(self.terms) > 1:
            sums.append(F.cross_entropy(actual, targets, ignore_index=IGNORED, reduction="sum"))
        return torch.stack(sums)


def divergence(teacher: Tensor, student: Tensor, direction: str, temperature: float) -> Tensor:
    """(N,) divergences of the distributions given by logits (N, V), in nats.

    `forward` KL(teacher || student), `reverse` KL(student || teacher), `jsd` the mean of both
    against their mixture. With a temperature the result is multiplied by its square, which keeps
    gradients at their size (Hinton et al., arXiv 1503.02531).
    """
    p = torch.log_softmax(teacher / temperature, dim=-1)
    q = torch.log_softmax(student / temperature, dim=-1)
    if direction == "forward":
        value = _kl(p, q)
    elif direction == "reverse":
        value = _kl(q, p)
    else:
        middle = torch.logaddexp(p, q) - math.log(2)
        value = (_kl(p, middle) + _kl(q, middle)) / 2
    return value * temperature**2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def next_tokens(batch: Batch) -> Tensor:
    """(B, T): at each column the answer token it predicts, -100 where there is none."""
    targets = torch.full_like(batch.labels, IGNORED)
    targets[:, :-1] = batch.labels[:, 1:]
    return targets
