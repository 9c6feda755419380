"""The gate for all subjects of a profile; on a GPU, each has the memory to itself meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from mmmamba_cli.errors import DataError
from mmmamba_cli.profiling.contract import EAGER, OutOfMemory, Subject
from mmmamba_cli.profiling.gate import PREFILL, STEPS, Checked, WrongDecoder, check_decoder
from mmmamba_cli.profiling.gauges import memory_apart
from mmmamba_cli.profiling.instruments import Instruments, instruments_of, or_out_of_memory
from mmmamba_cli.profiling.measuring import Loaded, Plan, Watch
from mmmamba_cli.profiling.result import GatePart, Memory

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
