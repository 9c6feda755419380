"""Profiling: what a token costs, in time and memory, against the teacher and its context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.deferred import deferred_names
from mmmamba_cli.profiling.result import Measurement, Profile, read_profile

if TYPE_CHECKING:
    from mmmamba_cli.profiling.contract import About, Decoder, OutOfMemory, Subject
    from mmmamba_cli.profiling.gate import WrongDecoder
    from mmmamba_cli.profiling.measuring import Plan, Watch, measure
    from mmmamba_cli.profiling.opening import (
        int8_subjects,
        path_subjects,
        random_subjects,
        run_subjects,
        weight_store,
    )
    from mmmamba_cli.profiling.profiling import (
        check_replaceable,
        default_plan,
        profile,
        write_profile,
    )

__all__ = [
    "About",
    "Decoder",
    "Measurement",
    "OutOfMemory",
    "Plan",
    "Profile",
    "Subject",
    "Watch",
    "WrongDecoder",
    "check_replaceable",
    "default_plan",
    "int8_subjects",
    "measure",
    "path_subjects",
    "profile",
    "random_subjects",
    "read_profile",
    "run_subjects",
    "weight_store",
    "write_profile",
]

__getattr__ = deferred_names(
    __name__,
    {
        "contract": (
            "About",
            "Decoder",
            "OutOfMemory",
            "Subject",
        ),
        "gate": ("WrongDecoder",),
        "measuring": (
            "Plan",
            "Watch",
            "measure",
        ),
        "opening": (
            "int8_subjects",
            "path_subjects",
            "random_subjects",
            "run_subjects",
            "weight_store",
        ),
        "profiling": (
            "check_replaceable",
            "default_plan",
            "profile",
            "write_profile",
        ),
    },
)
