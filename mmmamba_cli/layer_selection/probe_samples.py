"""Samples that layers are scored on, and sums over their tokens.

Legend: B rows of a batch, T columns, S samples. Each row of a batch holds one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mmmamba_cli.data import Accumulation, Batch, StepLoader, open_corpus
from mmmamba_cli.distill.kl_loss import LogitsKL
from mmmamba_cli.distill.layer_losses import count_stack_tokens
from mmmamba_cli.distill.teacher_student import TeacherStudent
from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.processing import TrainingProcessor
from mmmamba_cli.recipe import KL, Data

MAX_PROBE_BATCH_SIZE = 8


@dataclass(frozen=True)
class ProbeSamples:
    """Both models, and batches of samples on their device.

    `embedding_ratio` is the number of columns of the embedding stack for each column of the
    language stack. `kl` says which columns a divergence is summed over.
    """

    pair: TeacherStudent
    batches: tuple[Batch, ...]
    embedding_ratio: float
    kl: KL = field(default_factory=KL)

    @property
    def num_layers(self) -> int:
        return len(self.pair.teacher.model.blocks)

    def scored_columns(self, number: int) -> Tensor:
        """(B, T) bool mask of the columns of a batch that a stage with this KL scores."""
        return LogitsKL(self.kl, 1.0).score_mask(self.batches[number])

    def count_scored(self) -> Tensor:
        """(S,) scored columns of each sample, float64."""
        counts = (self.scored_columns(i).sum(1) for i in range(len(self.batches)))
        return torch.cat([count.double().cpu() for count in counts])


def probe_batch_size(samples: int) -> int:
    """The largest batch size up to `MAX_PROBE_BATCH_SIZE` that divides the number of samples."""
    return next(size for size in range(MAX_PROBE_BATCH_SIZE, 0, -1) if samples % size == 0)


def build_loader(
    source: str,
    data: Data,
    processor: TrainingProcessor,
    *,
    stream: str,
    batch_size: int,
    accumulation: Accumulation = 1,
    max_length: int,
    seed: int,
    single_pass: bool,
) -> StepLoader:
    """Batches of `source` in an order drawn by `seed`, one sample a row.

    `stream` names the samples of a corpus that is generated: two streams have none in common. A
    single pass keeps that order within a batch; training sorts a batch by length.
    """
    root = None if data.image_root is None else Path(data.image_root)
    return StepLoader(
        open_corpus(source, root, seed=seed, stream=stream),
        processor,
        batch_size=batch_size,
        accumulation=accumulation,
        max_length=max_length,
        # Not packed: a row is one sample, so that sums of a row are sums of a sample. Sorted by
        # length, every other row would have the longer samples, and the halves would differ.
        batching="padded" if single_pass else "bucketed",
        shuffle=True,
        seed=seed,
        max_tiles=data.max_tiles,
        workers=0,
        single_pass=single_pass,
    )


def read_probe_samples(
    loader: StepLoader, pair: TeacherStudent, kl: KL, samples: int, say: Callable[[str], None]
) -> ProbeSamples:
    """Read the first `samples` samples of the loader; `say` reports samples that are missing.

    Raises:
        DataError: fewer than two samples can be read, so that the data have no halves.
    """
    batches: list[Batch] = []
    bad: list[str] = []
    columns = torch.zeros(2, dtype=torch.float64)
    steps = min(-(-samples // loader.batch_size), loader.steps_per_pass)
    for step in loader.steps(0, steps):
        bad += [f"{one.name}: {one.reason}" for one in step.bad]
        for micro in step.micro_batches:
            if micro.num_samples:
                # Pictures of a generated corpus exist on the device only.
                batches.append(micro.to(pair.device))
                counted = count_stack_tokens(pair, batches[-1])
                columns += torch.tensor(counted, dtype=torch.float64)
    found = sum(batch.num_samples for batch in batches)
    if found < 2:
        raise DataError(
            f"{found} samples can be read, layers are scored on at least 2"
            + (f"; {bad[0]}" if bad else ""),
            "check the data with `mmmamba data check`, or give other conversations",
        )
    if bad:
        say(f"{len(bad)} samples cannot be read and are left out; the first: {bad[0]}")
    if found + len(bad) < samples:
        say(f"the data have fewer samples than {samples}: layers are scored on {found}")
    return ProbeSamples(pair, tuple(batches), float(columns[0] / columns[1]), kl)


def row_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Sum (N,) values of the True columns of `mask` (B, T) by row: (B,) float64 on the CPU."""
    rows = mask.nonzero()[:, 0].cpu()
    # On a GPU the order of this sum, and so its last bits, would differ from run to run.
    return torch.zeros(mask.shape[0], dtype=torch.float64).index_add_(
        0, rows, values.double().cpu()
    )


@dataclass(frozen=True)
class SampleSums:
    """What a layer is worth, summed over the units of each sample: (S,) float64, both."""

    sums: Tensor
    units: Tensor

    def mean(self) -> float:
        return float(self.sums.sum() / self.units.sum())

    def halves(self) -> tuple[float, float]:
        """The means over the even and over the odd samples."""
        first, second = (
            float(self.sums[half::2].sum() / self.units[half::2].sum()) for half in (0, 1)
        )
        return first, second

    def standard_error(self) -> float:
        """The standard error of the mean over samples, a ratio of two sums, linearised."""
        count = len(self.units)
        rest = self.sums - self.mean() * self.units
        variance = rest.square().sum() * count / (count - 1)
        return float(variance.sqrt() / self.units.sum())

    def check(self, layer: int) -> None:
        """Raise `MmmambaError` unless both halves have units and the sums are finite."""
        if not bool(torch.isfinite(self.sums).all()):
            raise MmmambaError(
                f"layer {layer} has a score that is not finite",
                "check the weights with `mmmamba inspect`",
            )
        if any(not float(self.units[half::2].sum()) for half in (0, 1)):
            raise DataError("one half of the samples has nothing to score", "raise --samples")
