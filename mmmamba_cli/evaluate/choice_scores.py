"""Log-likelihoods of answers to prompts that share a prefill.

Legend: B prompts, N answers, W columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChoiceTail:
    """The tokens of an answer, and the row of its prompt in the batch."""

    row: int
    ids: list[int]


def choice_scores(
    logits: Tensor,
    tails: Sequence[ChoiceTail],
    later_scores: Callable[[Sequence[ChoiceTail]], list[float]],
) -> list[list[float]]:
    """Log p of each answer, in nats, by the row of its prompt and in the order of `tails`.

    Args:
        logits: the prompts' last logits (B, V).
        later_scores: log p of answers of two tokens and more behind their first token; it is
            called only if there are such answers.
    """
    scores = _first_token_scores(logits, tails)
    longer = [place for place, tail in enumerate(tails) if len(tail.ids) > 1]
    if longer:
        for place, score in zip(longer, later_scores([tails[i] for i in longer]), strict=True):
            scores[place] += score
    found: list[list[float]] = [[] for _ in range(len(logits))]
    for tail, score in zip(tails, scores, strict=True):
        found[tail.row].append(score)
    return found


def _first_token_scores(logits: Tensor, tails: Sequence[ChoiceTail]) -> list[float]:
    """Log p of the first token of each answer, from the prompts' last logits (B, V); 0 if empty."""
    logs = torch.log_softmax(logits.double(), dim=-1)
    return [float(logs[tail.row, tail.ids[0]]) if tail.ids else 0.0 for tail in tails]


def padded_tails(tails: Sequence[ChoiceTail], pad: int) -> tuple[Tensor, Tensor]:
    """Inputs that predict the answers behind their first token: ids and mask (N, W), int64.

    Rows are padded on the right, behind the tokens whose predictions are read.
    """
    known = [tail.ids[:-1] for tail in tails]
    width = max(map(len, known))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in known])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in known])
    return ids, mask


def later_token_scores(logits: Tensor, tails: Sequence[ChoiceTail]) -> list[float]:
    """Log p of each answer behind its first token, from the logits (N, W, V) of `padded_tails`."""
    return [_log_likelihood(row, tail.ids[1:]) for row, tail in zip(logits, tails, strict=True)]


def _log_likelihood(logits: Tensor, ids: list[int]) -> float:
    """Log p of `ids`, predicted by the first rows of logits (W, V)."""
    predicted = torch.log_softmax(logits[: len(ids)].double(), dim=-1)
    wanted = torch.tensor(ids, device=logits.device).unsqueeze(1)
    return float(predicted.gather(1, wanted).sum())
