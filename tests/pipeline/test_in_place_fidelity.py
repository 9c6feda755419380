"""Mixers of a student of a transformers model, compared with the running teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, LAYERS, picture, save_teacher
from safetensors.torch import load_file, save_file
from test_seed_in_place import WEIGHTS, mmmamba
from torch import Tensor

from mmmamba_cli.checkpoint import InPlaceCheckpoint, load_in_place_processor, open_in_place
from mmmamba_cli.seed.in_place_fidelity import in_place_calibration, measure_in_place_fidelity
from mmmamba_cli.teachers import convert, mixers_of, student_plan

WORDS = ("--dtype", "fp32", "--in-place", "--allow-bidirectional")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers whose processors need no torchvision, and their seeded runs with reports."""
    folder = tmp_path_factory.mktemp("fidelity")
    for name in ("gemma3", "qwen3"):
        save_teacher(FAMILIES[name], folder / name)
        mmmamba("seed", folder / name, "--run", folder / f"run-{name}", *WORDS)
    return folder


def opened(folder: Path, name: str) -> tuple[InPlaceCheckpoint, InPlaceCheckpoint]:
    return open_in_place(folder / name), open_in_place(folder / f"run-{name}/products/seed")


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
def test_the_report_is_that_of_the_student_on_the_teachers_inputs(name: str, folder: Path) -> None:
    """The first layer sees the same input in both models, so a whole student gives its row."""
    teacher, product = opened(folder, name)
    rows = json.loads((product.folder / "fidelity.json").read_text())
    assert [row["layer"] for row in rows] == list(range(LAYERS))
    assert all(-1 <= row["cosine"] <= 1 and row["relative_mse"] > 0 for row in rows)
    plan = student_plan(product.config)
    assert plan is not None
    stock = FAMILIES[name].model()
    student = convert(FAMILIES[name].model(), plan, allow_bidirectional=True)
    outputs: dict[str, list[Tensor]] = {"stock": [], "student": []}
    mixer = next(mixers_of(student))
    mixer.o_proj.register_forward_pre_hook(lambda _, args: outputs["student"].append(args[0]))
    attention = stock.get_decoder().layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _, args: outputs["stock"].append(args[0]))
    processor = load_in_place_processor(teacher)
    with torch.no_grad():
        for inputs in in_place_calibration(teacher, processor):
            stock(**inputs)
            student(**inputs)
    expected, actual = (torch.cat([one[0] for one in outputs[key]]) for key in outputs)
    shape = (-1, mixer.head_dim)
    cosine = torch.cosine_similarity(expected.reshape(shape), actual.reshape(shape), dim=-1)
    assert rows[0]["cosine"] == pytest.approx(float(cosine.mean()), abs=1e-5)
    error = (expected - actual).square().sum() / expected.square().sum()
    assert rows[0]["relative_mse"] == pytest.approx(float(error), rel=1e-4)


def test_rows_are_those_of_linear_layers_and_of_the_file_of_samples(
    folder: Path, tmp_path: Path
) -> None:
    mmmamba("hybridize", "--layers", "0,2", "--run", folder / "run-gemma3")
    teacher, _ = opened(folder, "gemma3")
    hybrid = open_in_place(folder / "run-gemma3/products/hybrid-at-0-2")
    picture(16, 24).save(tmp_path / "one.png")
    lines = [{"question": "What is it?", "image": "one.png"}, {"question": "Why?"}]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    processor = load_in_place_processor(teacher)
    calibration = in_place_calibration(teacher, processor, file)
    assert ["pixel_values" in one for one in calibration] == [True, False]
    counted: list[int] = []
    rows = measure_in_place_fidelity(teacher, hybrid, calibration, counted.append)
    assert [row.layer for row in rows] == [1, 3] and len(counted) == 4


def test_a_seed_goes_on_without_a_processor_and_says_so(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", WEIGHTS):
        (bare / name).write_bytes((folder / "gemma3" / name).read_bytes())
    done = mmmamba("seed", bare, "--run", tmp_path / "run", *WORDS)
    assert done.exit_code == 0 and "has no tokenizer: the student can be loaded" in done.stderr
    assert not (tmp_path / "run/products/seed/fidelity.json").exists()


def test_a_report_that_fails_leaves_the_seed(folder: Path, tmp_path: Path) -> None:
    source = folder / "qwen3"
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for file in source.iterdir():
        (teacher / file.name).write_bytes(file.read_bytes())
    state = load_file(source / WEIGHTS)
    key = next(name for name in state if name.endswith("layers.1.self_attn.v_proj.weight"))
    # fp32 holds the weights, and not what attention makes of them.
    save_file({**state, key: state[key] * 1e38}, teacher / WEIGHTS, metadata={"format": "pt"})
    done = mmmamba("seed", teacher, "--run", tmp_path / "run", *WORDS)
    assert done.exit_code == 0
    assert "not compared with the teacher: layer 1 of the teacher gives NaN" in done.stderr
    assert (tmp_path / "run/products/seed" / WEIGHTS).is_file()
