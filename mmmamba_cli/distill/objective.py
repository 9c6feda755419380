"""What a loss is to the loop: sums over units that may be spread over batches and processes.

A loss is sum_j weight_j sum_j over its terms j (layers, or a divergence and a cross-entropy). The
weights come from the units of the whole global batch, so that a mean is a mean over all of it and
never a mean of means, however the batch was cut.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mmmamba_cli.data import Batch
from mmmamba_cli.distill.teacher_student import Pair


class Objective(Protocol):
    """A loss over micro batches."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms, as logs show them."""
        ...

    @property
    def layer_local(self) -> bool:
        """Whether layers are run one by one, and mixers entered at `mix`."""
        ...

    def reaches(self, name: str) -> bool:
        """Whether the loss depends on the student's parameter of that name."""
        ...

    def reaches_part(self, name: str) -> bool:
        """Whether it depends on some of the parameter's elements only.

        Weight decay alone would shrink the others, so the parameter is not decayed.
        """
        ...

    def count(self, pair: Pair, batch: Batch) -> Tensor:
        """Units of each term in a micro batch, which may be on the CPU, (terms,) float64 there."""
        ...

    def weigh(self, units: Tensor) -> Tensor:
        """Weight of each term, (terms,), given the units of the global batch."""
        ...

    def sums(self, pair: Pair, batch: Batch, weights: Tensor | None) -> Tensor:
        """Sum of each term, (terms,) float64 on the CPU.

        With `weights`, the gradient of sum_j weight_j sum_j is added to the parameters' as well.
        """
        ...
