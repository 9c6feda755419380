"""What an examination finds: typed, and with a sentence where something is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed", "skipped"]
OK: Status = "ok"
WARNING: Status = "warning"
FAILED: Status = "failed"
SKIPPED: Status = "skipped"


@dataclass(frozen=True)
class Check:
    """One thing looked at. A failed one is needed for work; a warning is not."""

    name: str
    status: Status
    said: str
    hint: str = ""

    @property
    def sentence(self) -> str:
        return f"{self.name}: {self.said}" + (f" ({self.hint})" if self.hint else "")


@dataclass(frozen=True)
class OpCheck:
    """One backend of an op in one dtype, against the op's reference in fp64.

    `forward` and `backward` are the largest relative errors, |a - b| / |b| by 2-norms, of any
    output and any gradient in any case; None where there was none.
    """

    op: str
    backend: str
    dtype: str
    status: Status
    forward: float | None
    backward: float | None
    tolerance: float
    cases: int
    said: str = ""

    @property
    def name(self) -> str:
        return f"{self.op}, {self.backend}, {self.dtype}"

    @property
    def sentence(self) -> str:
        if self.said:
            return f"{self.name}: {self.said}"
        errors = (("forward", self.forward), ("backward", self.backward))
        wrong = (f"{what} error {error:.2g}" for what, error in errors if error is not None)
        return f"{self.name}: {', '.join(wrong)}, allowed is {self.tolerance:.2g}"


@dataclass(frozen=True)
class Package:
    """A library: its version if it is there, what is needed of it, and the extra it belongs to."""

    name: str
    version: str | None
    needs: str = ""
    extra: str | None = None


@dataclass(frozen=True)
class Device:
    """Where models can run. Bytes of memory, None where nobody tells; `bf16` in hardware."""

    name: str
    description: str
    memory: int | None = None
    free: int | None = None
    # CUDA's compute capability; Hopper is (9, 0).
    capability: tuple[int, int] | None = None
    bf16: bool | None = None


@dataclass(frozen=True)
class Report:
    """Everything an examination found. `device` is the one the ops were checked on."""

    packages: tuple[Package, ...]
    devices: tuple[Device, ...]
    device: str
    checks: tuple[Check, ...]
    ops: tuple[OpCheck, ...]

    @property
    def failures(self) -> Iterator[str]:
        """A sentence for each thing that is needed and broken."""
        found: list[Check | OpCheck] = [*self.checks, *self.ops]
        for check in found:
            if check.status == FAILED:
                yield check.sentence

    @property
    def warnings(self) -> Iterator[str]:
        """A sentence for each thing that is wrong and can be done without."""
        found: list[Check | OpCheck] = [*self.checks, *self.ops]
        for check in found:
            if check.status == WARNING:
                yield check.sentence
