"""Losses and norms of a step on their way from the device to the host.

Reading a value right after its step would let the device run dry: the host would wait for it, and
the device then for the kernels of the next step. The values of a step are copied behind its
kernels, and read when the next step is queued.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmmamba_cli.data import StepBatches
from mmmamba_cli.distill.metrics import nonfinite_as_text
from mmmamba_cli.distill.objective import Objective
from mmmamba_cli.distill.optimiser import clip_gradients, largest_magnitudes
from mmmamba_cli.distill.validation import HeldOutMetrics
from mmmamba_cli.distributed import World


class HostCopy:
    """A copy of a device tensor on the host; `read` waits for it, its construction does not."""

    def __init__(self, values: Tensor):
        self._event: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._values = values.detach()
            return
        # Only copies to pinned memory are asynchronous.
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values.detach(), non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(values.device))

    def read(self) -> Tensor:
        """The values on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


@dataclass(frozen=True)
class StepValues:
    """Sums of the terms (terms,) float64, and the gradient norm of a step, on the CPU.

    `nonfinite` is the first parameter whose gradient is not finite on this process, or None.
    """

    sums: Tensor
    norm: float
    nonfinite: str | None

    def find_problem(self, terms: Sequence[str], loss: float, nonfinite: str | None) -> str | None:
        """Describe a loss or gradient that is not finite; None if all are finite.

        `nonfinite` is the parameter that `nonfinite` names on any process.
        """
        if not math.isfinite(loss):
            named = zip(terms, self.sums.tolist(), strict=True)
            bad = [term for term, value in named if not math.isfinite(value)]
            return f"the loss is {loss}" + (f" in {bad[0]}" if bad else "")
        if math.isfinite(self.norm):
            return None
        if nonfinite is not None:
            return f"the gradient of {nonfinite} is not finite"
        return f"the gradient norm is {self.norm}"


class DeviceValues:
    """The values of a step on the device, after its backward passes; clips the gradients.

    Args:
        sums: (terms,) float64, over all processes.
        weights: (terms,) float64 on the CPU; the loss is their product.
        parameters: by name, with their gradients.
        clip: limit of the gradient norm, or None.
    """

    def __init__(
        self,
        sums: Tensor,
        weights: Tensor,
        parameters: dict[str, nn.Parameter],
        clip: float | None,
    ):
        self._terms = len(sums)
        # Clipping changes infinite gradients.
        self._names, largest = largest_magnitudes(parameters)
        norm = clip_gradients(parameters, clip)
        loss = (weights.to(sums.device, non_blocking=True) * sums).sum()
        self.is_finite = torch.isfinite(loss) & torch.isfinite(norm).to(loss.device)
        parts = [part.to(sums.device).double() for part in (norm[None], largest)]
        self._copy = HostCopy(torch.cat((sums, *parts)))

    def read(self) -> StepValues:
        """Wait for the values of the step."""
        values = self._copy.read()
        sums, norm, largest = values.split([self._terms, 1, len(self._names)])
        bad = (~largest.isfinite()).nonzero().flatten().tolist()
        return StepValues(sums, norm.item(), self._names[bad[0]] if bad else None)


@dataclass(frozen=True)
class QueuedStep:
    """A step whose kernels are queued on the device, and what the host knows of it.

    `values` is None, and `empty` the reason, if the step has nothing that the loss scores.
    """

    step: int
    units: Tensor
    values: DeviceValues | None
    empty: str | None
    learning_rate: float
    tokens: int
    samples: int
    # Names of the samples of this process.
    names: tuple[str, ...]
    # `name: reason` of the unreadable samples of all processes.
    bad: tuple[str, ...]
    memory_gib: float | None


@dataclass(frozen=True)
class StepResult:
    """Results of one step, for logs and displays."""

    step: int
    loss: float
    terms: Mapping[str, float]
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    bad: tuple[str, ...] = ()
    skipped: str | None = None
    held_out: HeldOutMetrics | None = None
    memory_gib: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """All fields but `held_out`, as JSON; numbers that are not finite as text."""
        fields = {key: value for key, value in asdict(self).items() if key != "held_out"}
        return nonfinite_as_text(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> StepResult:
        """The result that `as_dict` gave."""
        numbers = ("loss", "learning_rate", "gradient_norm", "tokens_per_second")
        terms = {name: float(value) for name, value in fields["terms"].items()}
        return cls(
            **{
                **fields,
                **{name: float(fields[name]) for name in numbers},
                "terms": terms,
                "bad": tuple(fields["bad"]),
            }
        )


def read_step(
    queued: QueuedStep, objective: Objective, world: World, since: float
) -> tuple[StepResult, float]:
    """Wait for the values of a step; also return when they were there.

    `since` is that time of the step before it. Both are on the clock of `time.perf_counter`.
    """
    loss = norm = math.nan
    sums, skipped = torch.zeros_like(queued.units), queued.empty
    if queued.values is not None:
        values = queued.values.read()
        sums, norm = values.sums, values.norm
        loss = float((objective.term_weights(queued.units) * sums).sum())
        nonfinite = values.nonfinite
        if math.isfinite(loss) and not math.isfinite(norm):
            # A process sees its share of sharded gradients only.
            found = world.all_gather([nonfinite])
            nonfinite = next((name for name in found if name is not None), None)
        skipped = values.find_problem(objective.terms, loss, nonfinite)
    now = time.perf_counter()
    # The mean of a term without units is NaN (0 / 0).
    per_term = (sums / queued.units).tolist()
    result = StepResult(
        step=queued.step,
        loss=loss,
        terms=dict(zip(objective.terms, per_term, strict=True)),
        learning_rate=queued.learning_rate,
        gradient_norm=norm,
        tokens=queued.tokens,
        tokens_per_second=queued.tokens / (now - since),
        bad=queued.bad,
        skipped=skipped,
        memory_gib=queued.memory_gib,
    )
    return result, now


def explain_empty_step(samples: int, batches: StepBatches) -> str:
    """The reason why a step has no unit that the loss scores."""
    if samples == 0:
        return f"none of its {batches.num_planned} samples could be read"
    return f"none of its {samples} samples has a token that the loss scores"
