"""Losses give the same sums and gradients for any layout of a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import IMAGE_ID, SIDE, distance, prompt, small_model
from small_distillation import LEARNS, RandomLoader, batch_of, make_job, packed, padded, pair_of
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from mmmamba_cli.data import IGNORE_INDEX, Batch
from mmmamba_cli.data.generated_corpus import Drawings
from mmmamba_cli.distill.kl_loss import LogitsKL, divergence
from mmmamba_cli.distill.layer_losses import count_stack_tokens
from mmmamba_cli.distill.objective import LAYER_LOSSES, Objective, build_objective
from mmmamba_cli.distill.teacher_student import TeacherStudent
from mmmamba_cli.distill.trainable import trainable_names
from mmmamba_cli.distill.trainer import StepResult, train
from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.errors import RecipeError
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.ops.attention import varlen_metadata
from mmmamba_cli.recipe import KL, Stage

LOSSES = ("mixer-mse", "matrix-orientation", "hidden-alignment", "kl")
ROWS = RandomLoader(IMAGE_ID, batch_size=4).samples(0)


def stage(loss: str, **settings: Any) -> Stage:
    inputs = "student" if loss == "kl" else settings.pop("inputs", "teacher")
    learns = settings.pop("learns", LEARNS.get(loss, "new+qkv"))
    return Stage(
        name="s", learns=learns, loss=loss, inputs=inputs, steps=4, batch_size=4, lr=1e-3,
        **settings,
    )  # fmt: skip


def make_pair(plan: str = "mmmm", loss: str = "kl", **options: Any) -> TeacherStudent:
    """A random fp64 teacher, and a student of another seed with the same shared parameters."""
    teacher, student = small_model("a" * len(plan)), small_model(plan, seed=1, **options)
    shared = {n: t for n, t in teacher.state_dict().items() if ".mixer." not in n}
    student.load_state_dict(shared, strict=False)
    names = [name for name, _ in student.named_parameters()]
    learning = trainable_names(stage(loss), student.config, names)
    return pair_of(teacher.double(), student.double(), learning)


def gradients(
    objective: Objective, pair: TeacherStudent, batches: list[Batch]
) -> tuple[float, Tensor]:
    """The loss of the global batch of all `batches`, and its gradient as one vector."""
    parameters = pair.trainable_parameters()
    for parameter in parameters.values():
        parameter.grad = None
    units = torch.stack([objective.count_units(pair, batch) for batch in batches]).sum(0)
    weights = objective.term_weights(units)
    loss = sum((weights * objective.loss_sums(pair, batch, weights)).sum() for batch in batches)
    return float(loss), flat_gradient(pair)


def flat_gradient(pair: TeacherStudent) -> Tensor:
    parameters = pair.trainable_parameters().values()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@pytest.mark.parametrize("loss", LOSSES)
def test_layouts_agree(loss: str) -> None:
    pair = make_pair(loss=loss)
    objective = build_objective(stage(loss), pair.student.config, pair.trainable)
    alone, gradient = gradients(objective, pair, [batch_of(row[None]) for row in ROWS])
    ids, mask = padded(ROWS)
    layouts = {
        "padded": [batch_of(ids, mask=mask)],
        "packed": [packed(ROWS)],
        "in two parts": [packed(ROWS[:3]), packed(ROWS[3:])],
        "with an empty part": [
            packed(ROWS),
            batch_of(ids[:1, :2], mask=torch.zeros(1, 2, dtype=torch.bool), samples=0),
        ],
    }
    for name, batches in layouts.items():
        other, its_gradient = gradients(objective, pair, batches)
        assert other == pytest.approx(alone, rel=1e-10), name
        assert distance(its_gradient, gradient) < 1e-10, name


@pytest.mark.parametrize("shuffle", ["pre", "post"])
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_with_images_are_weighted_by_columns(loss: str, shuffle: str) -> None:
    teacher, student = small_model("aaaa", shuffle), small_model("mmmm", shuffle, seed=1)
    names = [name for name, _ in student.named_parameters()]
    learning = trainable_names(stage(loss), student.config, names)
    pair = pair_of(teacher.double(), student.double(), learning)
    objective = build_objective(stage(loss), student.config, pair.trainable)
    (one, pixels), (two, _) = prompt(2, 5), prompt(0, 9, seed=1)
    alone, gradient = gradients(objective, pair, [batch_of(one, pixels), batch_of(two)])
    ids, mask = padded([one[0], two[0]])
    together, its_gradient = gradients(objective, pair, [batch_of(ids, pixels, mask=mask)])
    assert together == pytest.approx(alone, rel=1e-10)
    assert distance(its_gradient, gradient) < 1e-10


@pytest.mark.parametrize("mask", ["all", "answer"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_divergence_against_plain_distributions(
    mask: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunked loss and its gradient match the definition over full logits, in fp64."""
    monkeypatch.setattr("mmmamba_cli.distill.kl_loss.LOGITS_PER_CHUNK", 96 * 3)
    pair = make_pair("amma")
    pair.teacher.double()
    pair.student.double()
    settings = KL(mask=mask, direction=direction, temperature=1.7, ce_weight=0.25)
    objective = LogitsKL(settings, scale=2.0)
    ids, labels = torch.stack([ROWS[0][:3], ROWS[1][:3]]), torch.full((2, 3), IGNORE_INDEX)
    labels[0, 2], labels[1, 1:] = ids[0, 2], ids[1, 1:]
    loss, gradient = gradients(objective, pair, [batch_of(ids, labels=labels)])

    for parameter in pair.trainable_parameters().values():
        parameter.grad = None
    theirs, ours = (m(ids, use_cache=False).logits for m in (pair.teacher, pair.student))
    p, q = (Categorical(logits=x / 1.7) for x in (theirs, ours))
    middle = Categorical(probs=(p.probs + q.probs) / 2)
    values = {
        "forward": lambda: kl_divergence(p, q),
        "reverse": lambda: kl_divergence(q, p),
        "jsd": lambda: (kl_divergence(p, middle) + kl_divergence(q, middle)) / 2,
    }[direction]() * 1.7**2
    scored = torch.ones(2, 3, dtype=torch.bool)
    if mask == "answer":
        scored = torch.tensor([[False, True, False], [True, True, False]])
    nll = torch.nn.functional.cross_entropy(
        ours[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )
    expected = 2.0 * (0.75 * values[scored].mean() + 0.25 * nll)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    assert distance(gradient, flat_gradient(pair)) < 1e-9


@pytest.mark.parametrize("shuffle", ["pre", "post"])
def test_segments_of_a_batch_are_not_recomputed(
    shuffle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both stacks use those of the batch, unless patches replace tokens."""
    computed = []

    def counted(*columns: Any) -> Any:
        computed.append(columns)
        return varlen_metadata(*columns)

    monkeypatch.setattr("mmmamba_cli.model.sequence_layout.varlen_metadata", counted)
    model = small_model("aaaa", shuffle)
    pair = pair_of(model, small_model("mmmm", shuffle), ())
    (one, pixels), (two, _) = prompt(2, 5), prompt(0, 9, seed=1)
    ids, mask = padded([one[0], two[0]])
    batch = batch_of(ids, pixels, mask=mask)
    plain = pair.prepare(batch)
    prepared = pair.prepare(replace(batch, varlen=varlen_metadata(mask, None)))
    for before, after in (
        (plain.embedding_layout, prepared.embedding_layout),
        (plain.language_layout, prepared.language_layout),
    ):
        computed.clear()
        expected = before.varlen(before.length)
        assert len(computed) == 1
        found = after.varlen(after.length)
        assert torch.equal(found.cu_seqlens, expected.cu_seqlens)
        assert found.max_seqlen == expected.max_seqlen
        again = after is prepared.embedding_layout and shuffle == "post"
        assert len(computed) == (2 if again else 1)
    part = prepared.language_layout.chunk(0, 3)
    assert torch.equal(part.varlen(3).cu_seqlens, varlen_metadata(mask[:, :3], None).cu_seqlens)


@pytest.mark.parametrize("shuffle", ["pre", "post"])
def test_tokens_are_counted_without_the_model(shuffle: str) -> None:
    """Equal to the columns of both stacks, for padded, packed and plain rows, with images."""
    pair = pair_of(small_model("aaaa", shuffle), small_model("mmmm", shuffle), ())
    (one, pixels), (two, _) = prompt(2, 5), prompt(0, 9, seed=1)
    ids, mask = padded([one[0], two[0]])
    for batch in (batch_of(ids, pixels, mask=mask), batch_of(one, pixels), packed(ROWS)):
        seen = pair.prepare(batch)
        rows = batch.input_ids.shape[0]
        expected = [
            rows * columns.length if columns.mask is None else int(columns.mask.sum())
            for columns in (seen.embedding_layout, seen.language_layout)
        ]
        assert list(count_stack_tokens(pair, batch)) == expected
        if batch.pixel_values is not None:
            # Of a generated corpus: its pictures are not drawn yet.
            undrawn = replace(batch, pixel_values=None, drawings=Drawings(None, 2, SIDE))
            assert list(count_stack_tokens(pair, undrawn)) == expected


def test_paper_reduction_divides_by_samples() -> None:
    pair = make_pair()
    token = LogitsKL(KL(), 1.0)
    paper = LogitsKL(KL(reduction="paper"), 1.0)
    batch = packed(ROWS)
    mean, _ = gradients(token, pair, [batch])
    summed, _ = gradients(paper, pair, [batch])
    assert summed == pytest.approx(mean * batch.num_tokens / 4, rel=1e-6)


def test_a_divergence_of_equal_logits_is_zero() -> None:
    logits = torch.randn(5, 7)
    for direction in ("forward", "reverse", "jsd"):
        assert divergence(logits, logits, direction, 0.5).abs().max() < 1e-6


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_hidden_states_of_teacher_or_student(inputs: str) -> None:
    """The loss of the last layer matches mixers run by hand on full forward passes."""
    pair = make_pair()
    settings = stage("mixer-mse", inputs=inputs)
    objective = build_objective(settings, pair.student.config, pair.trainable)
    batch = batch_of(ROWS[0][None])
    source = pair.teacher if inputs == "teacher" else pair.student
    seen: list[tuple[Tensor, SequenceLayout]] = []
    mixer = source.model.layers[3].mixer
    handle = mixer.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    source(batch.input_ids, use_cache=False)
    handle.remove()
    outputs = [m.model.layers[3].mixer.mix(*seen[0]) for m in (pair.teacher, pair.student)]
    expected = (outputs[0] - outputs[1]).square().sum()
    assert objective.loss_sums(pair, batch, None)[3] == pytest.approx(expected.item(), rel=1e-6)


def test_attention_layers_of_a_hybrid_have_no_loss() -> None:
    pair = make_pair("mama")
    objective = build_objective(stage("mixer-mse"), pair.student.config, pair.trainable)
    assert objective.terms == ("layer 0", "layer 2")
    gradients(objective, pair, [batch_of(ROWS[0][None])])


@pytest.mark.parametrize("loss", LAYER_LOSSES)
@pytest.mark.parametrize(
    ("plan", "options"),
    [
        ("mmam", {"d_skip": True, "qk_norm": True}),
        ("mdag", {"input_step": False, "qk_norm": True, "rope": True}),
        ("wkaw", {"window": 4, "sink_logits": True}),
    ],
)
def test_a_loss_depends_on_its_declared_parameters(
    loss: str, plan: str, options: dict[str, Any]
) -> None:
    """A parameter has a nonzero gradient exactly if the loss depends on it."""
    pair = make_pair(plan, "hidden-alignment", **options)
    objective = build_objective(stage("hidden-alignment"), pair.student.config, pair.trainable)
    objective = replace(objective, loss=LAYER_LOSSES[loss])
    pair = replace(pair, trainable=tuple(name for name, _ in pair.student.named_parameters()))
    pair.student.requires_grad_()
    gradients(objective, pair, [batch_of(ROWS[0][None])])
    for name, parameter in pair.student.named_parameters():
        gradient = parameter.grad
        assert objective.depends_on(name) == (gradient is not None and bool(gradient.any())), name
        if gradient is not None and objective.depends_on(name):
            assert objective.depends_on_part_of(name) == bool((gradient == 0).any()), name


@pytest.mark.parametrize(
    ("loss", "learns", "named"),
    [
        ("matrix-orientation", "new+qkv", r"model\.layers\.0\.mixer\.D and 15 more"),
        ("mixer-mse", ("*.mixer.*",), r"model\.layers\.0\.mixer\.o_proj\.weight and 3 more"),
        ("hidden-alignment", ("*.q_proj.*", "lm_head.weight"), r"lm_head\.weight;"),
    ],
)
def test_trainable_parameters_without_gradient_are_refused(
    loss: str, learns: Any, named: str
) -> None:
    config = small_model("mmmm", d_skip=True).config
    names = [name for name, _ in small_model("mmmm", d_skip=True).named_parameters()]
    settings = stage(loss, learns=learns)
    learning = trainable_names(settings, config, names)
    expected = rf"^stages\.s\.learns: loss {loss} does not depend on {named}"
    with pytest.raises(RecipeError, match=expected) as caught:
        build_objective(settings, config, learning)
    hint = str(caught.value.hint)
    assert hint.startswith("--set 'stages.s.learns=[*.")
    patterns = tuple(hint.partition("=[")[2].removesuffix("]'").split(", "))
    settings = stage(loss, learns=patterns)
    build_objective(settings, config, trainable_names(settings, config, names))


def test_suggested_patterns_hold_for_several_mixers() -> None:
    model = small_model("amkw", sink_logits=True)
    names = [name for name, _ in model.named_parameters()]
    settings = stage("matrix-orientation", learns="new+qkv")
    learning = trainable_names(settings, model.config, names)
    with pytest.raises(RecipeError, match="does not depend on") as caught:
        build_objective(settings, model.config, learning)
    patterns = str(caught.value.hint).partition("=[")[2].removesuffix("]'").split(", ")
    assert {"*.mixer.conv1d.weight", "*.mixer.sink_logits"} < set(patterns)
    # Layer 0 is attention, whose projections do not learn.
    assert "model.layers.1.mixer.q_proj.weight" in patterns
    settings = stage("matrix-orientation", learns=tuple(patterns))
    found = trainable_names(settings, model.config, names)
    assert build_objective(settings, model.config, found).layers == (1, 2, 3)


def test_channels_without_a_gradient_are_not_decayed(tmp_path: Path) -> None:
    """Matrix orientation does not depend on the value channels of the convolution."""
    job = make_job(tmp_path, "matrix-orientation", steps=5, lr=0.1)
    mixer = job.pair.student.model.layers[1].mixer
    before = mixer.conv1d.weight.detach().clone()
    train(job, Progress(), lambda result: None, lambda: False)
    values = slice(0, mixer.kv_width)
    assert torch.equal(mixer.conv1d.weight[values], before[values])
    assert not torch.equal(mixer.conv1d.weight, before)


def test_a_trainable_vision_part_without_images(tmp_path: Path) -> None:
    """A step without images changes nothing, but counts as a step."""
    job = make_job(tmp_path, "kl", steps=2, learns=("model.vision.*",))
    before = {n: p.detach().clone() for n, p in job.pair.trainable_parameters().items()}
    results: list[StepResult] = []
    train(job, Progress(), results.append, lambda: False)
    assert [result.gradient_norm for result in results] == [0.0, 0.0]
    assert results[-1].skipped is None
    after = job.pair.trainable_parameters()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_layer_losses_refuse_trainable_attention() -> None:
    pair = make_pair("mama")
    names = [name for name, _ in pair.student.named_parameters()]
    settings = stage("mixer-mse", learns=("*.mixer.q_proj.weight",))
    learning = trainable_names(settings, pair.student.config, names)
    with pytest.raises(RecipeError, match=r"model\.layers\.1\.mixer\.q_proj\.weight and 1 more"):
        build_objective(settings, pair.student.config, learning)


@pytest.mark.parametrize("loss", ["mixer-mse", "matrix-orientation", "hidden-alignment"])
def test_no_gradient_crosses_layers(loss: str) -> None:
    """The gradient of a layer does not depend on the other layers of the student."""
    pair = make_pair(loss=loss)
    objective = build_objective(stage(loss), pair.student.config, pair.trainable)
    gradients(objective, pair, [batch_of(ROWS[0][None])])
    before = pair.student.model.layers[2].mixer.k_proj.weight.grad.clone()
    with torch.no_grad():
        for layer in (0, 1, 3):
            pair.student.model.layers[layer].mixer.k_proj.weight.mul_(2)
    gradients(objective, pair, [batch_of(ROWS[0][None])])
    assert torch.equal(pair.student.model.layers[2].mixer.k_proj.weight.grad, before)


@pytest.mark.parametrize("options", [{}, {"rope": True, "qk_norm": True}])
@torch.no_grad()
def test_mixing_matrices_mix_as_the_mixers_do(options: dict[str, bool]) -> None:
    """Matrix times values is the read-out, padding and packing included."""
    model = small_model("am", **options)
    ids, mask = padded([torch.cat(ROWS[:2]), ROWS[2]])
    seq_idx = torch.zeros_like(ids)
    seq_idx[0, len(ROWS[0]) :] = 1
    # Padding within a row is between its tokens: it must not decay what passes over it.
    within = torch.zeros_like(mask)
    within[:, 1] = True
    mask = mask & ~within
    columns = model.model.prepare(ids, attention_mask=mask, seq_idx=seq_idx).language_layout
    hidden = torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(0))
    attention, mamba = model.model.layers[0].mixer, model.model.layers[1].mixer
    _, _, v = attention.queries_keys_values(hidden, columns)
    mixed = read_out(attention.mixing_matrix(hidden, columns), v).flatten(2)
    assert distance(mixed[mask], attention.mix(hidden, columns)[mask]) < 1e-5
    v, _, _, _ = mamba.values_keys_queries(hidden, columns)
    y = read_out(mamba.mixing_matrix(hidden, columns), v)
    # The scan's own read-out is what the mixer gives to its gated norm.
    seen: list[Tensor] = []
    mamba.g_norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    mamba.mix(hidden, columns)
    assert distance(y[mask], seen[0][mask]) < 1e-5


def read_out(matrix: Tensor, v: Tensor) -> Tensor:
    groups = matrix.shape[1] // v.shape[2]
    return torch.einsum("bhts,bshp->bthp", matrix, v.repeat_interleave(groups, dim=2))
