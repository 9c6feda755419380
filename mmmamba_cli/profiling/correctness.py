"""Correctness check before any timing: every decoder must match a forward pass without a cache.

A prompt is prefilled and a few more tokens are decoded one by one. The prompt is short; on a fast
device one more is as long as the contexts to be measured. On a GPU the subjects are checked one
after the other, each with the memory to itself where its peak memory is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mmmamba_cli.devices import OutOfMemory, translate_out_of_memory
from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.profiling.benchmark import LoadedDecoders, Plan, ProfileProgress
from mmmamba_cli.profiling.gpu_metrics import isolated_memory
from mmmamba_cli.profiling.interfaces import GENERATOR, Decoder, Subject
from mmmamba_cli.profiling.result import CorrectnessPart, Memory
from mmmamba_cli.profiling.timers import DeviceTimer, device_timer

PROMPT_COLUMNS, DECODE_STEPS = 24, 4
BATCH = 2
# Tolerances by dtype, as relative distances |a - b| / |b| of logits.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# The rounding error in 16 bits depends on the model and is largest for random weights. It is
# measured as the distance of the 16-bit reference from fp32; twice that is allowed if it exceeds
# the tolerance. This could hide a small fault, so a 16-bit decoder is checked in fp32 too.
HALF_DTYPES = (torch.float16, torch.bfloat16)
# Sums of thousands of terms in another order differ in fp32 by about 2^-10 of the bf16 rounding
# error, and a model amplifies both alike.
FP32_TO_HALF_ERROR = 2.0**-10
AS_MEASURED, IN_FP32 = "as measured", "in fp32"

# What to do with a wrong decoder; "measure" is for finding the fault.
OnWrong = Literal["raise", "leave out", "measure"]
RAISE: OnWrong = "raise"
LEAVE_OUT: OnWrong = "leave out"


class WrongDecoder(Exception):
    """The logits of a decoder differ from the model's: a bug in mmmamba, not a user error.

    `way` names the decoder, `distance` is its relative distance and `tolerance` the allowed one.
    """

    def __init__(self, message: str, way: str, distance: float, tolerance: float):
        super().__init__(message)
        self.way = way
        self.distance = distance
        self.tolerance = tolerance


@dataclass
class CorrectnessCheck:
    """Result of checking all subjects: distances and tolerances, and which ones to measure.

    `memory` is that of decoding by (name, context), read with no other model in memory.
    """

    allowed: dict[str, float] = field(default_factory=dict)
    distances: dict[str, dict[str, float]] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    memory: dict[tuple[str, int], Memory] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def part(self, lengths: Sequence[int]) -> CorrectnessPart:
        """The part of a profile; `lengths` are the longer prompts that were read too."""
        longer = f", and of {', '.join(f'{n:,}' for n in lengths)}" if lengths else ""
        what = (
            f"logits of a prompt of {PROMPT_COLUMNS} tokens{longer}, and {DECODE_STEPS} more, one "
            "by one, by each decoder, against a forward pass without a cache, 16-bit ones in fp32 "
            "too: relative distance"
        )
        return CorrectnessPart(
            green=not (self.unchecked or self.wrong),
            tolerance=max(self.allowed.values(), default=0.0),
            allowed=self.allowed,
            distances=self.distances,
            unchecked=tuple(self.unchecked),
            wrong=self.wrong,
            what=what,
        )


def check_subjects(
    subjects: Sequence[Subject],
    plan: Plan,
    loaded: LoadedDecoders,
    timer: DeviceTimer | None,
    progress: ProfileProgress,
    on_wrong: OnWrong,
) -> CorrectnessCheck:
    """Check every subject that can be loaded, and measure its memory while it is alone.

    Raises:
        DataError: if no subject fits into memory.
        WrongDecoder: if a decoder is wrong and `on_wrong` is "raise", or if none is left.
    """
    found = CorrectnessCheck()
    refused = ""
    for subject in subjects:
        progress.log(f"loading and checking {subject.name}")
        failed: WrongDecoder | None = None
        try:
            checked = _check_subject(subject, plan, loaded, found)
        except OutOfMemory as error:
            found.unchecked.append(subject.name)
            refused = str(error)
            continue
        except WrongDecoder as error:
            if on_wrong == RAISE:
                raise
            # Its frames hold an fp32 copy of the model, which must not count as its memory.
            failed = error.with_traceback(None)
        if failed is None:
            found.distances[subject.name] = dict(checked.distances)
            found.allowed[subject.name] = checked.tolerance
        else:
            found.wrong[subject.name] = str(failed)
            found.distances[subject.name] = {failed.way: failed.distance}
            found.allowed[subject.name] = failed.tolerance
        if failed is not None and on_wrong == LEAVE_OUT:
            found.left_out.add(subject.name)
            loaded.decoders.pop(subject.name, None)
        elif plan.gpu_metrics:
            own_timer = timer or device_timer(found.device)
            for context, memory in isolated_memory(subject, plan, loaded, own_timer).items():
                found.memory[subject.name, context] = memory
    if len(found.unchecked) == len(subjects):
        raise DataError(f"no model fits the device's memory: {refused}", "try --dtype bf16")
    if found.left_out and len(found.unchecked) + len(found.left_out) == len(subjects):
        name, message = next(iter(found.wrong.items()))
        way, distance = next(iter(found.distances[name].items()))
        raise WrongDecoder(message, way, distance, found.allowed[name])
    return found


def _check_subject(
    subject: Subject, plan: Plan, loaded: LoadedDecoders, found: CorrectnessCheck
) -> CheckResult:
    """Check one subject, without the others in memory if it does not fit beside them."""

    def check() -> CheckResult:
        decoder = loaded.get(subject)
        found.device, found.dtype = decoder.device, decoder.dtype
        lengths = plan.check_lengths if subject.info.way == GENERATOR else ()
        return check_decoder(subject.name, decoder, plan.seed, lengths)

    try:
        return translate_out_of_memory(check)
    except OutOfMemory as error:
        refused = str(error)
    if not loaded.keep_only(subject):
        raise OutOfMemory(refused)
    return translate_out_of_memory(check)


@dataclass(frozen=True)
class CheckResult:
    """Distance of each decoder of one subject from the reference, and the tolerance."""

    tolerance: float
    distances: Mapping[str, float]


def check_decoder(
    name: str, decoder: Decoder, seed: int = 0, lengths: Sequence[int] = ()
) -> CheckResult:
    """Compare a decoder and its variants with a forward pass without a cache.

    `lengths` are lengths of further prompts of batch size 1, read by `decoder` only.

    Raises:
        CheckpointError: if the model itself gives logits that are not finite.
        WrongDecoder: if a distance exceeds the tolerance.
    """
    distances: dict[str, float] = {}
    short = _reference(name, decoder, (BATCH, PROMPT_COLUMNS), seed)
    tolerance = TOLERANCES[short.logits.dtype]
    if short.logits.dtype in HALF_DTYPES:
        tolerance = max(tolerance, 2 * _check_in_fp32(name, decoder, short, distances))
    _compare(name, _all_variants(decoder), short, tolerance, distances)
    del short
    for length in lengths:
        reference = _reference(name, decoder, (1, length), seed)
        way = f"{AS_MEASURED}, after {length:,} tokens"
        _compare(name, {way: decoder}, reference, tolerance, distances)
    return CheckResult(tolerance, distances)


def relative_distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, in fp64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


@dataclass(frozen=True)
class _Reference:
    """ids (B, T + STEPS), and the logits (B, STEPS + 1, V) of the last columns, at once."""

    ids: Tensor
    logits: Tensor


def _reference(name: str, decoder: Decoder, shape: tuple[int, int], seed: int) -> _Reference:
    batch, length = shape
    rng = torch.Generator().manual_seed(seed)
    ids = decoder.random_prompt(batch, length + DECODE_STEPS, rng)
    logits = decoder.forward_without_cache(ids, DECODE_STEPS + 1)
    if not bool(logits.isfinite().all()):
        raise CheckpointError(
            f"{name} gives logits that are not finite numbers", "check its weights, or its --dtype"
        )
    return _Reference(ids, logits)


def _check_in_fp32(
    name: str, decoder: Decoder, half: _Reference, distances: dict[str, float]
) -> float:
    """Check the decoder in fp32; return the distance of the 16-bit reference from fp32.

    Returns 0 if there is not enough memory.
    """
    try:
        return translate_out_of_memory(lambda: _distance_in_fp32(name, decoder, half, distances))
    except OutOfMemory:
        return 0.0


def _distance_in_fp32(
    name: str, decoder: Decoder, half: _Reference, distances: dict[str, float]
) -> float:
    wide = decoder.in_fp32()
    exact = _Reference(half.ids, wide.forward_without_cache(half.ids, DECODE_STEPS + 1))
    rounding = relative_distance(half.logits, exact.logits)
    tolerance = max(TOLERANCES[exact.logits.dtype], 2 * FP32_TO_HALF_ERROR * rounding)
    ways = {f"{way}, {IN_FP32}": other for way, other in _all_variants(wide).items()}
    _compare(name, ways, exact, tolerance, distances)
    return rounding


def _all_variants(decoder: Decoder) -> dict[str, Decoder]:
    return {AS_MEASURED: decoder, **decoder.variants()}


def _compare(
    name: str,
    ways: Mapping[str, Decoder],
    reference: _Reference,
    tolerance: float,
    distances: dict[str, float],
) -> None:
    """Add the distance of each decoder in `ways` to `distances`."""
    for way, decoder in ways.items():
        length = reference.ids.shape[1] - DECODE_STEPS
        logits = _decode_logits(decoder, reference.ids, length)
        distance = relative_distance(logits, reference.logits)
        # "not <=" instead of ">": NaN is wrong too.
        if not distance <= tolerance:
            raise WrongDecoder(
                f"{name}, {way}: logits are {distance:.2g} from those without a cache, allowed is "
                f"{tolerance:.2g}",
                way,
                distance,
                tolerance,
            )
        distances[way] = distance


def _decode_logits(decoder: Decoder, ids: Tensor, length: int) -> Tensor:
    """Logits (B, STEPS + 1, V) after the prefill of `length` columns and each further token."""
    decoder.start(ids.shape[0], ids.shape[1])
    # Cloned, because the next step may overwrite the tensor.
    logits = [decoder.prefill(ids[:, :length]).clone()]
    for column in range(length, ids.shape[1]):
        logits.append(decoder.step(ids[:, column : column + 1]).clone())
    decoder.release()
    return torch.stack(logits, dim=1)
