"""Before anything is timed: a decoder computes what a forward without a cache computes.

A fast wrong decoder is no result. A prompt is read as a prefill, a few more tokens one by one; it
is short, and where the device is fast, one more is as long as what will be measured.

The gate for all subjects of a profile; on a GPU, each has the memory to itself meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.profiling.benchmark import Loaded, Plan, Watch
from mmmamba_cli.profiling.gpu_metrics import memory_apart
from mmmamba_cli.profiling.interfaces import EAGER, Decoder, OutOfMemory, Subject
from mmmamba_cli.profiling.result import GatePart, Memory
from mmmamba_cli.profiling.timers import Instruments, instruments_of, or_out_of_memory

PREFILL, STEPS = 24, 4
BATCH = 2
# Relative distances |a - b| / |b| of logits that rounding explains, by dtype. What 16 bits lose
# depends on the model, random weights losing most: there the reference's own distance from fp32 is
# measured, and as two of that kind may lie so far apart each, twice that is allowed, if it is more.
# A small fault could hide behind it, so such a decoder is also held against the reference in fp32.
# Sums of thousands of terms in another order are off there by about a thousandth of what bf16
# rounds, and a model makes as much more of the one as of the other.
FP32_SHARE = 2.0**-10
HALVES = (torch.float16, torch.bfloat16)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
AS_MEASURED, IN_FP32 = "as measured", "in fp32"


class WrongDecoder(Exception):
    """A decoder whose logits are not the model's: a bug of ours, never the user's.

    `way` and `distance` say which, and how far off; `tolerance`, what was allowed.
    """

    def __init__(self, message: str, way: str, distance: float, tolerance: float):
        super().__init__(message)
        self.way = way
        self.distance = distance
        self.tolerance = tolerance


@dataclass(frozen=True)
class Checked:
    """How far each way of decoding was from the reference, and what was allowed."""

    tolerance: float
    distances: Mapping[str, float]


def check_decoder(
    name: str, decoder: Decoder, seed: int = 0, columns: Sequence[int] = ()
) -> Checked:
    """Hold all ways of decoding with these weights, its own too, against no cache at all.

    `columns` are lengths of further prompts, of one row each, for the decoder's own way only.
    Raises `CheckpointError` if the model itself gives no finite logits, `WrongDecoder` if a way is
    farther off than rounding explains.
    """
    distances: dict[str, float] = {}
    short = _reference(name, decoder, (BATCH, PREFILL), seed)
    tolerance = TOLERANCES[short.logits.dtype]
    if short.logits.dtype in HALVES:
        tolerance = max(tolerance, 2 * _check_in_fp32(name, decoder, short, distances))
    _compare(name, _all_ways(decoder), short, tolerance, distances)
    del short
    for length in columns:
        found = _reference(name, decoder, (1, length), seed)
        _compare(name, {at_length(length): decoder}, found, tolerance, distances)
    return Checked(tolerance, distances)


def at_length(columns: int) -> str:
    """As `check_decoder` calls a prompt of so many columns."""
    return f"{AS_MEASURED}, after {columns:,} tokens"


def relative_distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, in fp64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


@dataclass(frozen=True)
class _Reference:
    """ids (B, T + STEPS), and the logits (B, STEPS + 1, V) behind the last columns, at once."""

    ids: Tensor
    logits: Tensor


def _reference(name: str, decoder: Decoder, shape: tuple[int, int], seed: int) -> _Reference:
    batch, length = shape
    ids = decoder.prompt(batch, length + STEPS, torch.Generator().manual_seed(seed))
    logits = decoder.without_cache(ids, STEPS + 1)
    if not bool(logits.isfinite().all()):
        raise CheckpointError(
            f"{name} gives logits that are not finite numbers", "check its weights, or its --dtype"
        )
    return _Reference(ids, logits)


def _check_in_fp32(
    name: str, decoder: Decoder, found: _Reference, distances: dict[str, float]
) -> float:
    """Check the same decoder in fp32; how far the 16-bit reference is from that one's.

    0 where there is no memory for it.
    """
    try:
        return or_out_of_memory(lambda: _distance_in_fp32(name, decoder, found, distances))
    except OutOfMemory:
        return 0.0


def _distance_in_fp32(
    name: str, decoder: Decoder, found: _Reference, distances: dict[str, float]
) -> float:
    wide = decoder.in_fp32()
    exact = _Reference(found.ids, wide.without_cache(found.ids, STEPS + 1))
    rounded = relative_distance(found.logits, exact.logits)
    tolerance = max(TOLERANCES[exact.logits.dtype], 2 * FP32_SHARE * rounded)
    ways = {f"{way}, {IN_FP32}": other for way, other in _all_ways(wide).items()}
    _compare(name, ways, exact, tolerance, distances)
    return rounded


def _all_ways(decoder: Decoder) -> dict[str, Decoder]:
    return {AS_MEASURED: decoder, **decoder.ways()}


def _compare(
    name: str,
    ways: Mapping[str, Decoder],
    reference: _Reference,
    tolerance: float,
    distances: dict[str, float],
) -> None:
    """Add the distance of each way."""
    for way, other in ways.items():
        length = reference.ids.shape[1] - STEPS
        distance = relative_distance(_decoded(other, reference.ids, length), reference.logits)
        # Not "greater": a NaN is wrong too.
        if not distance <= tolerance:
            raise WrongDecoder(
                f"{name}, {way}: logits are {distance:.2g} from those without a cache, allowed is "
                f"{tolerance:.2g}",
                way,
                distance,
                tolerance,
            )
        distances[way] = distance


def _decoded(decoder: Decoder, ids: Tensor, length: int) -> Tensor:
    """Logits (B, STEPS + 1, V) after the prefill of `length` columns and each further token."""
    decoder.start(ids.shape[0], ids.shape[1])
    # Cloned: the next step may write into the same tensor.
    found = [decoder.read(ids[:, :length]).clone()]
    for column in range(length, ids.shape[1]):
        found.append(decoder.step(ids[:, column : column + 1]).clone())
    decoder.stop()
    return torch.stack(found, dim=1)


# What becomes of a decoder that is wrong; measured all the same, for finding out why.
OnWrong = Literal["raise", "leave out", "measure"]
RAISE: OnWrong = "raise"
LEAVE_OUT: OnWrong = "leave out"


@dataclass
class Gate:
    """What came of checking: how far off each was, and who may be measured.

    `memory` is of decoding, by name and context, where it was read with nothing else in memory.
    """

    allowed: dict[str, float] = field(default_factory=dict)
    distances: dict[str, dict[str, float]] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    memory: dict[tuple[str, int], Memory] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def part(self, columns: Sequence[int]) -> GatePart:
        longer = f", and of {', '.join(f'{n:,}' for n in columns)}" if columns else ""
        what = (
            f"logits of a prompt of {PREFILL} tokens{longer}, and {STEPS} more, one by one, by "
            "each decoder, against a forward pass without a cache, 16-bit ones in fp32 too: "
            "relative distance"
        )
        return GatePart(
            green=not (self.unchecked or self.wrong),
            tolerance=max(self.allowed.values(), default=0.0),
            allowed=self.allowed,
            distances=self.distances,
            unchecked=tuple(self.unchecked),
            wrong=self.wrong,
            what=what,
        )


def check_all(
    subjects: Sequence[Subject],
    plan: Plan,
    loaded: Loaded,
    instruments: Instruments | None,
    watch: Watch,
    on_wrong: OnWrong,
) -> Gate:
    """Check every subject that can be loaded; of the others, `measure` tells the memory.

    Raises `DataError` if none fits; `WrongDecoder` unless wrong ones are left out or measured all
    the same, and if none is left.
    """
    gate = Gate()
    refused = ""
    for subject in subjects:
        watch.say(f"loading and checking {subject.name}")
        failed: WrongDecoder | None = None
        try:
            checked = _check(subject, plan, loaded, gate)
        except OutOfMemory as error:
            gate.unchecked.append(subject.name)
            refused = str(error)
            continue
        except WrongDecoder as error:
            if on_wrong == RAISE:
                raise
            # Its frames hold a copy of the model, which is not to be measured with it.
            failed = error.with_traceback(None)
        if failed is None:
            gate.distances[subject.name] = dict(checked.distances)
            gate.allowed[subject.name] = checked.tolerance
        else:
            gate.wrong[subject.name] = str(failed)
            gate.distances[subject.name] = {failed.way: failed.distance}
            gate.allowed[subject.name] = failed.tolerance
        if failed is not None and on_wrong == LEAVE_OUT:
            gate.left_out.add(subject.name)
            loaded.decoders.pop(subject.name, None)
        else:
            _note_memory(subject, plan, loaded, instruments, gate)
    if len(gate.unchecked) == len(subjects):
        raise DataError(f"no model fits the device's memory: {refused}", "try --dtype bf16")
    if gate.left_out and len(gate.unchecked) + len(gate.left_out) == len(subjects):
        name, told = next(iter(gate.wrong.items()))
        way, distance = next(iter(gate.distances[name].items()))
        raise WrongDecoder(told, way, distance, gate.allowed[name])
    return gate


def _check(subject: Subject, plan: Plan, loaded: Loaded, gate: Gate) -> Checked:
    """The gate for one subject, without the others in memory if it does not fit beside them."""

    def check() -> Checked:
        decoder = loaded.get(subject)
        gate.device, gate.dtype = decoder.device, decoder.dtype
        columns = () if subject.about.way == EAGER else plan.gate_at
        return check_decoder(subject.name, decoder, plan.seed, columns)

    try:
        return or_out_of_memory(check)
    except OutOfMemory as error:
        refused = str(error)
    if not loaded.keep_only(subject):
        raise OutOfMemory(refused)
    return or_out_of_memory(check)


def _note_memory(
    subject: Subject, plan: Plan, loaded: Loaded, instruments: Instruments | None, gate: Gate
) -> None:
    if not plan.gauges:
        return
    meter = instruments or instruments_of(gate.device)
    for context, memory in memory_apart(subject, plan, loaded, meter).items():
        gate.memory[subject.name, context] = memory
