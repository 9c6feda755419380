"""Result types of a verification; `mmmamba verify --json` prints their fields. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "different", "skipped"]
OK: Status = "ok"
DIFFERENT: Status = "different"
SKIPPED: Status = "skipped"


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    `detail` says what was compared and how closely it agrees, what differs and where, or why the
    check was skipped.
    """

    name: str
    status: Status
    detail: str

    @property
    def sentence(self) -> str:
        return f"{self.name}: {self.detail}"


@dataclass(frozen=True)
class VerificationReport:
    """The result of a verification.

    Attributes:
        teacher: the teacher as it was named.
        path: its folder or file.
        model_type: of its config.
        device, dtype: what the models ran on and in.
        compared_with: the class of another implementation and its version; None if there is none,
            so that the model was compared with itself only.
        checks: in the order in which they ran.
        warnings: sentences about what a student of this teacher cannot follow.
    """

    teacher: str
    path: str
    model_type: str
    device: str
    dtype: str
    compared_with: str | None
    checks: tuple[CheckResult, ...]
    warnings: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether no check found a difference; skipped checks are none."""
        return not any(True for _ in self.with_status(DIFFERENT))

    def with_status(self, status: Status) -> Iterator[CheckResult]:
        """The checks with that result."""
        return (check for check in self.checks if check.status == status)
