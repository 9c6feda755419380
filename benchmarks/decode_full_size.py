"""Decoding, memory, throughput and prefill at HoVLE-2.6B size on one GPU, against their marks.

    python benchmarks/decode_full_size.py --out FILE.json [--seconds 240] [--folder DIR]
                                          [--mixer NAME,...]

Profiles the teacher as shipped, the teacher tuned, linear, hybrid-4, hybrid-8 and linear int8 with
random weights, in one run and in turns, after the correctness check, which also reads a prompt of
`--at` tokens. A decoder that fails the check is measured, to help find the fault, but reaches no
mark. Prints each mark with the measured value and whether it was reached; the JSON holds the marks
and the whole profile. `--mixer` adds linear students with other mixers, whose time is compared with
that of `linear`. `--folder` is the output folder of profile.json and its plots. A smaller run on a
CPU: `--random hovle-8m --contexts 64,128,512 --at 256 --short 64`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

BEGAN = time.monotonic()

from mmmamba_cli.checkpoint import atomic_write_text  # noqa: E402
from mmmamba_cli.profiling import (  # noqa: E402
    Plan,
    Profile,
    ProfileProgress,
    Subject,
    int8_subjects,
    profile,
    random_subjects,
    report,
    weight_store,
    write_profile,
)
from mmmamba_cli.profiling.interfaces import AS_SHIPPED, GENERATOR, TUNED  # noqa: E402
from mmmamba_cli.profiling.result import (  # noqa: E402
    DECODE,
    MEASURED,
    PREFILL,
    Measurement,
    SubjectPart,
    Task,
)

LINEAR, HYBRIDS, INT8 = "linear", (4, 8), "linear int8"
MS, GIB = 1e3, 2**30
# A fast decoder of another mixer may take so many times the time of `linear`.
MAX_TIMES_LINEAR = 1.05


@dataclass(frozen=True)
class Row:
    """A mark: `value` should be at most, or at least, `mark`; None if nothing was measured."""

    what: str
    value: float | None
    unit: str
    relation: str
    mark: float | None
    # Distance of the logits from the reference over the tolerance; the check passes up to 1.
    gate: float | None

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "NOT MEASURED"
        if self.gate is None or not self.gate <= 1:
            return "GATE RED" if self.gate is not None else "UNCHECKED"
        if self.mark is None:
            return ""
        good = self.value <= self.mark if self.relation == "<=" else self.value >= self.mark
        return "reached" if good else "NOT REACHED"


class Marks:
    """The marks and the values of one profile."""

    def __init__(self, found: Profile, at: int, short: int):
        self.found, self.at, self.short = found, at, short

    def rows(self) -> list[Row]:
        return [
            *self.decoding(),
            *self.mixers(),
            *self.memory(),
            *self.throughput(),
            *self.prefill(),
        ]

    def decoding(self) -> list[Row]:
        at = f"a token at {self.at:,}"
        limits = {LINEAR: 1.9, "hybrid-8": 3.2, "hybrid-4": 2.6, INT8: 1.2, TUNED: 7.5}
        rows = [
            self._row(name, f"{at}: {name}", self._ms(name), "ms", "<=", limit)
            for name, limit in limits.items()
        ]
        rows.append(
            self._row(AS_SHIPPED, f"{at}: {AS_SHIPPED}", self._ms(AS_SHIPPED), "ms", "", None)
        )
        for name, times in ((LINEAR, 20.6), ("hybrid-8", 13.5)):
            what = f"{at}: {name} faster than the {AS_SHIPPED}"
            rows.append(
                self._row(name, what, self._times(name, AS_SHIPPED), "x", ">=", times, AS_SHIPPED)
            )
        for name in (LINEAR, "hybrid-8", "hybrid-4", INT8):
            what = f"{at}: {name} faster than the {TUNED}"
            rows.append(self._row(name, what, self._times(name, TUNED), "x", "", None, TUNED))
        contexts = f"{min(self.found.plan.contexts):,} to {max(self.found.plan.contexts):,}"
        what = f"a token: linear, slowest over fastest context, {contexts}"
        rows.append(self._row(LINEAR, what, self._spread(LINEAR), "%", "<=", 5.0))
        return rows

    def mixers(self) -> list[Row]:
        """Linear students with other mixers, against `linear`."""
        rows = []
        for one in self.found.subjects:
            if not _is_other(one):
                continue
            what = f"a token at {self.at:,}: {one.name}"
            rows.append(self._row(one.name, what, self._ms(one.name), "ms", "", None))
            faster = self._times(one.name, LINEAR)
            times = None if faster is None else 1 / faster
            mark = MAX_TIMES_LINEAR if one.way == GENERATOR else None
            what = f"{what} over {LINEAR}"
            rows.append(self._row(one.name, what, times, "x", "<=" if mark else "", mark, LINEAR))
        return rows

    def memory(self) -> list[Row]:
        rows = []
        for name, mark in ((LINEAR, 70.0), (INT8, 82.0)):
            ours, theirs = self._peak(name), self._peak(AS_SHIPPED)
            less = None if ours is None or theirs is None else 100 * (1 - ours / theirs)
            what = f"memory at {self.at:,}: {name} below the {AS_SHIPPED}"
            rows.append(self._row(name, what, less, "%", ">=", mark, AS_SHIPPED))
        for one in self.found.subjects:
            what = f"memory at {self.at:,}: {one.name}"
            rows.append(self._row(one.name, what, self._peak(one.name), "GiB", "", None))
        return rows

    def throughput(self) -> list[Row]:
        rows = []
        others = [(one.name, None) for one in self.found.subjects if _is_other(one)]
        for name, mark in ((LINEAR, 20000.0), (TUNED, None), (INT8, None), *others):
            best = next((t for t in self.found.throughput if t.subject == name and t.best), None)
            batch = "" if best is None else f", batch {best.batch}"
            what = f"tokens a second at {self.at:,}: {name} at its best batch{batch}"
            value = None if best is None else best.rate
            rows.append(self._row(name, what, value, "/s", ">=" if mark else "", mark))
        return rows

    def prefill(self) -> list[Row]:
        rows = []
        for name in (one.name for one in self.found.subjects):
            for context in (self.short, self.at):
                value = self._ms(name, PREFILL, context)
                mark = 850.0 if (name, context) == (LINEAR, self.at) else None
                what = f"prefill of {context:,}: {name}"
                rows.append(self._row(name, what, value, "ms", "<=" if mark else "", mark))
        what = f"prefill of {self.short:,}: linear over the {TUNED}"
        times = self._times(LINEAR, TUNED, PREFILL, self.short)
        rows.append(self._row(LINEAR, what, times, "x", ">=", 1.0, TUNED))
        return rows

    def _row(
        self,
        name: str,
        what: str,
        value: float | None,
        unit: str,
        relation: str,
        mark: float | None,
        *others: str,
    ) -> Row:
        names, part = (name, *others), self.found.gate
        known = [
            max(part.distances[one].values()) / part.allowed[one]
            for one in names
            if one in part.distances
        ]
        gate = max(known) if len(known) == len(names) else None
        return Row(what, value, unit, relation, mark, gate)

    def _one(self, name: str, task: Task, context: int | None) -> Measurement | None:
        return self.found.find(name, task, self.at if context is None else context)

    def _ms(self, name: str, task: Task = DECODE, context: int | None = None) -> float | None:
        one = self._one(name, task, context)
        return None if one is None or one.median is None else MS * one.median

    def _times(
        self, name: str, other: str, task: Task = DECODE, context: int | None = None
    ) -> float | None:
        ours, theirs = (self._ms(one, task, context) for one in (name, other))
        return None if ours is None or theirs is None else theirs / ours

    def _peak(self, name: str) -> float | None:
        one = self._one(name, DECODE, None)
        return None if one is None or one.memory is None else one.memory.total / GIB

    def _spread(self, name: str) -> float | None:
        values = [self._ms(name, DECODE, context) for context in self.found.plan.contexts]
        known = [value for value in values if value is not None]
        # The spread is only meaningful over all contexts.
        return 100 * (max(known) / min(known) - 1) if known and len(known) == len(values) else None


def _is_other(subject: SubjectPart) -> bool:
    """Whether a subject is a linear student with a mixer of its own."""
    return subject.name in [f"{LINEAR} {mixer}" for mixer in subject.mixers]


def main(words: Sequence[str] | None = None) -> list[Row]:
    options = arguments(words)
    others = [f"{LINEAR} {name}" for name in options.mixer]
    names = (LINEAR, TUNED, INT8, *others)
    store = weight_store(options.device, options.dtype)
    plan = Plan(
        contexts=tuple(sorted({*options.contexts, options.at})),
        repeats=options.repeats,
        rounds=2,
        burst=8 if store.device.type == "cuda" else 1,
        warm_up=4,
        prefill_contexts=(options.short, options.at),
        warm_prefill=True,
        check_lengths=(options.at,),
        throughput=(options.at,),
        throughput_subjects=names,
        largest_batch=options.most,
        seed=options.seed,
    )
    subjects = random_subjects(store, options.random, (0, *HYBRIDS), seed=options.seed)
    if options.mixer:
        subjects += random_subjects(
            store, options.random, (0,), options.mixer, teacher=False, seed=options.seed
        )
    found = profile(
        subjects_of(subjects),
        plan,
        progress=ProfileProgress(log=say),
        on_wrong="measure",
        deadline=BEGAN + options.seconds,
    )
    rows = Marks(found, options.at, options.short).rows()
    show(found, rows)
    told = {
        "rows": [{**asdict(row), "verdict": row.verdict} for row in rows],
        "host": report.launch_overhead_lines(found),
        "seconds": round(time.monotonic() - BEGAN, 1),
        "profile": found.model_dump(mode="json"),
    }
    atomic_write_text(options.out, json.dumps(told, indent=1) + "\n")
    if options.folder is not None:
        write_profile(found, options.folder)
    say(f"wrote {options.out}")
    return rows


def subjects_of(subjects: Sequence[Subject]) -> list[Subject]:
    """All subjects, and the linear one with int8 weights."""
    return [*subjects, *int8_subjects([one for one in subjects if one.name == LINEAR])]


def show(found: Profile, rows: Sequence[Row], out: Callable[[str], object] = print) -> None:
    """Print all tables, then the marks."""
    for title, heading, cells in report.tables(found):
        out(f"\n{title}")
        for cells_of_row in (heading, *cells):
            out(" | ".join("-" if cell is None else str(cell) for cell in cells_of_row))
    out(f"\nCompared: {found.compared}.")
    for line in (
        report.correctness_line(found),
        *report.launch_overhead_lines(found),
        *report.remarks(found),
    ):
        out(line)
    failed = [one for one in found.throughput if one.status != MEASURED]
    for one in failed:
        out(f"throughput, {one.subject}, batch {one.batch}: {one.status} {one.note}")
    out("\nmark | measured | asked | verdict | gate, 1 is the limit")
    for row in rows:
        value = "-" if row.value is None else f"{row.value:,.2f} {row.unit}"
        asked = "" if row.mark is None else f"{row.relation} {row.mark:,g} {row.unit}"
        gate = "-" if row.gate is None else f"{row.gate:.2f}"
        out(f"{row.what} | {value} | {asked} | {row.verdict} | {gate}")


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", file=sys.stderr, flush=True)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--random", default="hovle-2.6b")
    parser.add_argument("--mixer", type=lambda text: text.split(","), default=())
    parser.add_argument("--contexts", type=numbers, default=(1024, 8192, 103424, 1048576))
    parser.add_argument("--at", type=int, default=103424)
    parser.add_argument("--short", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--most", type=int, default=1024, help="largest batch that is tried")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
