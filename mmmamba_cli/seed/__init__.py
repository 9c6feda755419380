"""Step 1 of the method: a linear student seeded from a trained teacher."""

from mmmamba_cli.seed.fidelity import (
    Calibration,
    LayerFidelity,
    built_in_calibration,
    measure_fidelity,
    read_calibration,
)
from mmmamba_cli.seed.in_place_transfer import (
    in_place_config,
    in_place_plan,
    seed_in_place,
    seed_in_place_bytes,
)
from mmmamba_cli.seed.initial_values import INITS, initial_value
from mmmamba_cli.seed.weight_transfer import seed_student, student_config

__all__ = [
    "INITS",
    "Calibration",
    "LayerFidelity",
    "built_in_calibration",
    "in_place_config",
    "in_place_plan",
    "initial_value",
    "measure_fidelity",
    "read_calibration",
    "seed_in_place",
    "seed_in_place_bytes",
    "seed_student",
    "student_config",
]
