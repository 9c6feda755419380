"""Evaluation on held-out samples during training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.data import IGNORE_INDEX, BadSample, StepBatches, StepLoader
from mmmamba_cli.distill.kl_loss import LOGITS_PER_CHUNK, shift_labels
from mmmamba_cli.distill.model_pair import AnyBatch, ModelPair
from mmmamba_cli.distill.objective import Objective
from mmmamba_cli.distributed import World
from mmmamba_cli.errors import DataError

HINT = "see all of them with `mmmamba data check`, or name another set with --held-out"


@dataclass(frozen=True)
class HeldOutMetrics:
    """Means over all held-out tokens.

    `loss` is the stage's loss; `agreement` the share of tokens at which the top-1 predictions of
    student and teacher agree; `student_nll` and `teacher_nll` are in nats per answer token (None
    without answers). `bad` lists the unreadable samples with their reasons.
    """

    loss: float
    agreement: float
    student_nll: float | None
    teacher_nll: float | None
    tokens: int
    samples: int
    bad: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, float | int | None]:
        """All fields, with the number `bad_samples` in place of `bad`."""
        numbers = asdict(self)
        numbers["bad_samples"] = len(numbers.pop("bad"))
        return numbers


def check_held_out(loader: StepLoader, world: World) -> None:
    """Raise `DataError` if no held-out sample can be read.

    Called before training: the first evaluation may be hours later.
    """
    bad = world.run_on_main(loader.unreadable)
    if bad is not None:
        raise _unreadable([f"{sample.name}: {sample.reason}" for sample in bad])


def is_better(loss: float, best: float | None) -> bool:
    """Whether a held-out loss is finite and the lowest so far."""
    if not math.isfinite(loss):
        return False
    return best is None or not math.isfinite(best) or loss < best


def gather_bad_samples(bad: Iterable[BadSample], world: World) -> list[str]:
    """`name: reason` of the unreadable samples of all processes, without duplicates."""
    local = [sample for sample in bad if world.is_main or not sample.seen_by_all]
    # A short corpus gives a sample several times in one step.
    named = (f"{sample.name}: {sample.reason}" for sample in world.all_gather(local))
    return list(dict.fromkeys(named))


def _unreadable(bad: list[str]) -> DataError:
    return DataError(
        f"none of the {len(bad)} held-out samples can be read; the first: {'; '.join(bad[:3])}",
        HINT,
    )


@torch.no_grad()
def evaluate_held_out(
    pair: ModelPair, objective: Objective, steps: Iterable[StepBatches], world: World
) -> HeldOutMetrics:
    """Evaluate both models over `steps`; all metrics but the loss are end to end.

    Raises:
        DataError: no sample can be read, or a term of the loss has no unit.
    """
    units = torch.zeros(len(objective.terms), dtype=torch.float64)
    sums, counts = torch.zeros_like(units, device=pair.device), torch.zeros(6, dtype=torch.float64)
    bad: list[BadSample] = []
    for step in steps:
        bad += step.bad
        for micro in step.micro_batches:
            units += objective.count_units(pair, micro)
            batch = micro.to(pair.device)
            sums += objective.loss_sums(pair, batch, None)
            counts[:5] += _count_predictions(pair, batch)
            counts[5] += batch.num_samples
    units, sums, counts = (world.all_reduce_sum(x) for x in (units, sums, counts))
    bad_names = gather_bad_samples(bad, world)
    same, tokens, student, teacher, answers, samples = counts.tolist()
    if not samples:
        raise _unreadable(bad_names)
    for term, number in zip(objective.terms, units.tolist(), strict=True):
        if not number:
            raise DataError(
                f"the held-out loss {term} has nothing to be a mean of: none of the {int(samples)} "
                "samples that can be read has a token of an answer",
                "name conversations with answers with --held-out, or raise data.max_length, which "
                "may cut them off",
            )
    return HeldOutMetrics(
        loss=float((objective.term_weights(units) * sums).sum()),
        agreement=same / tokens,
        student_nll=student / answers if answers else None,
        teacher_nll=teacher / answers if answers else None,
        tokens=int(tokens),
        samples=int(samples),
        bad=tuple(bad_names),
    )


def _count_predictions(pair: ModelPair, batch: AnyBatch) -> Tensor:
    """Sums over a micro batch: top-1 agreements, tokens, both NLLs, answer tokens."""
    prepared, real = pair.prepare(batch), batch.token_mask
    targets = shift_labels(batch)[real]
    with pair.autocast():
        teacher_hidden, student_hidden = (
            pair.last_hidden(one, prepared)[real] for one in (pair.teacher, pair.student)
        )
    total = torch.zeros(5, dtype=torch.float64)
    chunk = max(1, LOGITS_PER_CHUNK // pair.lm_head.out_features)
    for start in range(0, targets.shape[0], chunk):
        part = slice(start, start + chunk)
        with pair.autocast():
            teacher_logits = pair.logits(pair.teacher, teacher_hidden[part]).float()
            student_logits = pair.logits(pair.student, student_hidden[part]).float()
        answers = targets[part]
        nll = [
            F.cross_entropy(x, answers, ignore_index=IGNORE_INDEX, reduction="sum")
            for x in (student_logits, teacher_logits)
        ]
        same = (teacher_logits.argmax(-1) == student_logits.argmax(-1)).sum()
        here = [same, torch.tensor(len(answers)), *nll, (answers != IGNORE_INDEX).sum()]
        total += torch.tensor([float(x) for x in here], dtype=torch.float64)
    return total
