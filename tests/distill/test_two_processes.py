"""The same steps on one process, on two, and on two and then one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS = 20


def train(folder: Path, processes: int, loss: str, stop_at: int = 0, layout: str = "padded") -> Any:
    """What process 0 printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
        environment = {
            **os.environ,
            **{key: str(value) for key, value in place.items()},
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, ROOT / "tests" / "model"))),
        }
        arguments = [HERE / "two_processes.py", folder, loss, STEPS, stop_at, layout]
        started.append(
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=300) for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    return json.loads(outputs[0][0])


def assert_alike(one: Any, two: Any) -> None:
    assert [row[0] for row in one["steps"]] == [row[0] for row in two["steps"]]
    for first, second in zip(one["steps"], two["steps"], strict=True):
        assert second[1:] == pytest.approx(first[1:], rel=1e-5)
    assert two["tokens"] == one["tokens"]
    assert two["learned"] == pytest.approx(one["learned"], rel=1e-5)


@pytest.mark.parametrize(("loss", "layout"), [("mixer-mse", "padded"), ("kl", "packed")])
def test_one_and_two_processes(loss: str, layout: str, tmp_path: Path) -> None:
    alone = train(tmp_path / "one", 1, loss, layout=layout)
    assert_alike(alone, train(tmp_path / "two", 2, loss, layout=layout))
    assert alone["steps"][-1][1] != alone["steps"][0][1]
    begun = train(tmp_path / "both", 2, loss, stop_at=7, layout=layout)
    ended = train(tmp_path / "both", 1, loss, layout=layout)
    joined = {**ended, "steps": begun["steps"] + ended["steps"]}
    assert_alike(alone, joined)


def test_matrix_orientation_on_two_processes(tmp_path: Path) -> None:
    alone = train(tmp_path / "one", 1, "matrix-orientation")
    assert_alike(alone, train(tmp_path / "two", 2, "matrix-orientation"))
