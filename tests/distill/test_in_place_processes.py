"""Students of a transformers model: the same steps on one process and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import in_place_processes
import pytest
from preloaded_process import run_processes

STAGES = ("mixer-mse:teacher", "mixer-mse:student", "hidden-alignment:teacher", "kl:student")


def test_one_and_two_processes(tmp_path: Path) -> None:
    """In one of the steps the second process has no row."""
    words = [f"shard:{stage}" for stage in STAGES] + ["replicate:kl:student"]
    one: dict[str, Any]
    one, two = (run_processes(tmp_path / str(n), n, in_place_processes.main, words) for n in (1, 2))
    for spec in words:
        assert two[spec]["sharded"] == (2 if spec.startswith("shard") else 0)
        assert two[spec]["tokens"] == one[spec]["tokens"]
        assert two[spec]["learned"] == pytest.approx(one[spec]["learned"], rel=1e-5)
        for first, second in zip(one[spec]["steps"], two[spec]["steps"], strict=True):
            assert second == pytest.approx(first, rel=1e-5)
        assert one[spec]["steps"][0][0] != one[spec]["steps"][-1][0]
