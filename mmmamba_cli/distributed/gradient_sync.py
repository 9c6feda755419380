"""Gradients of a step over processes: one reduction, during its last backward pass.

Gradients of replicated parameters are summed in flat buckets, as in PyTorch DDP (Li et al., arXiv
2006.15704): the reduction of a bucket starts once its last gradient is complete, and runs beside
the rest of the backward pass. FSDP2 reduces those of sharded parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mmmamba_cli.distributed.world import World

# Large enough for the bandwidth of a link; small enough to start early in the backward pass.
BUCKET_BYTES = 32 * 2**20


@dataclass
class _Bucket:
    """Parameters of one dtype whose gradients are reduced in one call."""

    parameters: list[nn.Parameter] = field(default_factory=list)
    # Parameters whose gradients of this step are not complete.
    waiting: set[nn.Parameter] = field(default_factory=set)
    # The gradients in one tensor once the reduction has started, and its handle.
    flat: Tensor | None = None
    work: dist.Work | None = None

    def views(self) -> list[Tensor]:
        """The gradients in `flat`, in the shapes of their parameters."""
        assert self.flat is not None
        parts = self.flat.split([parameter.numel() for parameter in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]


class GradientReducer:
    """Sums the gradients of replicated parameters over processes.

    Args:
        parameters: in the order in which the backward pass completes their gradients. The order is
            the same on all processes, and so is that of the reductions.
        world: does nothing for a single process.
        partial: parameters whose gradients one micro batch adds in several backward passes. Their
            reduction starts after the last one.
        average: divide the sums by the number of processes, as FSDP2 does.
        bucket_bytes: upper limit of a bucket of more than one parameter.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        world: World,
        *,
        partial: Collection[nn.Parameter] = (),
        average: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
    ):
        self._divisor = world.size if average else 1
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        # Index of the first bucket whose reduction has not started.
        self._next = 0
        self._is_last = False
        if world.size == 1:
            return
        late = set(partial)
        early = [parameter for parameter in parameters if parameter not in late]
        self._fill(early, bucket_bytes)
        self._fill([parameter for parameter in parameters if parameter in late], bucket_bytes)
        for parameter in early:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def _fill(self, parameters: Sequence[nn.Parameter], bucket_bytes: int) -> None:
        """Distribute parameters over new buckets, in order."""
        bucket, size = _Bucket(), 0
        for parameter in parameters:
            other = bool(bucket.parameters) and bucket.parameters[0].dtype != parameter.dtype
            if other or size + parameter.nbytes > bucket_bytes:
                bucket, size = _Bucket(), 0
            if not bucket.parameters:
                self._buckets.append(bucket)
            bucket.parameters.append(parameter)
            self._bucket_of[parameter] = bucket
            size += parameter.nbytes

    def begin_last_backward(self) -> None:
        """Let the next backward passes start the reductions."""
        self._is_last = True
        for bucket in self._buckets:
            bucket.waiting = set(bucket.parameters)

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self._is_last:
            return
        bucket = self._bucket_of[parameter]  # type: ignore[index]
        if parameter not in bucket.waiting:
            raise RuntimeError(
                f"a gradient of shape {tuple(parameter.shape)} was added in two backward passes"
            )
        bucket.waiting.remove(parameter)  # type: ignore[arg-type]
        # Later buckets may be complete earlier on some processes only.
        while self._next < len(self._buckets) and not self._buckets[self._next].waiting:
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        gradients = [p.grad for p in bucket.parameters]
        bucket.flat = torch.cat(
            [
                (torch.zeros_like(p) if gradient is None else gradient).detach().reshape(-1)
                for p, gradient in zip(bucket.parameters, gradients, strict=True)
            ]
        )
        # Views free the memory of the gradients, and need no copy back.
        for parameter, view in zip(bucket.parameters, bucket.views(), strict=True):
            if parameter.grad is not None:
                parameter.grad = view
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)

    def gradient_flags(self) -> Tensor:
        """Whether each parameter has a gradient on this process: (parameters,) float64, 0 or 1."""
        return torch.tensor(
            [float(parameter.grad is not None) for parameter in self._bucket_of],
            dtype=torch.float64,
        )

    def start_all(self) -> None:
        """Start the reductions that the backward pass has not started.

        A parameter without a gradient on this process holds back its bucket here only. All
        processes have to start all buckets before any other collective of the same backend, which
        matches them by their order.
        """
        while self._next < len(self._buckets):
            self._start_next()

    def finish(self, flags: Tensor) -> None:
        """Wait for the sums; `flags` are the sums of `gradient_flags` over processes.

        Call `start_all` first.

        A parameter without a gradient on every process keeps none, so that the optimiser skips it
        as on a single process.
        """
        used = dict(zip(self._bucket_of, flags.tolist(), strict=True))
        for bucket in self._buckets:
            assert bucket.work is not None and bucket.flat is not None
            bucket.work.wait()
            if self._divisor > 1:
                bucket.flat /= self._divisor
            for parameter, view in zip(bucket.parameters, bucket.views(), strict=True):
                parameter.grad = view if used[parameter] else None
            bucket.flat = bucket.work = None
        self._next = 0
        self._is_last = False


@dataclass(frozen=True)
class GradientSync:
    """The gradients of a step over processes, for replicated and sharded parameters.

    `sharded` are the modules that FSDP2 shards. With `keep_gathered` their parameters are gathered
    once per step and their gradients reduced once; otherwise in each micro batch, which takes less
    memory. The loss is multiplied by `loss_factor`, because FSDP2 averages gradients.
    """

    reducer: GradientReducer
    sharded: tuple[FSDPModule, ...] = ()
    keep_gathered: bool = True
    loss_factor: int = 1

    def begin_step(self) -> None:
        """Start to gather sharded parameters; each forward pass waits for its own."""
        if self.keep_gathered:
            for module in self.sharded:
                module.unshard(async_op=True)

    def begin_micro_batch(self, is_last: bool) -> None:
        """Call it before the forward pass of each micro batch of a step."""
        if self.keep_gathered:
            for module in self.sharded:
                module.set_requires_gradient_sync(is_last)
                module.set_reshard_after_backward(is_last)
        if is_last:
            self.reducer.begin_last_backward()

    def finish(self, sums: Tensor, world: World) -> Tensor:
        """Wait for the gradients; return the sum of `sums`, (terms,) float64, over processes.

        The result is on the device of `sums`. On a GPU the host does not wait for it.
        """
        flags = self.reducer.gradient_flags()
        self.reducer.start_all()
        if sums.device.type == "cpu":
            # One collective for both.
            total = world.all_reduce_sum(torch.cat((sums.detach(), flags)))
            sums, flags = total[: len(sums)], total[len(sums) :]
        else:
            sums = world.all_reduce_sum_on_device(sums)
            flags = world.all_reduce_sum(flags)
        self.reducer.finish(flags)
        return sums
