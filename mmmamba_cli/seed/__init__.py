"""Step 1 of the method: a linear student seeded from a trained teacher."""

from mmmamba_cli.seed.fidelity import (
    Calibration,
    LayerFidelity,
    built_in_calibration,
    measure_fidelity,
    read_calibration,
)
from mmmamba_cli.seed.init import INITS, initial_value
from mmmamba_cli.seed.weight_transfer import seed_student, student_config

__all__ = [
    "INITS",
    "Calibration",
    "LayerFidelity",
    "built_in_calibration",
    "initial_value",
    "measure_fidelity",
    "read_calibration",
    "seed_student",
    "student_config",
]
