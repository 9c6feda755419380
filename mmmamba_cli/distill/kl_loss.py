"""Stage 3: end-to-end KL divergence between the next-token distributions of student and teacher.

Each model runs over its own hidden states. The student uses activation checkpointing, and logits
are computed in chunks, so that whole logits never exist. Legend: B batch, T columns, N scored
positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.data import IGNORE_INDEX
from mmmamba_cli.distill.host_copies import copy_without_wait
from mmmamba_cli.distill.model_pair import AnyBatch, ModelPair
from mmmamba_cli.ops.backends import upcast
from mmmamba_cli.recipe import KL

# Elements of one chunk of logits: 256 MiB in fp32.
LOGITS_PER_CHUNK = 1 << 26


@dataclass(frozen=True)
class LogitsKL:
    """An `Objective`: (1 - w) KL + w CE, as a mean over tokens or in the reference's reduction."""

    settings: KL
    scale: float
    layer_local: bool = False

    @property
    def terms(self) -> tuple[str, ...]:
        return ("kl", "ce") if self.settings.ce_weight else ("kl",)

    def depends_on(self, name: str) -> bool:
        """True: the output of the model depends on every parameter."""
        return True

    def depends_on_part_of(self, name: str) -> bool:
        return False

    def count_units(self, pair: ModelPair, batch: AnyBatch) -> Tensor:
        paper = self.settings.reduction == "paper"
        scored = batch.num_samples if paper else int(self.score_mask(batch).sum())
        units = [scored, int((shift_labels(batch) != IGNORE_INDEX).sum())]
        return torch.tensor(units[: len(self.terms)], dtype=torch.float64)

    def term_weights(self, units: Tensor) -> Tensor:
        share = self.settings.ce_weight
        parts = torch.tensor([1 - share, share], dtype=torch.float64)[: len(self.terms)]
        return self.scale * parts / units.clamp(min=1)

    def score_mask(self, batch: AnyBatch) -> Tensor:
        """(B, T) bool mask of the columns whose predictions are compared.

        `all`: every column that is not padding; `answer`: columns that predict an answer token.
        """
        if self.settings.mask == "answer":
            return shift_labels(batch) != IGNORE_INDEX
        return batch.token_mask

    def loss_sums(self, pair: ModelPair, batch: AnyBatch, weights: Tensor | None) -> Tensor:
        needs_grad = weights is not None
        targets = shift_labels(batch)
        in_kl, chosen = self._scored_columns(batch, targets)
        if weights is not None:
            # A copy for each chunk would wait for the GPU.
            weights = weights.to(targets.device, non_blocking=True)
        prepared = pair.prepare(batch)
        with pair.autocast():
            with torch.no_grad():
                teacher_hidden = _rows(pair.last_hidden(pair.teacher, prepared), chosen)
            with torch.set_grad_enabled(needs_grad):
                student_hidden = _rows(pair.last_hidden(pair.student, prepared), chosen)
        targets = _rows(targets, chosen)
        total = torch.zeros(len(self.terms), dtype=torch.float64, device=student_hidden.device)
        gradient = torch.zeros_like(student_hidden) if needs_grad else None
        chunk = max(1, LOGITS_PER_CHUNK // pair.lm_head.out_features)
        for start in range(0, student_hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            leaf = student_hidden[part].detach().requires_grad_(needs_grad)
            with pair.autocast(), torch.set_grad_enabled(needs_grad):
                sums = self._chunk_sums(
                    pair, teacher_hidden[part], leaf, targets[part], in_kl[part]
                )
            if weights is not None and gradient is not None:
                (sums * weights.to(sums)).sum().backward()
                assert leaf.grad is not None
                gradient[part] = leaf.grad
            total += sums.detach().double()
        # If only vision parameters are trainable, a batch without images has no graph.
        if gradient is not None and student_hidden.requires_grad:
            student_hidden.backward(gradient)
        return total

    def _scored_columns(self, batch: AnyBatch, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """A bool mask (N,), where the KL counts, and the indices (N,) of scored columns.

        The indices count all rows one after the other, and are None if all columns are scored.
        """
        if targets.numel() == batch.num_tokens and self.settings.mask == "all":
            return self.score_mask(batch).flatten(), None
        # The search for indices would wait for a GPU.
        host = batch if batch.on_host is None else batch.on_host
        mask = chosen = self.score_mask(host)
        if len(self.terms) > 1:
            chosen = mask | (shift_labels(host) != IGNORE_INDEX)
        indices = chosen.flatten().nonzero().squeeze(1)
        return (
            copy_without_wait(mask.flatten()[indices], targets.device),
            copy_without_wait(indices, targets.device),
        )

    def _chunk_sums(
        self,
        pair: ModelPair,
        teacher_hidden: Tensor,
        student_hidden: Tensor,
        targets: Tensor,
        in_kl: Tensor,
    ) -> Tensor:
        """Sum each term over (N, D) hidden states; the (N,) mask `in_kl` limits the KL."""
        with torch.no_grad():
            teacher_logits = upcast(pair.logits(pair.teacher, teacher_hidden))
        student_logits = upcast(pair.logits(pair.student, student_hidden))
        settings = self.settings
        kl = divergence(teacher_logits, student_logits, settings.direction, settings.temperature)
        sums = [(kl * in_kl).sum()]
        if len(self.terms) > 1:
            sums.append(
                F.cross_entropy(student_logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
            )
        return torch.stack(sums)


def divergence(teacher: Tensor, student: Tensor, direction: str, temperature: float) -> Tensor:
    """(N,) divergences in nats between the distributions of two logits (N, V).

    `forward` is KL(teacher || student), `reverse` KL(student || teacher), and `jsd` the mean of the
    KL of each against their mixture. The result is multiplied by the squared temperature, which
    keeps the magnitude of gradients (Hinton et al., arXiv 1503.02531).
    """
    if temperature != 1:
        teacher, student = teacher / temperature, student / temperature
    p = torch.log_softmax(teacher, dim=-1)
    q = torch.log_softmax(student, dim=-1)
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


def _rows(values: Tensor, indices: Tensor | None) -> Tensor:
    """Columns `indices` of (B, T, ...), counted over all rows; all of them if None."""
    flat = values.flatten(0, 1)
    return flat if indices is None else flat[indices]


def shift_labels(batch: AnyBatch) -> Tensor:
    """(B, T) labels shifted left: the answer token that each column predicts, else IGNORE_INDEX."""
    targets = torch.full_like(batch.labels, IGNORE_INDEX)
    targets[:, :-1] = batch.labels[:, 1:]
    return targets
