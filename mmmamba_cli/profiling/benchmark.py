"""The order in which things are measured, and what becomes of those that do not fit.

Rounds lie outermost, then contexts, then subjects, and the first subject is another one in every
turn: what drifts, as a clock that heats up, touches all alike. Decoding comes before prefill,
because it is the question, and cheap: its cache is filled, not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mmmamba_cli.profiling.interfaces import Cost, Decoder, OutOfMemory, Subject
from mmmamba_cli.profiling.result import (
    DECODE,
    MEASURED,
    OUT_OF_MEMORY,
    OVER_BUDGET,
    PREFILL,
    TOO_LONG,
    CeilingsPart,
    Measurement,
    Memory,
    Status,
    Task,
    summarised,
)
from mmmamba_cli.profiling.roofline import floor_of
from mmmamba_cli.profiling.timed_repeat import (
    READS_IF_SHORT,
    SHORT,
    WARM_READS,
    Turn,
    decode_turn,
    prefill_turn,
)
from mmmamba_cli.profiling.timers import Instruments, instruments_of, or_out_of_memory

# Share of the budget that decoding may have, if a prefill is to follow.
DECODE_SHARE = 0.5
# A prefill that takes longer than so many of its floors is not foreseen.
FLOORS = 4
# Columns of the prefill that warms a model up and says how fast it is.
WARM_COLUMNS = 128


@dataclass(frozen=True)
class Plan:
    """What to measure. `repeats` are for each context and subject, spread over `rounds`.

    A repeat of decoding is `burst` tokens one behind the other, and their mean; a prefill is
    measured once a round, a short one a few times. `budget` is in seconds, None for as long as it
    takes.
    """

    contexts: tuple[int, ...]
    batch: int = 1
    repeats: int = 12
    rounds: int = 3
    burst: int = 1
    # Tokens decoded before the first that is timed, in every turn.
    warm_up: int = 3
    prefill: bool = True
    # Lengths of prompts; None is `contexts`.
    prefill_contexts: tuple[int, ...] | None = None
    # Columns that a prefill reads at a time; None is as suits each model.
    prefill_chunk: int | None = None
    # Whether each length is read once before it is timed, as a GPU's allocator wants it.
    warm_prefill: bool = False
    budget: float | None = None
    seed: int = 0
    # Lengths of prompts that the gate reads besides its short one, with decoders not eager.
    gate_at: tuple[int, ...] = ()
    # Contexts at which batches are tried for the most tokens a second, and of whom; () is of all.
    throughput: tuple[int, ...] = ()
    throughput_of: tuple[str, ...] = ()
    largest_batch: int = 4096
    # Whether the device's rates are measured, and with them floors.
    floors: bool = True
    # Whether a GPU's memory, launches and energy are read, which takes turns of their own.
    gauges: bool = True

    @property
    def turns(self) -> int:
        return max(1, min(self.rounds, self.repeats))

    @property
    def repeats_a_turn(self) -> int:
        return -(-self.repeats // self.turns)

    def lengths(self, task: Task) -> list[int]:
        """Contexts at which a task is measured, ascending."""
        own = self.prefill_contexts if task == PREFILL else None
        return sorted(self.contexts if own is None else own)


@dataclass
class Watch:
    """What the caller hears of progress; each may do nothing."""

    say: Callable[[str], None] = lambda text: None
    advance: Callable[[int], None] = lambda more: None


@dataclass
class Loaded:
    """Decoders that are in memory, by the subject's name."""

    decoders: dict[str, Decoder] = field(default_factory=dict)
    weight_bytes: dict[str, int] = field(default_factory=dict)
    # From when a subject fitted only without the others: they take turns in memory.
    crowded: bool = False

    def get(self, subject: Subject) -> Decoder:
        """The subject's decoder, built if need be. Raises `OutOfMemory`."""
        if self.crowded:
            self.keep_only(subject)
        if subject.name not in self.decoders:
            decoder = or_out_of_memory(subject.build)
            self.decoders[subject.name] = decoder
            self.weight_bytes[subject.name] = decoder.weight_bytes
        return self.decoders[subject.name]

    def keep_only(self, subject: Subject) -> bool:
        """Let go of the others; whether there were any."""
        others = [name for name in self.decoders if name != subject.name]
        for name in others:
            del self.decoders[name]
        return bool(others)


@dataclass
class _Record:
    """A measurement in the making."""

    status: Status = MEASURED
    rounds: list[tuple[float, ...]] = field(default_factory=list)
    memory: Memory | None = None
    alone: bool = False
    note: str = ""
    need: Cost | None = None
    # How long the last turn took, everything included.
    cost: float = 0.0


def measure(
    subjects: Sequence[Subject],
    plan: Plan,
    instruments: Instruments | None = None,
    watch: Watch | None = None,
    loaded: Loaded | None = None,
    ceilings: CeilingsPart | None = None,
) -> list[Measurement]:
    """Everything the plan asks for, in the order task, context, subject.

    What does not fit the device's memory or the budget is a measurement too, and its `status` says
    which; the same subject's longer contexts are then not tried. `loaded` holds decoders that are
    there already, as the gate's. Floors are by `ceilings`. Other errors are not caught.
    """
    bench = _Bench(subjects, plan, instruments, watch or Watch(), loaded or Loaded(), ceilings)
    return bench.run()


class _Bench:
    def __init__(
        self,
        subjects: Sequence[Subject],
        plan: Plan,
        instruments: Instruments | None,
        watch: Watch,
        loaded: Loaded,
        ceilings: CeilingsPart | None,
    ):
        self.subjects, self.plan, self.watch, self.loaded = subjects, plan, watch, loaded
        self.ceilings = ceilings
        self._instruments = instruments
        self.records: dict[tuple[Task, int, str], _Record] = {}
        # Seconds a column, from the prefill that warms a subject up.
        self.rates: dict[str, float] = {}
        self.rng = torch.Generator().manual_seed(plan.seed)

    def run(self) -> list[Measurement]:
        plan = self.plan
        tasks: tuple[Task, ...] = (DECODE, PREFILL) if plan.prefill else (DECODE,)
        began = None if self._instruments is None else self._instruments.now()
        for task in tasks:
            share = DECODE_SHARE if plan.prefill and task == DECODE else 1.0
            for round_ in range(plan.turns):
                for place, context in enumerate(plan.lengths(task)):
                    shift = (round_ + place) % len(self.subjects)
                    for subject in (*self.subjects[shift:], *self.subjects[:shift]):
                        if began is None:
                            began = self.instruments(subject).now()
                        self._turn(subject, task, context, round_, began, share)
                        self.watch.advance(1)
        return [
            self._measurement(task, context, subject.name)
            for task in tasks
            for context in plan.lengths(task)
            for subject in self.subjects
        ]

    def instruments(self, subject: Subject) -> Instruments:
        """Those given, else those of the device that the first subject was loaded to."""
        if self._instruments is None:
            self._instruments = instruments_of(self.loaded.get(subject).device)
        return self._instruments

    def _turn(
        self, subject: Subject, task: Task, context: int, round_: int, began: float, share: float
    ) -> None:
        """Measure a subject once at one context, or note why not."""
        record = self.records.setdefault((task, context, subject.name), _Record())
        if round_ == 0:
            record.status, record.note = self._barred(subject.name, task, context)
        if record.status != MEASURED:
            return
        meter = self.instruments(subject)
        if task == PREFILL:
            self._warm(subject, meter)
        begin = meter.now()
        if self.plan.budget is not None:
            ahead = self._predicted(subject, task, context)
            if begin - began + ahead > share * self.plan.budget:
                if not record.rounds:
                    record.status = OVER_BUDGET
                    record.note = f"about {ahead:.1f} s more would have passed the budget"
                return
        try:
            self._measure_or_alone(subject, task, context, round_, record)
        except OutOfMemory as error:
            # A later round may find less room than the first did; what was measured stays.
            if not record.rounds:
                record.status, record.note = OUT_OF_MEMORY, str(error)
        record.cost = meter.now() - begin

    def _barred(self, name: str, task: Task, context: int) -> tuple[Status, str]:
        """Whether a shorter context has shown that this one is not to be tried."""
        for (other_task, other, other_name), record in self.records.items():
            if (other_task, other_name) == (task, name) and other < context:
                if record.status in (OUT_OF_MEMORY, TOO_LONG):
                    return TOO_LONG, ""
                if record.status == OVER_BUDGET:
                    return OVER_BUDGET, "as a shorter one was"
        return MEASURED, ""

    def _warm(self, subject: Subject, meter: Instruments) -> None:
        """Read a short prompt twice, once for each subject: the first is cold, the second timed."""
        if subject.name in self.rates:
            return
        self.rates[subject.name] = 0.0

        def read_twice() -> float:
            decoder = self.loaded.get(subject)
            ids = decoder.prompt(self.plan.batch, WARM_COLUMNS, self.rng)

            for _ in range(2):
                decoder.start(self.plan.batch, WARM_COLUMNS)
                seconds = meter.seconds(lambda: decoder.read(ids))
            decoder.stop()
            return seconds / WARM_COLUMNS

        try:
            self.rates[subject.name] = or_out_of_memory(read_twice)
        except OutOfMemory:
            # Then the prompts that are asked for will not fit either, and that is said there.
            self._clean(subject)

    def _predicted(self, subject: Subject, task: Task, context: int) -> float:
        """Seconds that a turn will take, by what shorter or earlier ones took."""
        own = self.records[task, context, subject.name]
        if own.rounds:
            return own.cost
        before = [
            (other, record.cost)
            for (other_task, other, name), record in self.records.items()
            if (other_task, name) == (task, subject.name) and record.rounds and other < context
        ]
        if before:
            shorter, cost = max(before)
            growth = 2 if task == PREFILL and subject.about.attention_layers else 1
            ahead = cost * (context / shorter) ** growth
        else:
            cost = math.inf
            ahead = self.rates.get(subject.name, 0.0) * context if task == PREFILL else 0.0
        return min(ahead, self._allowance(subject, task, context, cost))

    def _allowance(self, subject: Subject, task: Task, context: int, launches: float) -> float:
        """Seconds of a first turn by its floor: a short one's are launches, which do not grow."""
        decoder, plan = self.loaded.decoders.get(subject.name), self.plan
        if decoder is None or self.ceilings is None:
            return math.inf
        floor = floor_of(decoder.cost(plan.batch, context, task == PREFILL), self.ceilings)
        if task == PREFILL:
            reads = READS_IF_SHORT if floor <= SHORT else 1
            return (reads + (WARM_READS if plan.warm_prefill else 0)) * FLOORS * floor
        tokens = plan.warm_up + plan.repeats_a_turn * plan.burst
        return launches + tokens * FLOORS * floor

    def _measure_or_alone(
        self, subject: Subject, task: Task, context: int, round_: int, record: _Record
    ) -> None:
        """Measure; where memory does not suffice, once more without the other models."""
        try:
            self._measure(subject, task, context, round_, record)
            return
        except OutOfMemory as error:
            first, hopeless = str(error), error.hopeless
        self._clean(subject)
        if hopeless or not self.loaded.keep_only(subject):
            raise OutOfMemory(first)
        self._clean(subject)
        try:
            self._measure(subject, task, context, round_, record)
        except OutOfMemory as error:
            first = str(error)
        else:
            self.loaded.crowded = record.alone = True
            return
        self._clean(subject)
        raise OutOfMemory(first)

    def _clean(self, subject: Subject) -> None:
        decoder = self.loaded.decoders.get(subject.name)
        if decoder is not None:
            decoder.stop()
        if self._instruments is not None:
            self._instruments.clean()

    def _measure(
        self, subject: Subject, task: Task, context: int, round_: int, record: _Record
    ) -> None:
        decoder, plan = self.loaded.get(subject), self.plan
        meter = self.instruments(subject)

        def work() -> Turn:
            if task == PREFILL:
                return prefill_turn(
                    decoder,
                    meter,
                    batch=plan.batch,
                    context=context,
                    chunk=plan.prefill_chunk,
                    # In every round: with its cache, a decoder lets go of what it captured.
                    warm=plan.warm_prefill,
                    rng=self.rng,
                )
            return decode_turn(
                decoder,
                meter,
                batch=plan.batch,
                context=context,
                warm_up=plan.warm_up,
                repeats=plan.repeats_a_turn,
                burst=plan.burst,
                rng=self.rng,
            )

        seconds, memory = or_out_of_memory(work)
        record.rounds.append(seconds)
        record.need = decoder.cost(plan.batch, context, task == PREFILL)
        if record.memory is None or memory.total > record.memory.total:
            record.memory = memory

    def _measurement(self, task: Task, context: int, name: str) -> Measurement:
        record = self.records[task, context, name]
        median, quartiles = summarised(record.rounds) if record.rounds else (None, None)
        floor = None
        if record.need is not None and self.ceilings is not None:
            floor = floor_of(record.need, self.ceilings)
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
