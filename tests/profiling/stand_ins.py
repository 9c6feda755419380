"""A simulated timer and decoder with given times and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmmamba_cli.profiling import OutOfMemory, Subject, SubjectInfo
from mmmamba_cli.profiling.interfaces import EAGER, STATIC, STUDENT, Cost

VOCABULARY = 16


@dataclass
class Bench:
    """A `DeviceTimer` with a simulated clock that the decoders advance."""

    clock: float = 0.0
    held: int = 0
    highest: int = 0
    # (subject, task, context) in the order of measurement.
    calls: list[tuple[str, str, int]] = field(default_factory=list)
    counts_memory: bool = True
    # Share of kernels in the time of a token.
    kernel_share: float = 0.25
    watts: float | None = 300.0

    def seconds(self, work: Callable[[], object]) -> float:
        begin = self.clock
        work()
        return self.clock - begin

    def now(self) -> float:
        return self.clock

    def allocated(self) -> int | None:
        return self.held if self.counts_memory else None

    def reset_peak(self) -> None:
        self.highest = self.held

    def peak(self) -> int | None:
        return self.highest if self.counts_memory else None

    def empty_cache(self) -> None:
        pass

    def kernel_seconds(self, work: Callable[[], object]) -> float | None:
        return self.kernel_share * self.seconds(work)

    def joules(self) -> float | None:
        return None if self.watts is None else self.watts * self.clock

    def take(self, size: int) -> None:
        self.held += size
        self.highest = max(self.highest, self.held)


@dataclass
class StandIn:
    """A `Decoder` with simulated times: `step_seconds(context)` and `read_seconds(columns)`."""

    name: str
    bench: Bench
    step_seconds: Callable[[int], float] = lambda context: 1.0
    read_seconds: Callable[[int], float] = lambda columns: 1.0
    weight_bytes: int = 1000
    cache_bytes: int = 0
    # Contexts from this length on are out of memory.
    too_long: int = 10**9
    # So is a cache of this many columns, summed over the rows.
    too_large: int = 10**9
    # Additional seconds per step, by batch size.
    row_seconds: Callable[[int], float] = lambda rows: 0.0
    batch: int = 1
    # Bytes of activations during a step.
    transient: int = 7
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    context: int = 0
    others: Mapping[str, StandIn] = field(default_factory=dict)
    # Added to every logit that is computed with the cache.
    error: float = 0.0

    def random_prompt(self, batch: int, length: int, rng: torch.Generator) -> Tensor:
        return torch.randint(0, VOCABULARY, (batch, length), generator=rng)

    def start(self, batch: int, columns: int) -> None:
        self.release()
        self.batch = batch
        if batch * columns >= self.too_large:
            raise OutOfMemory(f"{batch} rows of {columns} columns are too many")

    def _grow(self, columns: int) -> None:
        self.context += columns
        if self.context >= self.too_long:
            raise OutOfMemory(f"{self.context} columns are too many")
        self.bench.take(10 * columns)
        self.cache_bytes += 10 * columns

    def prefill(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        self._grow(ids.shape[1])
        self.bench.clock += self.read_seconds(ids.shape[1])
        if ids.shape[1] != 128:
            self.bench.calls.append((self.name, "prefill", ids.shape[1]))
        return self._logits(ids[:, -1])

    def fill_random(self, batch: int, columns: int, rng: torch.Generator) -> None:
        self._grow(columns)
        self.bench.calls.append((self.name, "decode", columns))
        self.filled = columns

    def step(self, ids: Tensor) -> Tensor:
        self.bench.take(self.transient)
        self.bench.held -= self.transient
        self.bench.clock += self.step_seconds(self.context) + self.row_seconds(self.batch)
        return self._logits(ids[:, -1])

    def decode(self, count: int) -> Tensor:
        ids = torch.zeros(1, 1, dtype=torch.int64)
        for _ in range(count):
            ids = self.step(ids).argmax(-1, keepdim=True)
        return ids

    def cost(self, batch: int, context: int, prefill: bool) -> Cost:
        return Cost(bytes=100 * context + batch, operations=context if prefill else 0)

    def release(self) -> None:
        self.bench.held -= self.cache_bytes
        self.cache_bytes = self.context = 0
        self.batch = 1

    def forward_without_cache(self, ids: Tensor, last: int) -> Tensor:
        return torch.nn.functional.one_hot(ids[:, -last:], VOCABULARY).float()

    def in_fp32(self) -> StandIn:
        raise OutOfMemory("there is none")

    def variants(self) -> Mapping[str, StandIn]:
        return self.others

    def _logits(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids, VOCABULARY).float() + self.error


def subject_of(
    decoder: StandIn,
    role: str = STUDENT,
    attention: tuple[int, ...] = (),
    cache: str = STATIC,
    way: str = EAGER,
) -> Subject:
    kind = "hybrid" if attention else "linear"
    info = SubjectInfo(role, cache, kind, attention, 8, "planted", way=way)
    return Subject(decoder.name, info, lambda: decoder)
