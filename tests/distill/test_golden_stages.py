"""Losses and gradients match those of the reference implementation of mmMamba."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import distance
from small_distillation import batch_of, pair_of
from test_golden_logits import MIXER, TOLERANCE, student
from torch import Tensor

import mmmamba_cli
from mmmamba_cli.distill.kl_loss import LogitsKL
from mmmamba_cli.distill.layer_losses import LayerwiseLoss, MixerMSE
from mmmamba_cli.distill.objective import build_objective
from mmmamba_cli.distill.teacher_student import TeacherStudent
from mmmamba_cli.distill.trainable import trainable_names
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.recipe import load_recipe

# Tolerance of fp32 gradients. They differ by up to 2.3e-4 between CPU vendors, since sums with
# cancellation keep few digits; the reference's own fp32 gradients differ from fp64 by up to 3e-3.
FP32 = 5e-4
# Tolerance of stage-2 gradients in fp64 against the fp32 reference: the rounding of the reference.
# The tensors below lose most digits in fp32; all others keep four.
FP64 = 1e-4
FP64_ROUNDED = 3e-3
ROUNDED_BY_REFERENCE = {
    "hovle_pre": {f"model.layers.3.mixer.{name}_proj.weight" for name in "qk"},
    "hovle_post": {f"model.layers.{i}.mixer.{name}_proj.weight" for i in (2, 4) for name in "qk"},
}


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


def compare(pair: TeacherStudent, expected: dict[str, Tensor]) -> None:
    """The student has exactly the gradients of the reference."""
    gradients = {n: p.grad for n, p in pair.student.named_parameters() if p.grad is not None}
    assert set(gradients) == set(expected)
    for name, value in expected.items():
        assert distance(gradients[name], value) <= FP32, name


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_golden_mixer_stages(golden_case: Path, stage: str) -> None:
    golden = load_file(golden_case / "golden.safetensors")
    pair = golden_pair(golden_case, stage, [])
    batch = batch_of(golden["input.input_ids"], golden["input.pixel_values"])
    settings = load_recipe("mmmamba-linear").stages[int(stage[-1]) - 1]
    objective = build_objective(settings, pair.student.config, pair.trainable)
    assert isinstance(objective, LayerwiseLoss)
    assert isinstance(objective.loss, MixerMSE)
    units = objective.count_units(pair, batch)
    weights = objective.term_weights(units)
    sums = objective.loss_sums(pair, batch, weights)
    assert distance((weights * sums).sum(), golden[f"{stage}.loss"]) <= TOLERANCE
    assert distance(sums / units, golden[f"{stage}.per_layer_mse"]) <= TOLERANCE
    expected = golden_gradients(golden, f"{stage}.grad.", pair.student.config.num_embedding_layers)
    if stage == "stage2":
        # The reference file lists only the gradients that stage 2 adds.
        parameters = dict(pair.student.named_parameters())
        for name in set(pair.trainable) - set(expected):
            assert parameters[name].grad is not None
            parameters[name].grad = None
    compare(pair, expected)


def test_golden_stage2_in_fp64(golden_case: Path) -> None:
    """In fp64, the remaining difference is the rounding of the reference."""
    golden = load_file(golden_case / "golden.safetensors")
    pair = golden_pair(golden_case, "stage2", [])
    pair.teacher.double()
    pair.student.double()
    batch = batch_of(golden["input.input_ids"], golden["input.pixel_values"].double())
    settings = load_recipe("mmmamba-linear").stages[1]
    objective = build_objective(settings, pair.student.config, pair.trainable)
    weights = objective.term_weights(objective.count_units(pair, batch))
    sums = objective.loss_sums(pair, batch, weights)
    assert distance((weights * sums).sum(), golden["stage2.loss"].double()) <= 1e-6
    expected = golden_gradients(golden, "stage2.grad.", pair.student.config.num_embedding_layers)
    rounded = ROUNDED_BY_REFERENCE[golden_case.name]
    assert rounded < set(expected)
    learned = pair.trainable_parameters()
    for name, value in expected.items():
        gradient = learned[name].grad
        assert gradient is not None and gradient.dtype == torch.float64
        allowed = FP64_ROUNDED if name in rounded else FP64
        assert distance(gradient, value.double()) <= allowed, name


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_golden_stage3(golden_case: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load_file(golden_case / "golden.safetensors")
    kept = golden["stage3.hybrid.softmax_layers"].tolist() if kind == "hybrid" else []
    pair = golden_pair(golden_case, "stage3", kept)
    # Several chunks of logits, with a shorter last one.
    monkeypatch.setattr("mmmamba_cli.distill.kl_loss.LOGITS_PER_CHUNK", 300 * 20)
    pair.student.train()
    pair.student.model.checkpoint_layers(True)
    batch = batch_of(golden["input.input_ids"], golden["input.pixel_values"])
    settings = load_recipe(
        "mmmamba-linear", overrides={"stages.stage3.kl.reduction": "paper"}
    ).stages[2]
    objective = build_objective(settings, pair.student.config, pair.trainable)
    assert isinstance(objective, LogitsKL)
    weights = objective.term_weights(objective.count_units(pair, batch))
    sums = objective.loss_sums(pair, batch, weights)
    assert distance((weights * sums).sum(), golden[f"stage3.{kind}.kl"]) <= TOLERANCE
    expected = golden_gradients(
        golden, f"stage3.{kind}.grad.", pair.student.config.num_embedding_layers
    )
    compare(pair, expected)
