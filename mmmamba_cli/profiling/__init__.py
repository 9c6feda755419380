"""Profiling: time and memory of decoding and prefill over the context length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.devices import OutOfMemory
from mmmamba_cli.lazy_imports import lazy_attributes
from mmmamba_cli.profiling.result import Measurement, Profile, read_profile

if TYPE_CHECKING:
    from mmmamba_cli.profiling.benchmark import Plan, ProfileProgress, measure
    from mmmamba_cli.profiling.correctness import WrongDecoder
    from mmmamba_cli.profiling.interfaces import Decoder, Subject, SubjectInfo
    from mmmamba_cli.profiling.profiler import (
        check_replaceable,
        default_plan,
        profile,
        select_subjects,
        write_profile,
    )
    from mmmamba_cli.profiling.random_models import random_subjects
    from mmmamba_cli.profiling.shared_weights import weight_store
    from mmmamba_cli.profiling.subjects import (
        int8_subjects,
        path_subjects,
        run_subjects,
    )

__all__ = [
    "Decoder",
    "Measurement",
    "OutOfMemory",
    "Plan",
    "Profile",
    "ProfileProgress",
    "Subject",
    "SubjectInfo",
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
    "select_subjects",
    "weight_store",
    "write_profile",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "interfaces": (
            "Decoder",
            "Subject",
            "SubjectInfo",
        ),
        "correctness": ("WrongDecoder",),
        "benchmark": (
            "Plan",
            "ProfileProgress",
            "measure",
        ),
        "random_models": ("random_subjects",),
        "subjects": (
            "int8_subjects",
            "path_subjects",
            "run_subjects",
        ),
        "shared_weights": ("weight_store",),
        "profiler": (
            "check_replaceable",
            "default_plan",
            "profile",
            "select_subjects",
            "write_profile",
        ),
    },
)
