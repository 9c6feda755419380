"""How the student does on samples it does not learn from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.data import IGNORED, Batch, StepBatches
from mmmamba_cli.distill.layerwise import prepare
from mmmamba_cli.distill.logits_kl import CHUNK_ELEMENTS, next_tokens
from mmmamba_cli.distill.objective import Objective
from mmmamba_cli.distill.pair import Pair
from mmmamba_cli.distributed import World


@dataclass(frozen=True)
class HeldOut:
    """Means over all held-out tokens.

    `loss` is the stage's own; `agreement` the share of tokens whose most likely successor is the
    teacher's too; `student_nll` and `teacher_nll` the nats per answer token (None without answers).
    """

    loss: float
    agreement: float
    student_nll: float | None
    teacher_nll: float | None
    tokens: int

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    pair: Pair, objective: Objective, steps: Iterable[StepBatches], world: World
) -> HeldOut:
    """One pass over `steps`, in the student's forward mode, end to end for all but the loss."""
    sums = torch.zeros(len(objective.terms), dtype=torch.float64)
    units, counts = torch.zeros_like(sums), torch.zeros(5, dtype=torch.float64)
    for step in steps:
        for batch in (micro.to(pair.device) for micro in step.micro):
            units += objective.count(pair, batch)
            sums += objective.sums(pair, batch, None)
            counts += _compare(pair, batch)
    units, sums, counts = (world.add_up(x) for x in (units, sums, counts))
    same, tokens, student, teacher, answers = counts.tolist()
    return HeldOut(
        loss=float((objective.weigh(units) * sums).sum()),
        agreement=same / tokens if tokens else math.nan,
        student_nll=student / answers if answers else None,
        teacher_nll=teacher / answers if answers else None,
        tokens=int(tokens),
    )


def _compare(pair: Pair, batch: Batch) -> Tensor:
    """Sums over a micro batch: same top-1, tokens, both NLLs, answer tokens."""
    prompt = prepare(pair, batch)
    real = torch.ones_like(batch.input_ids, dtype=torch.bool)
    if batch.attention_mask is not None:
        real = batch.attention_mask.bool()
    targets = next_tokens(batch)[real]
    with pair.autocast():
        taught, learned = pair.teacher.model(prompt)[real], pair.student.model(prompt)[real]
    total = torch.zeros(5, dtype=torch.float64)
    chunk = max(1, CHUNK_ELEMENTS // pair.student.lm_head.out_features)
    for start in range(0, targets.shape[0], chunk):
        part = slice(start, start + chunk)
        with pair.autocast():
            theirs = pair.teacher.lm_head(taught[part]).float()
            ours = pair.student.lm_head(learned[part]).float()
        answers = targets[part]
        nll = [
            F.cross_entropy(x, answers, ignore_index=IGNORED, reduction="sum")
            for x in (ours, theirs)
        ]
        same = (theirs.argmax(-1) == ours.argmax(-1)).sum()
        here = [same, torch.tensor(len(answers)), *nll, (answers != IGNORED).sum()]
        total += torch.tensor([float(x) for x in here], dtype=torch.float64)
    return total
