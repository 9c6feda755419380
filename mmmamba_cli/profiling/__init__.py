"""Profiling: what a token costs, in time and memory, against the teacher and its context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.lazy_imports import lazy_attributes
from mmmamba_cli.profiling.result import Measurement, Profile, read_profile

if TYPE_CHECKING:
    from mmmamba_cli.profiling.benchmark import Plan, Watch, measure
    from mmmamba_cli.profiling.correctness import WrongDecoder
    from mmmamba_cli.profiling.interfaces import About, Decoder, OutOfMemory, Subject
    from mmmamba_cli.profiling.profiler import (
        check_replaceable,
        default_plan,
        profile,
        write_profile,
    )
    from mmmamba_cli.profiling.subjects import (
        int8_subjects,
        path_subjects,
        random_subjects,
        run_subjects,
        weight_store,
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

__getattr__ = lazy_attributes(
    __name__,
    {
        "interfaces": (
            "About",
            "Decoder",
            "OutOfMemory",
            "Subject",
        ),
        "correctness": ("WrongDecoder",),
        "benchmark": (
            "Plan",
            "Watch",
            "measure",
        ),
        "subjects": (
            "int8_subjects",
            "path_subjects",
            "random_subjects",
            "run_subjects",
            "weight_store",
        ),
        "profiler": (
            "check_replaceable",
            "default_plan",
            "profile",
            "write_profile",
        ),
    },
)
