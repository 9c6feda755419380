"""The result of `distill --dry-run`: what each stage needs and does; `--json` prints it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from mmmamba_cli.distill.first_batch import FirstBatch
from mmmamba_cli.distill.stage_disk import StageDisk, peak_disk
from mmmamba_cli.distill.stage_memory import HOW_COMPUTED, StageMemory
from mmmamba_cli.distill.stage_rates import Rate
from mmmamba_cli.recipe import Stage
from mmmamba_cli.runs import Manifest


@dataclass(frozen=True)
class Learning:
    """A trainable parameter by its name in a layer: how many tensors, and their elements."""

    name: str
    tensors: int
    elements: int


@dataclass(frozen=True)
class StageForecast:
    """What a stage needs.

    Attributes:
        attention_layers: layers with the teacher's attention.
        learns: trainable parameters by their name in a layer; adapters last.
        memory: at the size of the first batch.
        memory_at_most: with every row at `max_length`.
        tokens: of the whole stage, if its samples are like those of the first batch.
        rate: None where nothing has been measured.
    """

    stage: Stage
    attention_layers: tuple[int, ...]
    learns: tuple[Learning, ...]
    batch: FirstBatch
    max_length: int
    memory: StageMemory
    memory_at_most: StageMemory
    disk: StageDisk
    tokens: int
    rate: Rate | None

    @property
    def seconds(self) -> float | None:
        """Of all steps, without evaluations and saves; None where the rate is unknown."""
        return None if self.rate is None else self.tokens / self.rate.tokens_per_second

    def as_dict(self) -> dict[str, Any]:
        """The forecast as JSON."""
        rows = [
            {
                "tokens": row.num_tokens,
                "answer_tokens": row.num_answer_tokens,
                "runs": [{"text": run.text, "is_answer": run.is_answer} for run in row.runs],
            }
            for row in self.batch.rows
        ]
        return {
            "stage": self.stage.name,
            "steps": self.stage.steps,
            "attention_layers": list(self.attention_layers),
            "learns": [asdict(one) for one in self.learns],
            "parameters": sum(one.elements for one in self.learns),
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "memory_at_max_length": {
                **asdict(self.memory_at_most),
                "total": self.memory_at_most.total,
                "max_length": self.max_length,
            },
            "disk": asdict(self.disk),
            "tokens": self.tokens,
            "rate": None if self.rate is None else asdict(self.rate),
            "seconds": self.seconds,
            "first_batch": {**asdict(self.batch), "rows": rows, "bad": list(self.batch.bad)},
        }


@dataclass(frozen=True)
class DryRun:
    """What `distill` would do: the stages in order, and the memory and disk that are free.

    Attributes:
        start: the product that the first stage begins with.
        free_memory, free_disk: bytes, None if unknown.
        hybrid_bytes: of a product with attention restored between two stages, 0 without one.
        notes: settings of the data that do not apply, and what a number leaves out.
    """

    start: Manifest
    device: str
    processes: int
    stages: tuple[StageForecast, ...]
    free_memory: int | None
    free_disk: int | None
    hybrid_bytes: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def peak_memory(self) -> int:
        return max(stage.memory.total for stage in self.stages)

    @property
    def peak_memory_at_most(self) -> int:
        return max(stage.memory_at_most.total for stage in self.stages)

    @property
    def disk(self) -> int:
        """Peak of the bytes that are added: products so far, and the states of a stage."""
        return peak_disk([stage.disk for stage in self.stages]) + self.hybrid_bytes

    @property
    def seconds(self) -> float | None:
        """Of all stages; None if one of them is unknown."""
        known = [stage.seconds for stage in self.stages]
        return None if None in known else sum(one for one in known if one is not None)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON; bytes and seconds are numbers, unknown ones null."""
        return {
            "start": self.start.name,
            "device": self.device,
            "processes": self.processes,
            "memory": self.peak_memory,
            "memory_at_max_length": self.peak_memory_at_most,
            "free_memory": self.free_memory,
            "fits_memory": _fits(self.peak_memory, self.free_memory),
            "disk": self.disk,
            "free_disk": self.free_disk,
            "fits_disk": _fits(self.disk, self.free_disk),
            "seconds": self.seconds,
            "notes": list(self.notes),
            "how_computed": list(HOW_COMPUTED),
            "stages": [stage.as_dict() for stage in self.stages],
        }


def _fits(needed: int, free: int | None) -> bool | None:
    return None if free is None else needed <= free
