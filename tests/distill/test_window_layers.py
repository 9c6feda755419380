"""Distillation of students with sliding-window layers, which may have nothing new to learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import distance, small_model
from small_distillation import batch_of, packed, pair_of
from test_objectives import LOSSES, ROWS, gradients, stage

from mmmamba_cli.distill.objective import build_objective
from mmmamba_cli.distill.teacher_student import TeacherStudent
from mmmamba_cli.distill.trainable import has_weight_decay, lora_weight_names, trainable_names
from mmmamba_cli.errors import RecipeError
from mmmamba_cli.recipe import KL, LoRA

QUERIES_AND_KEYS = ("*.[qk]_proj.*",)


def learning_pair(plan: str, learns: Any, loss: str, **options: Any) -> TeacherStudent:
    """A teacher, and a student with its weights where it has them."""
    teacher, student = small_model("a" * len(plan)), small_model(plan, seed=1, **options)
    shared = {n: t for n, t in teacher.state_dict().items() if n in student.state_dict()}
    student.load_state_dict(shared, strict=False)
    names = [name for name, _ in student.named_parameters()]
    learning = trainable_names(stage(loss, learns=learns), student.config, names)
    return pair_of(teacher.double(), student.double(), learning)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", [{}, {"sinks": 1, "sink_logits": True}])
def test_layouts_of_a_batch_agree(loss: str, options: dict[str, Any]) -> None:
    """In layers with a window next to recurrent ones."""
    learns: Any = QUERIES_AND_KEYS if loss == "matrix-orientation" else "new+qkv"
    pair = learning_pair("mwwm", learns, loss, window=4, **options)
    objective = build_objective(stage(loss, learns=learns), pair.student.config, pair.trainable)
    alone, gradient = gradients(objective, pair, [batch_of(row[None]) for row in ROWS])
    other, its_gradient = gradients(objective, pair, [packed(ROWS)])
    assert other == pytest.approx(alone, rel=1e-10)
    assert distance(its_gradient, gradient) < 1e-10
    if loss != "kl":
        assert objective.terms == ("layer 0", "layer 1", "layer 2", "layer 3")
    parameters = pair.trainable_parameters()
    assert not [n for n, p in parameters.items() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize(
    ("loss", "inputs"),
    [
        ("mixer-mse", "teacher"),
        ("mixer-mse", "student"),
        ("hidden-alignment", "student"),
        ("kl", "student"),
    ],
)
def test_a_window_without_sink_logits_has_nothing_new_to_learn(loss: str, inputs: str) -> None:
    """The other layers learn, on the hidden states behind it."""
    pair = learning_pair("mwwm", "new", loss, window=4)
    layers = {name.split(".")[2] for name in pair.trainable}
    assert layers == {"0", "3"}
    chosen = stage(loss, learns="new", **({} if loss == "kl" else {"inputs": inputs}))
    objective = build_objective(chosen, pair.student.config, pair.trainable)
    if loss != "kl":
        assert objective.terms == ("layer 0", "layer 3")
    _, gradient = gradients(objective, pair, [packed(ROWS)])
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_sink_logits_learn_alone(loss: str) -> None:
    pair = learning_pair("wwwa", "new", loss, window=4, sink_logits=True)
    assert pair.trainable == tuple(f"model.layers.{i}.mixer.sink_logits" for i in range(3))
    assert not any(map(has_weight_decay, pair.trainable))
    objective = build_objective(stage(loss, learns="new"), pair.student.config, pair.trainable)
    loss_before, gradient = gradients(objective, pair, [packed(ROWS)])
    assert gradient.all()
    with torch.no_grad():
        for parameter in pair.trainable_parameters().values():
            parameter -= 1e-3 * parameter.grad / gradient.norm()
    assert gradients(objective, pair, [packed(ROWS)])[0] < loss_before


@pytest.mark.parametrize("loss", ["mixer-mse", "matrix-orientation", "hidden-alignment"])
def test_a_window_wider_than_the_text_has_no_layer_loss(loss: str) -> None:
    learns = QUERIES_AND_KEYS
    pair = learning_pair("wwaw", learns, loss, window=64)
    chosen = stage(loss, learns=("model.layers.[01]*.[qk]_proj.*",))
    names = [name for name, _ in pair.student.named_parameters()]
    objective = build_objective(
        chosen, pair.student.config, trainable_names(chosen, pair.student.config, names)
    )
    assert gradients(objective, pair, [packed(ROWS)])[0] == 0


def test_a_student_in_which_nothing_learns_is_refused() -> None:
    config = small_model("wwaw", window=4).config
    names = [name for name, _ in small_model("wwaw", window=4).named_parameters()]
    for loss in LOSSES:
        with pytest.raises(RecipeError, match="are sliding-window attention, which has no") as said:
            trainable_names(stage(loss, learns="new"), config, names)
        assert (
            said.value.hint == "give --set stages.s.learns=new+qkv, or a recipe without this stage"
        )
    chosen = trainable_names(stage("kl", learns="new+qkv"), config, names)
    assert len(chosen) == 3 * 3
    with pytest.raises(RecipeError, match="trainable: paper leaves out A_log and dt_bias"):
        config = small_model("mmmm").config
        names = [name for name, _ in small_model("mmmm").named_parameters()]
        trainable_names(stage("kl", learns=("*.A_log",), trainable="paper"), config, names)
    with pytest.raises(RecipeError, match="paper leaves out A_log, decay_bias and dt_bias"):
        config = small_model("mgga").config
        names = [name for name, _ in small_model("mgga").named_parameters()]
        trainable_names(stage("kl", learns=("*.decay_bias",), trainable="paper"), config, names)


def test_adapters_are_in_the_mixers_that_learn() -> None:
    student = small_model("mwwa", window=4)
    names = [name for name, _ in student.named_parameters()]
    for learns, layers in (("new", [0]), ("new+qkv", [0, 1, 2])):
        chosen = stage("kl", learns=learns, lora=LoRA(targets=("q_proj",)), kl=KL())
        learning = trainable_names(chosen, student.config, names)
        expected = [f"model.layers.{i}.mixer.q_proj.weight" for i in layers]
        assert lora_weight_names(chosen, learning, names) == expected
