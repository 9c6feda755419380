"""Training of students of transformers' models: KL, adapters, resume, every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from in_place_distillation import gradients, make_batch, make_job, make_objective, make_stage
from torch.distributions import Categorical, kl_divergence

from mmmamba_cli.data import IGNORE_INDEX
from mmmamba_cli.distill import kl_loss
from mmmamba_cli.distill.optimiser import build_optimiser
from mmmamba_cli.distill.trainable import attach_lora, lora_deltas, lora_weight_names
from mmmamba_cli.distill.trainer import StepResult, Stopped, train
from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.distill.validation import evaluate_held_out
from mmmamba_cli.recipe import KL, LoRA

FAMILIES_WITH_PICTURES = ("qwen3_vl", "internvl", "smolvlm")
EVERY_KIND = (
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "llava_onevision",
    "smolvlm",
    "mistral3",
)


@pytest.mark.parametrize("name", FAMILIES_WITH_PICTURES)
def test_kl_equals_whole_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of three columns, with and without checkpointing, answers only and CE."""
    stage = make_stage("kl", kl=KL(mask="answer", ce_weight=0.25), loss_scale=1.0)
    objective, pair = make_objective(name, stage)
    monkeypatch.setattr(kl_loss, "LOGITS_PER_CHUNK", 3 * pair.lm_head.out_features)
    batch = make_batch(name)
    pair.checkpoint_layers(len(pair.checkpointable_layers))
    value, found = gradients(objective, pair, [batch])
    pair.checkpoint_layers(0)
    again, kept = gradients(objective, pair, [batch])
    for parameter in pair.trainable_parameters().values():
        parameter.grad = None
    targets = batch.labels.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    chosen = targets != IGNORE_INDEX
    with torch.no_grad():
        teacher = pair.teacher(**batch.inputs).logits[chosen]
    student = pair.student(**batch.inputs).logits[chosen]
    divergence = kl_divergence(Categorical(logits=teacher), Categorical(logits=student)).mean()
    loss = 0.75 * divergence + 0.25 * torch.nn.functional.cross_entropy(student, targets[chosen])
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-6) == pytest.approx(again, rel=1e-6)
    for key, parameter in pair.trainable_parameters().items():
        assert parameter.grad is not None
        for gradient in (found[key], kept[key]):
            assert (gradient - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), key


@pytest.mark.parametrize("loss", ["mixer-mse", "matrix-orientation", "hidden-alignment", "kl"])
def test_layouts_agree(loss: str) -> None:
    """Both rows at once, padded on either side, and each alone, beside a process without rows."""
    inputs = ("teacher", "student") if loss == "mixer-mse" else ("student",)
    for source in inputs:
        objective, pair = make_objective("qwen2_5_vl", make_stage(loss, inputs=source))
        value, together = gradients(objective, pair, [make_batch("qwen2_5_vl")])
        rows = [make_batch("qwen2_5_vl", rows=one) for one in ((0,), (1,), ())]
        layouts = [rows, [make_batch("qwen2_5_vl", left=True)]]
        # Eager attention of transformers has no finite weights for padding in float64.
        for batches in layouts[: 1 if loss == "matrix-orientation" else 2]:
            apart, found = gradients(objective, pair, batches)
            assert apart == pytest.approx(value, rel=1e-6)
            for key, gradient in together.items():
                assert (found[key] - gradient).norm() < 1e-5 * gradient.norm(), key


def losses(job: Any, progress: Progress, stop_at: int | None = None) -> list[float]:
    """Train to the end or to a stop; return the loss of each step."""
    found: list[float] = []

    def report(result: StepResult) -> None:
        found.append(result.loss)

    try:
        train(job, progress, report, lambda: progress.step == stop_at)
    except Stopped:
        assert stop_at is not None
    return found


@pytest.mark.parametrize("name", EVERY_KIND)
def test_stages_reduce_the_held_out_loss(name: str, tmp_path: Path) -> None:
    """Stages 1 and 2 on layer losses, stage 3 end to end, each on the student of the one before."""
    stages = (
        make_stage("mixer-mse", "new", name="one", steps=3, lr=2e-2),
        make_stage("mixer-mse", "new+qkv", name="two", steps=3, lr=2e-2),
        make_stage("kl", "new+qkv", name="three", steps=3, lr=2e-2),
    )
    teacher = FAMILIES[name].model().double()
    untouched = {key: value.clone() for key, value in teacher.state_dict().items()}
    learned: dict[str, torch.Tensor] = {}
    for stage in stages:
        job = make_job(tmp_path / stage.name, name, stage, linear=range(4), teacher=teacher)
        job.pair.student.load_state_dict(learned, strict=False)
        before = held_out(job)
        losses(replace(job, held_out=None), Progress())
        after = held_out(job)
        assert after < before, (stage.name, before, after)
        learned = job.pair.student.state_dict()
    assert all(torch.equal(value, untouched[key]) for key, value in teacher.state_dict().items())


def held_out(job: Any) -> float:
    job.pair.student.eval()
    assert job.held_out is not None
    steps = job.held_out.steps(0, 1)
    return evaluate_held_out(job.pair, job.objective, steps, job.world).loss


def test_resumed_steps_have_the_same_bits(tmp_path: Path) -> None:
    stage = make_stage("kl", steps=4, evaluate_every=2, save_every=1)
    whole = make_job(tmp_path / "whole", "qwen3_vl", stage)
    expected = losses(whole, Progress())
    found: list[float] = []
    for stop in (1, 3, None):
        job = make_job(tmp_path / "parts", "qwen3_vl", stage)
        steps, progress = job.states.steps(), Progress()
        if steps:
            progress = job.states.read_record(job.states.path(steps[-1]).name).progress
        found += losses(job, progress, stop)
    assert found == expected
    theirs = whole.pair.trainable_parameters()
    for name, parameter in job.pair.trainable_parameters().items():
        assert torch.equal(parameter, theirs[name]), name


def test_adapters_merge_into_the_weights() -> None:
    """Adapters learn, the matrices below do not, and the merged student has the same loss."""
    stage = make_stage("kl", lora=LoRA(rank=2, alpha=4, targets=("q_proj", "v_proj")))
    objective, pair = make_objective("smolvlm", stage)
    names = [name for name, _ in pair.student.named_parameters()]
    chosen = lora_weight_names(stage, pair.trainable, names, "self_attn")
    assert chosen == [
        f"model.text_model.layers.{layer}.self_attn.{target}.weight"
        for target in ("q_proj", "v_proj")
        for layer in (0, 2)
    ]
    for name in chosen:
        pair.student.get_parameter(name).requires_grad_(False)
    pair = pair.with_trainable(name for name in pair.trainable if name not in chosen)
    pair = attach_lora(pair, stage.lora, chosen)
    adapters = [n for n in pair.trainable if ".lora_" in n]
    assert len(adapters) == 2 * len(chosen)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in adapters:
            weight = pair.student.get_parameter(name)
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    value, _ = gradients(objective, pair, [make_batch("smolvlm")])
    merged_objective, merged = make_objective("smolvlm", stage)
    deltas = lora_deltas(pair, stage.lora, chosen, lambda tensor: tensor)
    with torch.no_grad():
        for name, delta in deltas.items():
            merged.student.get_parameter(name).add_(delta)
    other, _ = gradients(merged_objective, merged, [make_batch("smolvlm")])
    assert value == pytest.approx(other, rel=1e-6)


def test_norms_of_a_family_have_no_weight_decay() -> None:
    learns = ("*layernorm.weight", "*.visual.*.norm1.weight", "*_model.layers.0.mlp.*")
    stage = make_stage("kl", learns)
    _, pair = make_objective("qwen3_vl", stage)
    parameters = pair.trainable_parameters()
    groups = build_optimiser(stage, parameters).param_groups
    decayed = {p for group in groups if group["weight_decay"] for p in group["params"]}
    found = {name for name, parameter in parameters.items() if parameter in decayed}
    assert found == {name for name in parameters if ".mlp." in name}
    assert len(found) == 3 < len(parameters)
