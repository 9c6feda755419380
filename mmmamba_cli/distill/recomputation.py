"""`checkpointing: auto`: how many layers recompute their activations, decided from a measured step.

Activation checkpointing (Chen et al., arXiv 1604.06174) keeps the input of a layer only, and runs
the layer again in the backward pass. Before the first step, its largest micro batch runs with every
layer recomputed, twice if a step has several. That takes the least memory, and shows what each
layer would keep otherwise, because its second run keeps all of it. Then only as many layers
recompute as memory needs: the first ones, since the backward pass has released the last ones when
it reaches them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mmmamba_cli.data import Batch, StepBatches
from mmmamba_cli.distill.model_pair import AnyBatch, ModelPair
from mmmamba_cli.distributed import World

# Share of the free memory that a step may take. The rest is for fragmentation.
MEMORY_SHARE = 0.9
# Elements of a patch: 14 x 14 pixels of three channels.
PATCH_ELEMENTS = 588
GIB = 2**30


class MemoryMeter(Protocol):
    """Memory of the device of this process, in bytes."""

    @property
    def name(self) -> str:
        """The device and the share of its memory, for the record of a decision."""
        ...

    def available(self) -> int:
        """What tensors can take beyond what they hold now."""
        ...

    def allocated(self) -> int:
        """What tensors hold now."""
        ...

    def peak(self) -> int:
        """The most that tensors have held since `reset_peak`."""
        ...

    def reset_peak(self) -> None: ...


@dataclass(frozen=True)
class CudaMemory:
    """The `MemoryMeter` of a GPU. The allocator counts on the host: nothing waits for the GPU.

    `share` is the share of the GPU's memory that this process may take: what is free now may be
    taken by other processes later.
    """

    device: torch.device
    share: float = 1.0

    @property
    def name(self) -> str:
        name = torch.cuda.get_device_name(self.device)
        return name if self.share == 1 else f"{self.share:.0%} of {name}"

    def available(self) -> int:
        cached = torch.cuda.memory_reserved(self.device) - self.allocated()
        free, total = torch.cuda.mem_get_info(self.device)
        return min(free + cached, int(self.share * total) - self.allocated())

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


@dataclass(frozen=True)
class StepMemory:
    """Memory of a measured micro batch of `load`, in bytes.

    `recomputed` is the peak with every layer recomputed; `kept` is what each layer adds to it
    otherwise; `limit` is what a step may take.
    """

    load: int
    recomputed: int
    kept: tuple[int, ...]
    limit: int

    def needed(self, count: int, load: int) -> int:
        """Bytes of a step whose first `count` layers recompute, for a micro batch of `load`.

        Memory grows at most linearly with the load, which gradients do not depend on.
        """
        return round(max(1.0, load / self.load) * (self.recomputed + sum(self.kept[count:])))

    def count_for(self, load: int) -> int:
        """The smallest number of first layers that have to recompute."""
        # Layers that do not support checkpointing layer by layer show nothing.
        if any(self.kept):
            for count in range(len(self.kept)):
                if self.needed(count, load) <= self.limit:
                    return count
        return len(self.kept)


@dataclass(frozen=True)
class Decision:
    """The first `layers` of `of` layers recompute; `load` is the largest that it holds for.

    `place` names the device, the share of its memory and the number of processes: elsewhere memory
    is measured again.
    """

    layers: int
    of: int
    load: int
    place: str


def batch_load(batch: AnyBatch) -> int:
    """Columns of a micro batch plus patches of its pictures, which activations grow with."""
    if not isinstance(batch, Batch):
        pixels = sum(value.numel() for value in batch.inputs.values() if value.is_floating_point())
    elif batch.drawings is not None:
        pixels = batch.drawings.num_tiles * 3 * batch.drawings.image_size**2
    else:
        pixels = 0 if batch.pixel_values is None else batch.pixel_values.numel()
    return batch.labels.numel() + pixels // PATCH_ELEMENTS


class Recomputation:
    """Activation checkpointing of a student by measurement, decided alike on all processes.

    Args:
        pair: the models; their layers recompute as decided.
        world: the processes.
        meter: memory of the device; None keeps all activations, as on a CPU.
        log: prints the decision, once and if a larger batch changes it.
        earlier: the decision of a resumed training, which is kept at the same place.
        varies: whether the number of micro batches differs from step to step.
    """

    def __init__(
        self,
        pair: ModelPair,
        world: World,
        meter: MemoryMeter | None,
        log: Callable[[str], None],
        earlier: Decision | None = None,
        varies: bool = False,
    ):
        self._pair, self._world, self._meter, self._log = pair, world, meter, log
        self._varies = varies
        self._number = len(pair.checkpointable_layers)
        self._measured: StepMemory | None = None
        self._place = f"{world.device.type if meter is None else meter.name} x {world.size}"
        self.decision: Decision | None = None
        if earlier is not None and (earlier.of, earlier.place) == (self._number, self._place):
            self.decision = earlier
            pair.checkpoint_layers(earlier.layers)
        elif meter is None:
            self._decide(Decision(0, self._number, 0, self._place), "on a CPU")

    def prepare_step(self, batches: StepBatches, run: Callable[[StepBatches], bool]) -> bool:
        """Decide before the step of `batches`, if no step of this size was decided about.

        Returns whether it ran a step to measure it.

        `run` runs forward and backward passes of micro batches as training does, with all
        processes, and releases the gradients; False if the step has nothing to learn from. Random
        numbers of the following steps do not depend on it.
        """
        if self._meter is None:
            return False
        largest = max(batches.micro_batches, key=batch_load)
        load, decided = batch_load(largest), self.decision
        if not self._world.any(decided is None or load > decided.load):
            return False
        is_first = self._measured is None
        if is_first:
            # Activations of the second micro batch come on top of gradients of the first.
            repeats = 2 if self._varies else min(2, len(batches.micro_batches))
            parts = (largest,) * repeats
            self._measured = self._measure(replace(batches, micro_batches=parts), run)
        if self._measured is None:
            return True
        measured = self._measured
        found = self._world.all_gather([(measured.count_for(load), load)])
        # Sharded layers are gathered again when they recompute, by all processes at once.
        count = max(count for count, _ in found)
        largest_load = max(load for _, load in found)
        self._decide(
            Decision(count, self._number, largest_load, self._place),
            f"a step takes {measured.needed(count, load) / GIB:.2f} GiB, "
            f"{measured.needed(0, load) / GIB:.2f} without and "
            f"{measured.needed(self._number, load) / GIB:.2f} in all layers, "
            f"of {measured.limit / GIB:.2f}",
        )
        return is_first

    def _decide(self, decision: Decision, reason: str) -> None:
        before = None if self.decision is None else self.decision.layers
        self.decision = decision
        self._pair.checkpoint_layers(decision.layers)
        if decision.layers != before:
            self._log(
                f"checkpointing auto: {decision.layers} of {decision.of} layers recompute their "
                f"activations, {reason}"
            )

    def _measure(
        self, batches: StepBatches, run: Callable[[StepBatches], bool]
    ) -> StepMemory | None:
        meter, layers = self._meter, self._pair.checkpointable_layers
        assert meter is not None
        kept = [0] * len(layers)
        self._pair.checkpoint_layers(len(layers))
        for index, layer in enumerate(layers):
            # transformers' own attribute of layers with activation checkpointing.
            layer._gradient_checkpointing_func = _measuring(kept, index, meter)  # type: ignore[assignment]
        meter.reset_peak()
        before, limit = meter.allocated(), round(MEMORY_SHARE * meter.available())
        devices = [] if self._world.device.type == "cpu" else [self._world.device]
        try:
            with torch.random.fork_rng(devices), set_checkpoint_early_stop(False):
                ran = run(batches)
        finally:
            # Sets the function of every layer again.
            self._pair.checkpoint_layers(len(layers))
        peak = meter.peak() - before
        # The peak in metrics is that of training.
        meter.reset_peak()
        load = batch_load(batches.micro_batches[0])
        return StepMemory(load, peak, tuple(kept), limit) if ran else None


def _measuring(kept: list[int], index: int, meter: MemoryMeter) -> Callable[..., Any]:
    """Activation checkpointing that writes what the layer keeps, without its output, to `kept`."""

    def checkpoint_measured(function: Callable[..., Any], *args: Any) -> Any:
        def run(*inputs: Any) -> Any:
            before = meter.allocated()
            output = function(*inputs)
            added = meter.allocated() - before - _nbytes(output)
            # The first run keeps little, the second, in the backward pass, everything.
            kept[index] = max(kept[index], added)
            return output

        return checkpoint(run, *args, use_reentrant=False)

    return checkpoint_measured


def _nbytes(output: Any) -> int:
    tensors: Sequence[Any] = output if isinstance(output, tuple | list) else (output,)
    return sum(one.nbytes for one in tensors if isinstance(one, Tensor))
