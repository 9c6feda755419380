"""How the student does on samples it does not learn from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.data import IGNORED, BadSample, Batch, StepBatches, StepLoader
from mmmamba_cli.distill.kl_loss import CHUNK_ELEMENTS, next_tokens
from mmmamba_cli.distill.layer_losses import prepare
from mmmamba_cli.distill.objective import Objective
from mmmamba_cli.distill.teacher_student import Pair
from mmmamba_cli.distributed import World
from mmmamba_cli.errors import DataError

HINT = "see all of them with `mmmamba data check`, or name another set with --held-out"


@dataclass(frozen=True)
class HeldOut:
    """Means over all held-out tokens.

    `loss` is the stage's own; `agreement` the share of tokens whose most likely successor is the
    teacher's too; `student_nll` and `teacher_nll` the nats per answer token (None without answers).
    `bad` names each sample that could not be read and says why.
    """

    loss: float
    agreement: float
    student_nll: float | None
    teacher_nll: float | None
    tokens: int
    samples: int
    bad: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, float | int | None]:
        """The numbers; of `bad` only how many, as `bad_samples`."""
        numbers = asdict(self)
        numbers["bad_samples"] = len(numbers.pop("bad"))
        return numbers


def check_held_out(loader: StepLoader, world: World) -> None:
    """Raise `DataError` if not a single held-out sample can be read.

    Called before training, since the first evaluation may be hours away.
    """
    bad = world.on_main(loader.unreadable)
    if bad is not None:
        raise _unreadable([f"{sample.name}: {sample.reason}" for sample in bad])


def all_bad(bad: Iterable[BadSample], world: World) -> list[str]:
    """`name: reason` of the unreadable samples of every process, each once, on each process."""
    own = [sample for sample in bad if world.is_main or not sample.seen_by_all]
    return [f"{sample.name}: {sample.reason}" for sample in world.gather(own)]


def _unreadable(bad: list[str]) -> DataError:
    return DataError(
        f"none of the {len(bad)} held-out samples can be read; the first: {'; '.join(bad[:3])}",
        HINT,
    )


@torch.no_grad()
def evaluate(
    pair: Pair, objective: Objective, steps: Iterable[StepBatches], world: World
) -> HeldOut:
    """One pass over `steps`, in the student's forward mode, end to end for all but the loss.

    Raises `DataError` if no sample can be read, or a term of the loss has nothing to be taken over.
    """
    sums = torch.zeros(len(objective.terms), dtype=torch.float64)
    units, counts = torch.zeros_like(sums), torch.zeros(6, dtype=torch.float64)
    bad: list[BadSample] = []
    for step in steps:
        bad += step.bad
        for micro in step.micro:
            units += objective.count(pair, micro)
            batch = micro.to(pair.device)
            sums += objective.sums(pair, batch, None)
            counts[:5] += _compare(pair, batch)
            counts[5] += batch.num_samples
    units, sums, counts = (world.add_up(x) for x in (units, sums, counts))
    named = all_bad(bad, world)
    same, tokens, student, teacher, answers, samples = counts.tolist()
    if not samples:
        raise _unreadable(named)
    for term, number in zip(objective.terms, units.tolist(), strict=True):
        if not number:
            raise DataError(
                f"the held-out loss {term} has nothing to be a mean of: none of the {int(samples)} "
                "samples that can be read has a token of an answer",
                "name conversations with answers with --held-out, or raise data.max_length, which "
                "may cut them off",
            )
    return HeldOut(
        loss=float((objective.weigh(units) * sums).sum()),
        agreement=same / tokens,
        student_nll=student / answers if answers else None,
        teacher_nll=teacher / answers if answers else None,
        tokens=int(tokens),
        samples=int(samples),
        bad=tuple(named),
    )


def _compare(pair: Pair, batch: Batch) -> Tensor:
    """Sums over a micro batch: same top-1, tokens, both NLLs, answer tokens."""
    prompt = prepare(pair, batch)
    real = torch.ones_like(batch.input_ids, dtype=torch.bool)
    if batch.attention_mask is not None:
        real = batch.attention_mask.bool()
    targets = next_tokens(batch)[real]
    with pair.autocast():
        taught, learned = (
            one.model.forward_prepared(prompt)[real] for one in (pair.teacher, pair.student)
        )
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
