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
# The last two let parameters learn that no mixer's `mix` or `forward` reaches.
STAGES = (
    "mixer-mse:padded:new+qkv",
    "kl:packed:new+qkv",
    "matrix-orientation:padded:new+qkv",
    "kl:padded:*.mixer.*+*.mlp.*+model.norm.weight",
    "hidden-alignment:padded:*.mixer.*+*.mlp.*",
)


def train(folder: Path, processes: int, stop_at: int = 0) -> Any:
    """What process 0 printed, by loss; all stages in one start, which takes longer than they do."""
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
        arguments = [HERE / "two_processes.py", folder, STEPS, stop_at, *STAGES]
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


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(tmp_path_factory.mktemp("one"), 1)


def test_one_and_two_processes(alone: Any, tmp_path: Path) -> None:
    two = train(tmp_path, 2)
    for stage in STAGES:
        assert_alike(alone[stage], two[stage])
        assert alone[stage]["steps"][-1][1] != alone[stage]["steps"][0][1]


def test_begun_on_two_and_ended_on_one(alone: Any, tmp_path: Path) -> None:
    begun = train(tmp_path, 2, stop_at=7)
    ended = train(tmp_path, 1)
    for stage in STAGES:
        assert len(begun[stage]["steps"]) == 7
        joined = {**ended[stage], "steps": begun[stage]["steps"] + ended[stage]["steps"]}
        assert_alike(alone[stage], joined)
