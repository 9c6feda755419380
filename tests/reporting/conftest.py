"""A run with every part of a report, and a run to compare it with."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_case import (
    HOSTILE,
    PICTURES,
    answer,
    product,
    write_losses,
    write_run,
    write_small_profile,
    write_table,
)


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(run, run to compare with, folder of the table); tests do not change them."""
    folder = tmp_path_factory.mktemp("reporting")
    data = write_table(folder / "data")
    run = write_run(
        folder / "main",
        [
            product("seed", 1),
            product("stage1", 2, "seed", "stage1"),
            product("linear-stage3", 3, "stage1", "stage3"),
        ],
    )
    other = write_run(folder / "other", [product("linear-stage3", 4, None, "stage3")])
    write_losses(run, "stage1", [900.0, 300.0, 100.0])
    write_losses(run, "linear-stage3", [2.0, "nan", 0.5])
    write_losses(other, "linear-stage3", [3.0, 2.5])
    truth = ["Yes", "No"] * PICTURES
    answer(run, data, "teacher", truth, "t" * 64)
    answer(run, data, "linear-stage3", ["Yes", HOSTILE, *truth[2:]])
    answer(other, data, "linear-stage3", ["No"] * len(truth))
    write_small_profile(run)
    return run, other, data
