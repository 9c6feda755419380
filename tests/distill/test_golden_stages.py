"""Losses and gradients match those of the reference implementation of mmMamba."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import distance
from small_distillation import batch_of, pair_of
from test_golden_logits import MIXER, TOLERANCE, student
from torch import Tensor

import mmmamba_cli
from mmmamba_cli.distill.kl_loss import LogitsKL
from mmmamba_cli.distill.layer_losses import LayerwiseLoss
from mmmamba_cli.distill.objective import build_objective
from mmmamba_cli.distill.teacher_student import TeacherStudent
from mmmamba_cli.distill.trainable import trainable_names
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.recipe import Stage, load_recipe

# The reference's gradients are fp32, and sums with cancellation keep few digits: their relative
# distance from the gradients in fp64 is at most `REFERENCE`, that of two tensors more.
REFERENCE, FEW_DIGITS = 3e-4, 4e-3
HAVE_FEW_DIGITS = {
    ("hovle_post", "stage1"): {f"model.layers.2.mixer.conv1d.{x}" for x in ("weight", "bias")}
}
# Distance of gradients in fp32 from fp64, beside twice that of the reference. It differs between
# CPUs by a factor of ten.
FP32 = 5e-4


def native_name(foreign: str, first: int) -> str:
    """The full name of a reference parameter; `first` is the number of embedding layers."""
    stack, _, rest = foreign.partition(".layers." if "language" in foreign else ".encoder.")
    number, _, parameter = rest.partition(".attention.")
    layer = int(number) + (first if stack.startswith("language") else 0)
    return f"model.layers.{layer}.mixer.{MIXER[parameter]}"


def golden_gradients(golden: dict[str, Tensor], prefix: str, first: int) -> dict[str, Tensor]:
    return {
        native_name(key.removeprefix(prefix), first): value
        for key, value in golden.items()
        if key.startswith(prefix)
    }


def golden_pair(case: Path, stage: str, attention: list[int]) -> TeacherStudent:
    """Teacher and golden student in fp32, with the trainable parameters of the paper."""
    model = student(case, attention)
    if stage == "stage2":
        overlay(model, load_file(case / "stage2_qkv.safetensors"))
    settings = load_recipe("mmmamba-hybrid", overrides={"stages.stage3.trainable": "paper"}).stages[
        int(stage[-1]) - 1
    ]
    names = trainable_names(settings, model.config, [n for n, _ in model.named_parameters()])
    return pair_of(mmmamba_cli.load(str(case)), model, names)


def overlay(model: HolisticVLM, tensors: dict[str, Tensor]) -> None:
    first = model.config.num_embedding_layers
    state = {native_name(name, first): value for name, value in tensors.items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys


def in_fp64(pair: TeacherStudent) -> TeacherStudent:
    return replace(pair, teacher=pair.teacher.double(), student=pair.student.double())


def learn(pair: TeacherStudent, golden: dict[str, Tensor], settings: Stage) -> tuple[Any, ...]:
    """Loss, mean of each layer or token, and gradients of the golden batch."""
    dtype = next(pair.teacher.parameters()).dtype
    batch = batch_of(golden["input.input_ids"], golden["input.pixel_values"].to(dtype))
    objective = build_objective(settings, pair.student.config, pair.trainable)
    assert isinstance(objective, LogitsKL if settings.loss == "kl" else LayerwiseLoss)
    units = objective.count_units(pair, batch)
    weights = objective.term_weights(units)
    sums = objective.loss_sums(pair, batch, weights)
    gradients = {n: p.grad for n, p in pair.student.named_parameters() if p.grad is not None}
    return (weights * sums).sum(), sums / units, gradients


def compare(
    found: dict[str, Tensor],
    exact: dict[str, Tensor],
    expected: dict[str, Tensor],
    few_digits: set[str],
) -> None:
    """The gradients in fp32 and fp64 are those of the reference but for rounding."""
    assert set(found) == set(exact) == set(expected)
    assert few_digits <= set(expected)
    for name, value in expected.items():
        assert exact[name].dtype == torch.float64
        rounding = distance(value.double(), exact[name])
        assert rounding <= (FEW_DIGITS if name in few_digits else REFERENCE), name
        assert distance(found[name].double(), exact[name]) <= FP32 + 2 * rounding, name


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_golden_mixer_stages(golden_case: Path, stage: str) -> None:
    golden = load_file(golden_case / "golden.safetensors")
    settings = load_recipe("mmmamba-linear").stages[int(stage[-1]) - 1]
    assert settings.loss == "mixer-mse"
    pair = golden_pair(golden_case, stage, [])
    loss, layers, found = learn(pair, golden, settings)
    assert distance(loss, golden[f"{stage}.loss"]) <= TOLERANCE
    assert distance(layers, golden[f"{stage}.per_layer_mse"]) <= TOLERANCE
    loss, _, exact = learn(in_fp64(golden_pair(golden_case, stage, [])), golden, settings)
    assert distance(loss, golden[f"{stage}.loss"].double()) <= 1e-6
    expected = golden_gradients(golden, f"{stage}.grad.", pair.student.config.num_embedding_layers)
    if stage == "stage2":
        # The reference file lists only the gradients that stage 2 adds.
        assert set(found) == set(pair.trainable) > set(expected)
        found, exact = ({n: x[n] for n in expected} for x in (found, exact))
    compare(found, exact, expected, HAVE_FEW_DIGITS.get((golden_case.name, stage), set()))


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_golden_stage3(golden_case: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load_file(golden_case / "golden.safetensors")
    kept = golden["stage3.hybrid.softmax_layers"].tolist() if kind == "hybrid" else []
    # Several chunks of logits, with a shorter last one.
    monkeypatch.setattr("mmmamba_cli.distill.kl_loss.LOGITS_PER_CHUNK", 300 * 20)
    settings = load_recipe(
        "mmmamba-linear", overrides={"stages.stage3.kl.reduction": "paper"}
    ).stages[2]
    pair = golden_pair(golden_case, "stage3", kept)
    results = []
    for one in (pair, in_fp64(golden_pair(golden_case, "stage3", kept))):
        one.student.train()
        one.student.model.checkpoint_layers(True)
        results.append(learn(one, golden, settings))
    (loss, _, found), (_, _, exact) = results
    assert distance(loss, golden[f"stage3.{kind}.kl"]) <= TOLERANCE
    expected = golden_gradients(
        golden, f"stage3.{kind}.grad.", pair.student.config.num_embedding_layers
    )
    compare(found, exact, expected, set())
