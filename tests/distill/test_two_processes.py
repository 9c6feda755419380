"""The same training steps on one process, on two, and on two and then one."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import two_processes
from preloaded_process import PreloadedProcess
from small import small_model

# Enough for the unreadable steps, two evaluations and the stop.
STEPS = 12
# Some stages train parameters that no `mix` or `forward` of a mixer uses; the vision parameters get
# no gradient from these texts.
STAGES = (
    "mmmm:mixer-mse:padded:new+qkv",
    "mmmm:kl:packed:new+qkv",
    "gdkm:matrix-orientation:padded:*.mixer.[qkd]*_proj.*+*.beta_*+*.mixer.*_bias+*.conv1d.*+*.A_log",
    "dwgm:kl:padded:*.mixer.*+*.mlp.*+model.norm.weight",
    "dkgw:hidden-alignment:padded:*.mixer.*+*.mlp.*",
    "mmmm:kl:padded:*.mixer.*+model.vision.*",
    "dwkg:mixer-mse:gaps:new+qkv",
)


def train(folder: Path, processes: int, stop_at: int = 0) -> Any:
    """Run all stages in one start, which dominates the time; return the output of process 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [*map(str, (folder, STEPS, stop_at, *STAGES))]
    started = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
        environment = {key: str(value) for key, value in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        output = folder / f"output-{processes}-{rank}"
        started.append(PreloadedProcess(two_processes.main, words, output, environment))
    codes = [process.wait(timeout=300) for process in started]
    assert not any(codes), [process.text() for process in started]
    return json.loads(started[0].text().splitlines()[-1])


def assert_alike(one: Any, two: Any) -> None:
    assert [row[0] for row in one["steps"]] == [row[0] for row in two["steps"]]
    for first, second in zip(one["steps"], two["steps"], strict=True):
        assert second[1:] == pytest.approx(first[1:], rel=1e-5)
    assert (two["tokens"], two["bad"]) == (one["tokens"], one["bad"])
    assert two["learned"] == pytest.approx(one["learned"], rel=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(tmp_path_factory.mktemp("two"), 2)


def test_one_and_two_processes(alone: Any, two: Any) -> None:
    for stage in STAGES:
        assert_alike(alone[stage], two[stage])
        assert alone[stage]["steps"][-1][1] != alone[stage]["steps"][0][1]
    assert [row[1] for row in two[STAGES[-1]]["steps"]].count(-1.0) == 2
    assert two[STAGES[-1]]["bad"] == 10


def test_parameters_without_gradient_are_unchanged(alone: Any, two: Any) -> None:
    """Weight decay does not apply, on one process or on two."""
    before = {
        name: float(parameter.double().abs().sum())
        for name, parameter in small_model("aaaa").named_parameters()
        if ".vision." in name
    }
    for found in (alone, two):
        learned = found[STAGES[-2]]["learned"]
        assert before
        assert {name: learned[name] for name in before} == before


def test_resuming_on_one_process_after_two(alone: Any, tmp_path: Path) -> None:
    begun = train(tmp_path, 2, stop_at=7)
    ended = train(tmp_path, 1)
    for stage in STAGES:
        assert len(begun[stage]["steps"]) == 7
        joined = {
            **ended[stage],
            "steps": begun[stage]["steps"] + ended[stage]["steps"],
            "bad": begun[stage]["bad"] + ended[stage]["bad"],
        }
        assert_alike(alone[stage], joined)
