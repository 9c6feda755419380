"""`inspect`, `status` and next steps of students of transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, HEAD_DIM, KV_HEADS, LAYERS, save_teacher
from typer.testing import CliRunner

import mmmamba_cli
from mmmamba_cli.checkpoint import open_in_place
from mmmamba_cli.cli.app import app
from mmmamba_cli.cli.next_steps import steps_after
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.inspection.in_place_summary import memory_of_in_place
from mmmamba_cli.runs import Run

CONTEXT = 100
# Sliding windows of 8 columns in layers 0 and 2.
WINDOW = 8


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and a run with its seed and a hybrid."""
    folder = tmp_path_factory.mktemp("inspected")
    save_teacher(FAMILIES["gemma3"], folder / "teacher")
    options = ("--no-report", "--allow-bidirectional", "--dtype", "fp32")
    mmmamba("seed", folder / "teacher", "--run", folder / "run", *options)
    mmmamba("hybridize", "--layers", "0,1", "--run", folder / "run")
    return folder


def inspect(folder: Path, *words: object) -> dict[str, Any]:
    options = ("--run", folder / "run", "--context", CONTEXT, "--json")
    return dict(json.loads(mmmamba("inspect", *words, *options).stdout))


def test_parts_and_sizes_are_those_of_the_model(folder: Path) -> None:
    found = inspect(folder)
    student = mmmamba_cli.load(str(folder / "run/products/hybrid-at-0-1"))
    assert found["parameters"] == student.num_parameters()
    assert found["layout"] == "transformers (mmmamba_gemma3)" and found["tokenizer"] == "processor"
    assert found["kind"] == "hybrid (2 attention)" and found["hidden_size"] == 32
    parts = {part["name"]: part for part in found["parts"]}
    decoder = student.get_decoder()
    for name, module in (
        ("attention mixers", [decoder.layers[i].self_attn for i in (0, 1)]),
        ("linear mixers", [decoder.layers[i].self_attn for i in (2, 3)]),
        ("MLPs", [layer.mlp for layer in decoder.layers]),
        ("token embedding", [decoder.embed_tokens]),
    ):
        counted = sum(value.numel() for one in module for value in one.parameters())
        assert parts[name]["parameters"] == counted, name
    assert parts["linear mixers"]["layers"] == 2 and parts["norms"]["layers"] == LAYERS
    assert parts["vision tower and projector"]["parameters"] > 0 and "output head" not in parts


def test_memory_counts_the_window_and_the_teachers_weights(folder: Path) -> None:
    student, teacher = inspect(folder)["memory"]
    row = 2 * KV_HEADS * HEAD_DIM * 4
    assert student["kv_cache"] == row * (WINDOW + CONTEXT)
    assert teacher["kv_cache"] == 2 * row * (WINDOW + CONTEXT)
    assert student["ssm_state"] > 0 == teacher["ssm_state"]
    weights = sum(value.nbytes for value in FAMILIES["gemma3"].model().parameters())
    assert teacher["weights"] == weights < student["weights"]
    (alone,) = inspect(folder, "teacher")["memory"]
    assert alone["weights"] == weights and alone["kv_cache"] == teacher["kv_cache"]
    halves = inspect(folder, "--dtype", "bf16")["memory"]
    assert halves[1]["weights"] == weights / 2 and halves[0]["weights"] > student["weights"] / 2


def test_comparison_and_status(folder: Path) -> None:
    found = inspect(folder, "--against", "teacher")["differences"]
    status = {one["name"]: one["status"] for one in found}
    new = {name for name, value in status.items() if value == "only here"}
    assert len(new) == 2 * 7 and set(status.values()) == {"equal", "only here"}
    table = mmmamba("inspect", "--run", folder / "run", "--against", "teacher").stdout
    assert "layers.*.self_attn.A_log" in table
    lines = mmmamba("status", "--run", folder / "run").stdout
    assert "hybrid-at-0-1" in lines and "linear, 0.1 M, float32" in lines


def test_next_steps_are_commands_that_take_such_a_run(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--no-report", "--allow-bidirectional")
    said = mmmamba("seed", folder / "teacher", "--run", run, *words).stdout
    assert f"next: mmmamba distill --data FILE --run {run}" in said
    made = Run(run).product("seed").model_copy(update={"final": True})
    evaluate = f"mmmamba eval --suite mme,pope --data DIR --teacher --run {run}"
    assert steps_after(Run(run), made).commands == (evaluate,)


def test_a_short_context_is_refused(folder: Path) -> None:
    with pytest.raises(MmmambaError, match="expected at least 1 token"):
        memory_of_in_place("teacher", open_in_place(folder / "teacher"), 0)
