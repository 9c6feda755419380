"""Result types of a diagnosis; `mmmamba doctor --json` prints their fields."""

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
    """The result of one check: `failed` for a required feature, `warning` for an optional one."""

    name: str
    status: Status
    said: str
    hint: str = ""

    @property
    def sentence(self) -> str:
        return f"{self.name}: {self.said}" + (f" ({self.hint})" if self.hint else "")


@dataclass(frozen=True)
class OpCheck:
    """The result of one backend of an op in one dtype, compared with the reference in fp64.

    `forward` and `backward` are the largest relative errors |a - b| / |b| by 2-norms over the
    outputs and the gradients of all cases; None if there are none.
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
class PackageInfo:
    """A library: its version or None, the required version, and the extra it belongs to."""

    name: str
    version: str | None
    needs: str = ""
    extra: str | None = None


@dataclass(frozen=True)
class DeviceInfo:
    """A device: total and free memory in bytes and hardware bf16, each None if unknown."""

    name: str
    description: str
    memory: int | None = None
    free: int | None = None
    # CUDA compute capability; Hopper is (9, 0).
    capability: tuple[int, int] | None = None
    bf16: bool | None = None


@dataclass(frozen=True)
class DoctorReport:
    """The result of a diagnosis; `device` is the one that the ops were checked on."""

    packages: tuple[PackageInfo, ...]
    devices: tuple[DeviceInfo, ...]
    device: str
    checks: tuple[Check, ...]
    ops: tuple[OpCheck, ...]

    @property
    def failures(self) -> Iterator[str]:
        """A sentence for each failed check."""
        yield from self._sentences(FAILED)

    @property
    def warnings(self) -> Iterator[str]:
        """A sentence for each check that is a warning."""
        yield from self._sentences(WARNING)

    def _sentences(self, status: Status) -> Iterator[str]:
        checks: list[Check | OpCheck] = [*self.checks, *self.ops]
        return (check.sentence for check in checks if check.status == status)
