"""Verification of a teacher before anything is made from it; `mmmamba verify` prints its report.

Importing this package imports neither torch nor transformers.
"""

from typing import TYPE_CHECKING

from mmmamba_cli.lazy_imports import lazy_attributes
from mmmamba_cli.verification.report import (
    DIFFERENT,
    OK,
    SKIPPED,
    CheckResult,
    VerificationReport,
)

if TYPE_CHECKING:
    from mmmamba_cli.verification.verifier import DEFAULT_NEW_TOKENS, verify_teacher
else:
    __getattr__ = lazy_attributes(__name__, {"verifier": ("DEFAULT_NEW_TOKENS", "verify_teacher")})

__all__ = [
    "DEFAULT_NEW_TOKENS",
    "DIFFERENT",
    "OK",
    "SKIPPED",
    "CheckResult",
    "VerificationReport",
    "verify_teacher",
]
