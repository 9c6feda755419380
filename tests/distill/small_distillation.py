"""Small teachers, students and batches in memory, for the tests of distillation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from small import IMAGE_ID, small_model
from torch import Tensor

from mmmamba_cli.data import (
    IGNORE_INDEX,
    Accumulation,
    BadSample,
    Batch,
    EncodedSample,
    StepBatches,
)
from mmmamba_cli.data.holistic_collator import assign_rows, collate, make_rows
from mmmamba_cli.distill.objective import build_objective
from mmmamba_cli.distill.parallelize import ParallelPlan, parallelize
from mmmamba_cli.distill.teacher_student import TeacherStudent
from mmmamba_cli.distill.trainable import trainable_names
from mmmamba_cli.distill.trainer import StepResult, Stopped, TrainingJob, train
from mmmamba_cli.distill.training_state import Progress, StateFolder
from mmmamba_cli.distributed import BUCKET_BYTES, World
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.recipe import Schedule, Stage

# Trainable parameters by loss: matrix orientation does not depend on values and gate.
LEARNS = {
    "matrix-orientation": tuple(
        f"*.{name}" for name in ("[qk]_proj.*", "dt_*", "conv1d.*", "A_log")
    )
}


def pair_of(teacher: HolisticVLM, student: HolisticVLM, trainable: Iterable[str]) -> TeacherStudent:
    """An fp32 pair in which only `trainable` parameters are trainable."""
    names = tuple(sorted(trainable))
    teacher.requires_grad_(False)
    student.requires_grad_(False)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.grad = None
    return TeacherStudent(teacher.eval(), student.eval(), "fp32", names)


def batch_of(
    input_ids: Tensor,
    pixel_values: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    samples: int | None = None,
) -> Batch:
    """A batch; without `labels`, all tokens except the first of a row are answer tokens."""
    if labels is None:
        labels = input_ids.clone()
        labels[:, 0] = IGNORE_INDEX
        if mask is not None:
            labels[~mask] = IGNORE_INDEX
    return Batch(
        input_ids,
        labels,
        mask,
        seq_idx,
        pixel_values,
        num_samples=input_ids.shape[0] if samples is None else samples,
        num_tokens=input_ids.numel() if mask is None else int(mask.sum()),
        names=tuple(f"row {i}" for i in range(input_ids.shape[0])),
    )


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (T_i,) as ids (B, T) and mask (B, T), padded on the right."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return ids, mask


class RandomLoader:
    """A `StepLoader` stand-in: batches of random texts of unequal length, by step.

    `packed` puts the samples of a micro batch into one row. All samples of `unreadable_steps` are
    unreadable.
    """

    def __init__(
        self,
        vocabulary: int,
        batch_size: int = 4,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        packed: bool = False,
        seed: int = 0,
        unreadable_steps: Collection[int] = (),
    ):
        self.vocabulary = vocabulary
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.packed = packed
        self.seed = seed
        self.unreadable_steps = unreadable_steps
        self.steps_per_pass = 2

    def unreadable(self) -> None:
        """None, as for a set with readable samples."""

    def samples(self, step: int) -> list[Tensor]:
        rng = torch.Generator().manual_seed(1000 * self.seed + step)
        lengths = torch.randint(3, 12, (self.batch_size,), generator=rng).tolist()
        # Ids below 8 are special tokens of the small model.
        return [torch.randint(8, self.vocabulary, (n,), generator=rng) for n in lengths]

    def steps(self, first: int, stop: int) -> Iterable[StepBatches]:
        for step in range(first, stop):
            parts = self.world_size * self.accumulation
            assigned = [self.samples(step)[i::parts] for i in range(parts)]
            own = assigned[self.rank * self.accumulation : (self.rank + 1) * self.accumulation]
            lost = step in self.unreadable_steps
            micro = tuple(self._micro([] if lost else rows) for rows in own)
            # Each process reports its own, as for undecodable pictures.
            count = sum(map(len, own)) if lost else 0
            bad = [BadSample(f"{self.rank}:{i}", "is damaged", False) for i in range(count)]
            yield StepBatches(step, micro, tuple(bad), self.batch_size)

    def _micro(self, rows: list[Tensor]) -> Batch:
        if not rows:
            nothing = torch.zeros(1, 1, dtype=torch.bool)
            return batch_of(torch.zeros(1, 1, dtype=torch.long), mask=nothing, samples=0)
        if not self.packed:
            ids, mask = padded(rows)
            return batch_of(ids, mask=mask)
        return packed(rows)


class RowLoader(RandomLoader):
    """The random texts in rows and micro batches as a `StepLoader` makes them.

    `batching` as in a recipe, with rows of at most `ROW_LENGTH` tokens where they are packed.
    """

    ROW_LENGTH = 16

    def __init__(
        self,
        vocabulary: int,
        batch_size: int,
        accumulation: Accumulation,
        rank: int = 0,
        world_size: int = 1,
        batching: str = "bucketed",
    ):
        super().__init__(vocabulary, batch_size, rank=rank, world_size=world_size)
        self.micro_batches = accumulation
        self.batching = batching

    def steps(self, first: int, stop: int) -> Iterable[StepBatches]:
        for step in range(first, stop):
            samples = [
                EncodedSample(f"{step}:{i}", ids.tolist(), [i > 0 for i in range(len(ids))])
                for i, ids in enumerate(self.samples(step))
            ]
            rows = make_rows(samples, self.batching, self.ROW_LENGTH)
            own = assign_rows(rows, self.rank, self.world_size, self.micro_batches)
            micro = tuple(collate(part, None, pad_id=0)[0] for part in own)
            yield StepBatches(step, micro, (), self.batch_size)


def packed(rows: Sequence[Tensor]) -> Batch:
    """One packed row of all rows."""
    ids = torch.cat(list(rows))[None]
    numbers = torch.cat([torch.full((len(row),), i) for i, row in enumerate(rows)])[None]
    labels = ids.clone()
    labels[:, 1:][numbers[:, 1:] != numbers[:, :-1]] = IGNORE_INDEX
    labels[:, 0] = IGNORE_INDEX
    return batch_of(ids, labels=labels, seq_idx=numbers, samples=len(rows))


def make_job(
    folder: Path,
    loss: str,
    *,
    steps: int,
    batch_size: int = 4,
    accumulation: int = 1,
    packed: bool = False,
    plan: str = "mmmm",
    lr: float = 1e-2,
    world: World | None = None,
    evaluate_every: int | None = None,
    save_every: int | None = None,
    dtype: torch.dtype = torch.float32,
    learns: str | tuple[str, ...] | None = None,
    parallel: ParallelPlan = ParallelPlan("replicate"),
    bucket_bytes: int = BUCKET_BYTES,
    checkpointing: bool | str = True,
    **options: object,
) -> TrainingJob:
    """A small stage over random texts, the same for the same arguments.

    `options` are those of the student's mixers.
    """
    world = world or World(torch.device("cpu"))
    stage = Stage(
        name="s",
        learns=learns or LEARNS.get(loss, "new+qkv"),
        loss=loss,
        inputs="student" if loss == "kl" else "teacher",
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        lr=lr,
        precision="fp32",
        evaluate_every=evaluate_every,
        save_every=save_every,
        checkpointing=checkpointing,
        schedule=Schedule(warmup=0.3, decay=0.3),
    )
    teacher, student = small_model("a" * len(plan)), small_model(plan, seed=1, **options)
    shared = {n: t for n, t in teacher.state_dict().items() if ".mixer." not in n}
    student.load_state_dict(shared, strict=False)
    names = [name for name, _ in student.named_parameters()]
    trainable = trainable_names(stage, student.config, names)
    pair = pair_of(teacher.to(dtype), student.to(dtype), trainable)
    objective = build_objective(stage, student.config, pair.trainable)
    return TrainingJob(
        stage=stage,
        pair=pair,
        objective=objective,
        gradients=parallelize(pair, objective, parallel, world, bucket_bytes),
        loader=RandomLoader(
            IMAGE_ID, batch_size, accumulation, world.rank, world.size, packed=packed
        ),
        held_out=None,
        max_bad_share=0.0,
        seed=0,
        world=world,
        states=StateFolder(folder, world),
        settings={"stage": {}, "data": {}},
    )


def run_job(
    job: TrainingJob, progress: Progress | None = None, stop_at: int | None = None
) -> tuple[list[StepResult], dict[str, Tensor]]:
    """Train from `progress`; the results and the learned parameters."""
    results: list[StepResult] = []
    progress = progress or Progress()
    try:
        train(job, progress, results.append, lambda: progress.step == stop_at)
    except Stopped:
        assert stop_at is not None
    learned = {n: p.detach().clone() for n, p in job.pair.trainable_parameters().items()}
    return results, learned


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


class ChangedLoader:
    """A loader with a function applied to its batches."""

    def __init__(self, loader: RandomLoader, change: Callable[[StepBatches], StepBatches]):
        self.loader, self.change = loader, change
        self.steps_per_pass, self.unreadable = loader.steps_per_pass, loader.unreadable

    def steps(self, first: int, stop: int) -> Iterable[StepBatches]:
        return map(self.change, self.loader.steps(first, stop))


def poisoned(batches: StepBatches) -> StepBatches:
    """Replace every token by the one with an infinite embedding in `explosive`."""

    def spoil(micro: Batch) -> Batch:
        return replace(micro, input_ids=torch.full_like(micro.input_ids, 3))

    return replace(batches, micro_batches=tuple(spoil(micro) for micro in batches.micro_batches))


@contextmanager
def explosive(job: TrainingJob) -> Iterator[None]:
    """Make the embedding of token 3 infinite; only poisoned batches contain it."""
    for model in (job.pair.teacher, job.pair.student):
        model.model.text_embedding.weight.data[3] = float("inf")
    yield
