"""Training of every mixer: precision, layouts of a batch, checkpointing, adapters."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from small import distance, small_model
from small_distillation import batch_of, packed
from test_objectives import LOSSES, ROWS, gradients, stage
from test_window_layers import learning_pair

from mmmamba_cli.architecture import is_fp32_parameter, mixer_specs
from mmmamba_cli.architecture.gated_sizes import matrix_state_bytes
from mmmamba_cli.distill.objective import Objective, build_objective
from mmmamba_cli.distill.teacher_student import TeacherStudent
from mmmamba_cli.distill.trainable import (
    attach_lora,
    lora_deltas,
    lora_weight_names,
    trainable_names,
)
from mmmamba_cli.recipe import LoRA

CASES: dict[str, dict[str, Any]] = {
    "dkgw": {"window": 4, "sink_logits": True, "tile_taps": True},
    "mdgk": {"input_step": False},
}
cases = pytest.mark.parametrize("plan", CASES)
losses = pytest.mark.parametrize("loss", LOSSES)


def learning(plan: str, loss: str) -> tuple[Objective, TeacherStudent]:
    """An fp64 pair, and a loss of all parameters of the mixers or of the mixing matrices."""
    matrices = ("*.mixer.[qkd]*_proj.*", "*.mixer.*_bias")
    learns: Any = matrices if loss == "matrix-orientation" else "new+qkv"
    pair = learning_pair(plan, learns, loss, **CASES[plan])
    return build_objective(stage(loss, learns=learns), pair.student.config, pair.trainable), pair


def in_bf16(pair: TeacherStudent) -> TeacherStudent:
    """The pair as it is loaded for `precision: bf16`: fp32 masters, frozen matrices in bf16."""
    pair = copy.deepcopy(pair)
    for model in (pair.teacher, pair.student):
        for name, parameter in model.named_parameters():
            wide = parameter.requires_grad or is_fp32_parameter(name)
            parameter.data = parameter.data.to(torch.float32 if wide else torch.bfloat16)
    return replace(pair, precision="bf16")


@losses
@cases
def test_layouts_of_a_batch_agree(loss: str, plan: str) -> None:
    objective, pair = learning(plan, loss)
    alone, gradient = gradients(objective, pair, [batch_of(row[None]) for row in ROWS])
    other, its_gradient = gradients(objective, pair, [packed(ROWS)])
    assert other == pytest.approx(alone, rel=1e-10)
    assert distance(its_gradient, gradient) < 1e-10
    # Texts have no tiles, and the taps in them the gradient 0: FSDP needs one on every process.
    missing = [n for n, p in pair.trainable_parameters().items() if p.grad is None]
    zero = {
        n.rpartition(".")[2] for n, p in pair.trainable_parameters().items() if not p.grad.any()
    }
    assert not missing and zero <= {"tile_taps"}


@losses
@cases
def test_losses_in_bf16(loss: str, plan: str) -> None:
    """bf16 products over fp32 masters; `test_mixers.py` compares what is not rounded bit for bit.

    A rounding to bf16 is 2^-9 = 0.2 %, and a loss, a mean over thousands of numbers, depends on
    some tens of them. The norm behind the scan divides out the size of a read-out, so that the
    gradients of read-outs near 0 are mostly rounding; those of mixing matrices have no norm.
    """
    objective, pair = learning(plan, loss)
    low = in_bf16(pair)
    # The same weights, and no further rounding.
    exact = replace(copy.deepcopy(low), precision="fp32")
    exact = replace(exact, teacher=exact.teacher.double(), student=exact.student.double())
    expected, gradient = gradients(objective, exact, [packed(ROWS)])
    found, its_gradient = gradients(objective, low, [packed(ROWS)])
    assert found != expected and found == pytest.approx(expected, rel=0.02)
    assert its_gradient.dtype == torch.float32 and its_gradient.isfinite().all()
    if loss == "matrix-orientation":
        assert distance(its_gradient.double(), gradient) < 0.05


@cases
def test_checkpointed_layers_give_the_same_gradients(plan: str) -> None:
    objective, pair = learning(plan, "kl")
    pair = in_bf16(pair)
    pair.student.train()
    expected = gradients(objective, pair, [packed(ROWS)])
    calls: list[int] = []
    pair.student.model.blocks[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    pair.student.model.checkpoint_layers(True)
    found = gradients(objective, pair, [packed(ROWS)])
    assert len(calls) == 2
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])


def test_the_paper_freezes_decays_in_kl_only() -> None:
    student = small_model("mdkg")
    names = [name for name, _ in student.named_parameters()]
    decays = {(layer, name) for layer in "012" for name in ("A_log", "dt_bias")}
    decays.add(("3", "decay_bias"))
    for loss in ("mixer-mse", "kl"):
        chosen = trainable_names(stage(loss, trainable="paper"), student.config, names)
        usual = trainable_names(stage(loss), student.config, names)
        frozen = [name.split(".") for name in {*usual} - {*chosen}]
        assert {(layer, name) for *_, layer, _, name in frozen} == (
            decays if loss == "kl" else set()
        )


def test_every_recurrent_mixer_names_its_decay() -> None:
    for spec in mixer_specs().values():
        assert bool(spec.decay_parameters) == (spec.cache_bytes is matrix_state_bytes), spec.name
        assert spec.decay_parameters <= spec.fp32_parameters


def test_adapters_on_every_projection() -> None:
    """They begin without effect, learn, and merged into the weights give the same output."""
    targets = ("q_proj", "v_proj", "g_proj", "dt_proj", "beta_proj", "dt_up_proj", "decay_up_proj")
    settings = LoRA(rank=2, alpha=4.0, targets=targets)
    pair = learning_pair("mdkg", ("*.mixer.*_bias",), "kl")
    chosen = stage("kl", learns=("*.mixer.*_bias",), lora=settings)
    names = [name for name, _ in pair.student.named_parameters()]
    weights = lora_weight_names(chosen, pair.trainable, names)
    assert len(weights) == 4 * 3 + 2 + 2 + 1 + 1
    plain = copy.deepcopy(pair.student)
    ids = ROWS[0][None]
    pair = attach_lora(replace(pair, student=pair.student.float()), settings, weights)
    plain = plain.float()
    with torch.no_grad():
        assert distance(pair.student(ids).logits, plain(ids).logits) < 1e-5
    objective = build_objective(chosen, pair.student.config, pair.trainable)
    pair = replace(pair, teacher=pair.teacher.float())
    gradients(objective, pair, [packed(ROWS)])
    with torch.no_grad():
        for name, parameter in pair.trainable_parameters().items():
            if "lora" in name:
                assert parameter.grad is not None
                assert parameter.grad.any() == ("lora_B" in name), name
                parameter -= parameter.grad / parameter.grad.norm().clamp(min=1e-9)
        for name, delta in lora_deltas(pair, settings, weights, lambda tensor: tensor).items():
            assert delta.any()
            plain.get_parameter(name).add_(delta)
        assert distance(plain(ids).logits, pair.student(ids).logits) < 1e-4
