"""The benchmark: order of the measurements, time budget, and handling of out-of-memory errors.

Rounds are the outermost loop, then contexts, then subjects. The first subject rotates, so that
drift of the device, such as its temperature, affects all subjects alike. Decoding comes before
prefill: it matters most and is cheap, because its cache is filled with random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mmmamba_cli.devices import OutOfMemory, translate_out_of_memory
from mmmamba_cli.profiling.interfaces import Cost, Decoder, Subject
from mmmamba_cli.profiling.result import (
    DECODE,
    MEASURED,
    OUT_OF_MEMORY,
    OVER_BUDGET,
    PREFILL,
    TOO_LONG,
    Measurement,
    Memory,
    RooflinePart,
    Status,
    Task,
    median_and_quartiles,
)
from mmmamba_cli.profiling.roofline import roofline_seconds
from mmmamba_cli.profiling.timers import (
    PREFILL_WARM_UPS,
    SHORT_PREFILL_REPEATS,
    SHORT_PREFILL_SECONDS,
    DeviceTimer,
    TimedRepeat,
    device_timer,
    time_decode,
    time_prefill,
)

# Share of the budget for decoding if prefill is measured too.
DECODE_BUDGET_SHARE = 0.5
# Predicted time of a first measurement: at most this many times its roofline bound.
MAX_ROOFLINE_FACTOR = 4
# Prompt length of the untimed prefill that warms a subject up and predicts longer ones.
WARM_UP_COLUMNS = 128


@dataclass(frozen=True)
class Plan:
    """What to measure. `repeats` is per context and subject, spread over `rounds`.

    A repeat of decoding is the mean of `burst` consecutive tokens. Prefill is measured once per
    round, a short one several times. `budget` is in seconds, None for no limit.
    """

    contexts: tuple[int, ...]
    batch: int = 1
    repeats: int = 12
    rounds: int = 3
    burst: int = 1
    # Untimed tokens before each measurement.
    warm_up: int = 3
    prefill: bool = True
    # Prompt lengths of prefill; None is `contexts`.
    prefill_contexts: tuple[int, ...] | None = None
    # Chunk size of prefill in columns; None is each model's default.
    prefill_chunk: int | None = None
    # Read each prompt untimed first; the allocator and the compilers of a GPU need it.
    warm_prefill: bool = False
    budget: float | None = None
    seed: int = 0
    # Longer prompts of the correctness check, for decoders that are not eager.
    check_lengths: tuple[int, ...] = ()
    # Contexts of the search for the best batch size, and its subjects; () is all subjects.
    throughput: tuple[int, ...] = ()
    throughput_subjects: tuple[str, ...] = ()
    largest_batch: int = 4096
    # Measure the device's copy and matmul rates, and compare each time with the roofline.
    roofline: bool = True
    # Measure a GPU's memory, launch overhead and energy, in repeats of their own.
    gpu_metrics: bool = True

    @property
    def num_rounds(self) -> int:
        return max(1, min(self.rounds, self.repeats))

    @property
    def repeats_per_round(self) -> int:
        return -(-self.repeats // self.num_rounds)

    def lengths(self, task: Task) -> list[int]:
        """Contexts of a task, ascending."""
        own = self.prefill_contexts if task == PREFILL else None
        return sorted(self.contexts if own is None else own)

    def num_measurements(self, num_subjects: int) -> int:
        """Number of calls of `ProfileProgress.advance`."""
        prompts = len(self.prefill_contexts or self.contexts) if self.prefill else 0
        return self.num_rounds * (len(self.contexts) + prompts) * num_subjects


@dataclass
class ProfileProgress:
    """Callbacks: a message, and the number of finished measurements."""

    log: Callable[[str], None] = lambda text: None
    advance: Callable[[int], None] = lambda count: None


@dataclass
class LoadedDecoders:
    """Decoders in memory, by the subject's name."""

    decoders: dict[str, Decoder] = field(default_factory=dict)
    weight_bytes: dict[str, int] = field(default_factory=dict)
    # Set once a subject fits only without the others: then one decoder is kept at a time.
    one_at_a_time: bool = False

    def get(self, subject: Subject) -> Decoder:
        """The subject's decoder, loaded if necessary. Raises `OutOfMemory`."""
        if self.one_at_a_time:
            self.keep_only(subject)
        if subject.name not in self.decoders:
            decoder = translate_out_of_memory(subject.build)
            self.decoders[subject.name] = decoder
            self.weight_bytes[subject.name] = decoder.weight_bytes
        return self.decoders[subject.name]

    def keep_only(self, subject: Subject) -> bool:
        """Free the other decoders; return whether there were any."""
        others = [name for name in self.decoders if name != subject.name]
        for name in others:
            del self.decoders[name]
        return bool(others)


@dataclass
class _Record:
    """A measurement that collects its rounds."""

    status: Status = MEASURED
    rounds: list[tuple[float, ...]] = field(default_factory=list)
    memory: Memory | None = None
    alone: bool = False
    note: str = ""
    cost: Cost | None = None
    # Duration of the last round, including setup.
    seconds: float = 0.0


def measure(
    subjects: Sequence[Subject],
    plan: Plan,
    timer: DeviceTimer | None = None,
    progress: ProfileProgress | None = None,
    loaded: LoadedDecoders | None = None,
    roofline: RooflinePart | None = None,
) -> list[Measurement]:
    """Measure everything in `plan`; results are ordered by task, context, subject.

    What does not fit the memory or the budget is a measurement too, with that `status`; longer
    contexts of the same subject are then skipped. `loaded` passes decoders that are already in
    memory, `roofline` the device's rates. Other errors are not caught.
    """
    return _Benchmark(
        subjects, plan, timer, progress or ProfileProgress(), loaded or LoadedDecoders(), roofline
    ).run()


class _Benchmark:
    def __init__(
        self,
        subjects: Sequence[Subject],
        plan: Plan,
        timer: DeviceTimer | None,
        progress: ProfileProgress,
        loaded: LoadedDecoders,
        roofline: RooflinePart | None,
    ):
        self.subjects, self.plan, self.progress, self.loaded = subjects, plan, progress, loaded
        self.roofline = roofline
        self._timer = timer
        self.records: dict[tuple[Task, int, str], _Record] = {}
        # Seconds per column of the warm-up prefill, by subject.
        self.rates: dict[str, float] = {}
        self.rng = torch.Generator().manual_seed(plan.seed)

    def run(self) -> list[Measurement]:
        plan = self.plan
        tasks: tuple[Task, ...] = (DECODE, PREFILL) if plan.prefill else (DECODE,)
        began = None if self._timer is None else self._timer.now()
        for task in tasks:
            share = DECODE_BUDGET_SHARE if plan.prefill and task == DECODE else 1.0
            for round_ in range(plan.num_rounds):
                for index, context in enumerate(plan.lengths(task)):
                    shift = (round_ + index) % len(self.subjects)
                    for subject in (*self.subjects[shift:], *self.subjects[:shift]):
                        if began is None:
                            began = self.timer(subject).now()
                        self._measure_round(subject, task, context, round_, began, share)
                        self.progress.advance(1)
        return [
            self._measurement(task, context, subject.name)
            for task in tasks
            for context in plan.lengths(task)
            for subject in self.subjects
        ]

    def timer(self, subject: Subject) -> DeviceTimer:
        """The given timer, or that of the device on which the first subject is loaded."""
        if self._timer is None:
            self._timer = device_timer(self.loaded.get(subject).device)
        return self._timer

    def _measure_round(
        self, subject: Subject, task: Task, context: int, round_: int, began: float, share: float
    ) -> None:
        """Measure one subject at one context in one round, or record why not."""
        record = self.records.setdefault((task, context, subject.name), _Record())
        if round_ == 0:
            record.status, record.note = self._initial_status(subject.name, task, context)
        if record.status != MEASURED:
            return
        timer = self.timer(subject)
        if task == PREFILL:
            self._warm_up_prefill(subject, timer)
        begin = timer.now()
        if self.plan.budget is not None:
            predicted = self._predict_seconds(subject, task, context)
            if begin - began + predicted > share * self.plan.budget:
                if not record.rounds:
                    record.status = OVER_BUDGET
                    record.note = f"about {predicted:.1f} s more would have passed the budget"
                return
        try:
            self._measure_or_alone(subject, task, context, record)
        except OutOfMemory as error:
            # A later round may have less free memory than the first; earlier rounds are kept.
            if not record.rounds:
                record.status, record.note = OUT_OF_MEMORY, str(error)
        record.seconds = timer.now() - begin

    def _initial_status(self, name: str, task: Task, context: int) -> tuple[Status, str]:
        """Skip a context if a shorter one was out of memory or over budget."""
        for (other_task, other, other_name), record in self.records.items():
            if (other_task, other_name) == (task, name) and other < context:
                if record.status in (OUT_OF_MEMORY, TOO_LONG):
                    return TOO_LONG, ""
                if record.status == OVER_BUDGET:
                    return OVER_BUDGET, "as a shorter one was"
        return MEASURED, ""

    def _warm_up_prefill(self, subject: Subject, timer: DeviceTimer) -> None:
        """Prefill a short prompt twice, once per subject; the second run gives its rate."""
        if subject.name in self.rates:
            return
        self.rates[subject.name] = 0.0

        def seconds_per_column() -> float:
            decoder = self.loaded.get(subject)
            ids = decoder.random_prompt(self.plan.batch, WARM_UP_COLUMNS, self.rng)
            for _ in range(2):
                decoder.start(self.plan.batch, WARM_UP_COLUMNS)
                seconds = timer.seconds(lambda: decoder.prefill(ids))
            decoder.release()
            return seconds / WARM_UP_COLUMNS

        try:
            self.rates[subject.name] = translate_out_of_memory(seconds_per_column)
        except OutOfMemory:
            # The requested prompts will not fit either and are recorded as out of memory there.
            self._free_memory(subject)

    def _predict_seconds(self, subject: Subject, task: Task, context: int) -> float:
        """Predicted duration of a round, from earlier rounds or shorter contexts."""
        own = self.records[task, context, subject.name]
        if own.rounds:
            return own.seconds
        shorter_runs = [
            (other, record.seconds)
            for (other_task, other, name), record in self.records.items()
            if (other_task, name) == (task, subject.name) and record.rounds and other < context
        ]
        if shorter_runs:
            shorter, seconds = max(shorter_runs)
            growth = 2 if task == PREFILL and subject.info.attention_layers else 1
            predicted = seconds * (context / shorter) ** growth
        else:
            seconds = math.inf
            predicted = self.rates.get(subject.name, 0.0) * context if task == PREFILL else 0.0
        return min(predicted, self._roofline_limit(subject, task, context, seconds))

    def _roofline_limit(self, subject: Subject, task: Task, context: int, shorter: float) -> float:
        """Upper estimate of a first round by the roofline.

        `shorter` is the duration at a shorter context: launch overhead, which does not grow.
        """
        decoder, plan = self.loaded.decoders.get(subject.name), self.plan
        if decoder is None or self.roofline is None:
            return math.inf
        bound = roofline_seconds(decoder.cost(plan.batch, context, task == PREFILL), self.roofline)
        if task == PREFILL:
            reads = SHORT_PREFILL_REPEATS if bound <= SHORT_PREFILL_SECONDS else 1
            warm_ups = PREFILL_WARM_UPS if plan.warm_prefill else 0
            return (reads + warm_ups) * MAX_ROOFLINE_FACTOR * bound
        tokens = plan.warm_up + plan.repeats_per_round * plan.burst
        return shorter + tokens * MAX_ROOFLINE_FACTOR * bound

    def _measure_or_alone(
        self, subject: Subject, task: Task, context: int, record: _Record
    ) -> None:
        """Measure; if memory does not suffice, retry without the other models."""
        try:
            self._measure(subject, task, context, record)
            return
        except OutOfMemory as error:
            message, hopeless = str(error), error.hopeless
        self._free_memory(subject)
        if hopeless or not self.loaded.keep_only(subject):
            raise OutOfMemory(message)
        self._free_memory(subject)
        try:
            self._measure(subject, task, context, record)
        except OutOfMemory as error:
            message = str(error)
        else:
            self.loaded.one_at_a_time = record.alone = True
            return
        self._free_memory(subject)
        raise OutOfMemory(message)

    def _free_memory(self, subject: Subject) -> None:
        decoder = self.loaded.decoders.get(subject.name)
        if decoder is not None:
            decoder.release()
        if self._timer is not None:
            self._timer.empty_cache()

    def _measure(self, subject: Subject, task: Task, context: int, record: _Record) -> None:
        decoder, plan = self.loaded.get(subject), self.plan
        timer = self.timer(subject)

        def work() -> TimedRepeat:
            if task == PREFILL:
                return time_prefill(
                    decoder,
                    timer,
                    batch=plan.batch,
                    context=context,
                    chunk=plan.prefill_chunk,
                    # In every round: releasing the cache also releases the captured graphs.
                    warm=plan.warm_prefill,
                    rng=self.rng,
                )
            return time_decode(
                decoder,
                timer,
                batch=plan.batch,
                context=context,
                warm_up=plan.warm_up,
                repeats=plan.repeats_per_round,
                burst=plan.burst,
                rng=self.rng,
            )

        seconds, memory = translate_out_of_memory(work)
        record.rounds.append(seconds)
        record.cost = decoder.cost(plan.batch, context, task == PREFILL)
        if record.memory is None or memory.total > record.memory.total:
            record.memory = memory

    def _measurement(self, task: Task, context: int, name: str) -> Measurement:
        record = self.records[task, context, name]
        median, quartiles = median_and_quartiles(record.rounds) if record.rounds else (None, None)
        floor = None
        if record.cost is not None and self.roofline is not None:
            floor = roofline_seconds(record.cost, self.roofline)
        return Measurement(
            subject=name,
            task=task,
            context=context,
            status=record.status,
            rounds=tuple(record.rounds),
            memory=record.memory,
            alone=record.alone,
            note=record.note,
            median=median,
            quartiles=quartiles,
            floor=floor,
        )
