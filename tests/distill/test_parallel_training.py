"""The same training steps on one, two and four processes, replicated and sharded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import parallel_training
import pytest
from preloaded_process import run_processes
from small import small_model

# Number of steps, plan, loss, layout and trainable parameters. Some stages train parameters that no
# `mix` or `forward` of a mixer uses; the vision parameters get no gradient from these texts, and
# those of the LM head get several in a micro batch.
STAGES = {
    "mse": "8:mmmm:mixer-mse:padded:new+qkv",
    "kl": "8:mmmm:kl:packed:new+qkv",
    "matrix": "5:gdkm:matrix-orientation:padded:"
    "*.mixer.[qkd]*_proj.*+*.beta_*+*.mixer.*_bias+*.conv1d.*+*.A_log",
    "head": "6:dwgm:kl:padded:*.mixer.*+*.mlp.*+model.norm.weight+lm_head.*",
    "hidden": "5:dkgw:hidden-alignment:padded:*.mixer.*+*.mlp.*",
    "vision": "5:mmmm:kl:padded:*.mixer.*+model.vision.*",
    "columns": "6:mmmm:kl:columns:new+qkv",
    "gaps": "8:dwkg:mixer-mse:gaps:new+qkv",
}
STEPS = {name: int(stage.partition(":")[0]) for name, stage in STAGES.items()}
# Steps without an evaluation, which gathers parameters too.
PLAIN_STEPS = slice(1, 4)


def train(folder: Path, processes: int, stages: Mapping[str, str], stop_at: int = 0) -> Any:
    """Train stages in one start, which dominates the time; return the output of process 0.

    `stages` maps labels, which begin with the name of a stage, to modes.
    """
    specs = {k: f"{k}:{mode}:{STAGES[k.split('-')[0]]}" for k, mode in stages.items()}
    words = [str(stop_at), *specs.values()]
    found = run_processes(folder, processes, parallel_training.main, words)
    return {label: found[spec] for label, spec in specs.items()}


def assert_alike(one: Any, several: Any) -> None:
    assert [row[0] for row in one["steps"]] == [row[0] for row in several["steps"]]
    for first, second in zip(one["steps"], several["steps"], strict=True):
        assert second[1:] == pytest.approx(first[1:], rel=1e-5)
    assert (several["tokens"], several["bad"]) == (one["tokens"], one["bad"])
    assert several["learned"] == pytest.approx(one["learned"], rel=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(tmp_path_factory.mktemp("one"), 1, dict.fromkeys(STAGES, "replicate"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    stages = {f"{stage}-{mode}": mode for stage in STAGES for mode in ("replicate", "shard")}
    stages |= {"mse-layers": "layers", "head-shard": "fused", "gaps-shard": "fused"}
    return train(tmp_path_factory.mktemp("two"), 2, stages)


def test_one_and_two_processes(alone: Any, two: Any) -> None:
    for label, found in two.items():
        assert_alike(alone[label.split("-")[0]], found)
    for stage in STAGES:
        losses = [row[1] for row in alone[stage]["steps"]]
        assert losses[-1] != losses[0]
    for label in ("gaps-replicate", "gaps-shard"):
        assert [row[1] for row in two[label]["steps"]].count(-1.0) == 3
        assert two[label]["bad"] == 12


def test_four_processes(alone: Any, tmp_path: Path) -> None:
    """Some of their micro batches are empty."""
    stages = {"head": "replicate", "hidden": "replicate", "kl": "shard", "gaps": "shard"}
    for stage, found in train(tmp_path, 4, stages).items():
        assert_alike(alone[stage], found)


def test_a_replicated_step_reduces_each_gradient_once(two: Any) -> None:
    for stage in ("mse", "kl", "hidden", "head"):
        found = two[f"{stage}-replicate"]
        for calls in found["calls"][PLAIN_STEPS]:
            reduced = [sent for kind, sent, is_async in calls if is_async]
            assert sum(reduced) == found["elements"]
            assert {kind for kind, *_ in calls} == {"all_reduce"}
            # Units, losses with flags, and whether to stop.
            assert len(calls) - len(reduced) == 3


def test_reductions_start_during_the_backward_pass(two: Any) -> None:
    for stage, late in (("mse", False), ("kl", False), ("hidden", False), ("head", True)):
        found = two[f"{stage}-replicate"]
        is_async, end = [call[2] for call in found["calls"][1]], found["during_backward"][1]
        during, after = is_async[:end], is_async[end:]
        assert sum(during) > 10
        # The gradients of the LM head are complete at the end only.
        assert any(after) == late


def test_reductions_start_before_other_collectives(two: Any) -> None:
    """Processes may start them at different times: one without pictures, one with them."""
    for label, found in two.items():
        if label.endswith("-replicate"):
            for calls in found["calls"][PLAIN_STEPS]:
                is_async = [call[2] for call in calls]
                started = sum(is_async)
                # Whether to stop after the step before, units; then losses with flags.
                if started:
                    assert is_async == [False] * 2 + [True] * started + [False], label


def test_a_sharded_step_gathers_and_reduces_once(two: Any) -> None:
    for stage in ("mse", "kl", "vision"):
        found = two[f"{stage}-shard"]
        for calls in found["calls"][PLAIN_STEPS]:
            kinds = [kind for kind, *_ in calls]
            assert kinds.count("gather") == kinds.count("scatter") == found["sharded"] == 4
    in_each_micro_batch = [kind for kind, *_ in two["mse-layers"]["calls"][1]]
    assert in_each_micro_batch.count("gather") == 8
    assert in_each_micro_batch.count("scatter") == 8


def test_parameters_without_gradient_are_unchanged(alone: Any, two: Any) -> None:
    """Weight decay does not apply, on one process or on two."""
    before = {
        name: float(parameter.double().abs().sum())
        for name, parameter in small_model("aaaa").named_parameters()
        if ".vision." in name
    }
    for found in (alone["vision"], two["vision-replicate"], two["vision-shard"]):
        assert before
        assert {name: found["learned"][name] for name in before} == before


def test_resuming_in_another_mode_on_another_number_of_processes(
    alone: Any, tmp_path: Path
) -> None:
    parts = [
        train(tmp_path, 2, {"mse": "shard", "head": "replicate", "columns": "layers"}, stop_at=2),
        train(tmp_path, 4, {"mse": "replicate", "head": "fused", "columns": "fused"}, stop_at=4),
        train(tmp_path, 1, {"mse": "shard", "head": "replicate", "columns": "replicate"}),
    ]
    for stage in ("mse", "head", "columns"):
        assert [len(part[stage]["steps"]) for part in parts] == [2, 2, STEPS[stage] - 4]
        steps = [row for part in parts for row in part[stage]["steps"]]
        assert_alike(alone[stage], {**parts[-1][stage], "steps": steps})
