"""Every method finds the one layer in which a student differs from its teacher."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from planted_layer import LAYERS, planted_pair, planted_probe, random_batch
from small import IMAGE_ID
from small_distillation import RandomLoader

from mmmamba_cli.data import IGNORE_INDEX
from mmmamba_cli.distill.kl_loss import LogitsKL
from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.layer_selection.kl_trained import TrainedRestoration
from mmmamba_cli.layer_selection.kl_zero import RestoredAttention
from mmmamba_cli.layer_selection.layer_walk import LayerWalk
from mmmamba_cli.layer_selection.method import LayerMethod
from mmmamba_cli.layer_selection.mixer_error import MixerError
from mmmamba_cli.layer_selection.probe_samples import ProbeSamples, SampleSums, probe_batch_size
from mmmamba_cli.layer_selection.recall import ReplacedAttention
from mmmamba_cli.recipe import KL, Stage


def kl_stage(steps: int) -> Stage:
    return Stage(
        name="s",
        learns="new+qkv",
        loss="kl",
        inputs="student",
        steps=steps,
        batch_size=4,
        lr=1e-3,
        precision="fp32",
    )


def method_of(name: str, probe: ProbeSamples) -> LayerMethod:
    if name == "mse":
        return MixerError(probe)
    if name == "recall":
        return ReplacedAttention(probe)
    if name == "kl-zero":
        return RestoredAttention(probe, ())
    return TrainedRestoration(probe, (), kl_stage(3), RandomLoader(IMAGE_ID), 0)


@pytest.mark.parametrize("name", ["mse", "recall", "kl-zero", "kl"])
@pytest.mark.parametrize("planted", [1, 3])
def test_the_damaged_layer_has_the_highest_score(name: str, planted: int) -> None:
    method = method_of(name, planted_probe(planted, learns=name == "kl"))
    found = [method.measure(layer).mean() for layer in range(LAYERS)]
    others = [score for layer, score in enumerate(found) if layer != planted]
    assert found[planted] > 0.01 + max(others), found
    # Where nothing differs, there is nothing to gain.
    if name != "kl":
        assert max(map(abs, others)) < 1e-5


@pytest.mark.parametrize("name", ["mse", "recall", "kl-zero", "kl"])
def test_a_measurement_that_begins_later_has_the_same_scores(name: str) -> None:
    method = method_of(name, planted_probe(2, learns=name == "kl"))
    sums = [method.measure(layer).sums for layer in range(LAYERS)]
    later = method_of(name, planted_probe(2, learns=name == "kl"))
    for layer in (2, 3):
        assert torch.equal(later.measure(layer).sums, sums[layer])


def test_a_walk_has_the_output_of_the_model() -> None:
    probe = planted_probe(2)
    student = probe.pair.student
    walk = LayerWalk(probe, student.model, {})
    for layer in range(LAYERS):
        walk.advance_to(layer)
        for number, batch in enumerate(probe.batches):
            hidden = student.model(
                batch.input_ids, batch.pixel_values, batch.attention_mask, use_cache=False
            ).last_hidden_state
            real = batch.attention_mask
            assert real is not None
            torch.testing.assert_close(walk.output(number)[real], hidden[real])


def test_restored_attention_falls_by_the_whole_divergence() -> None:
    probe = planted_probe(1)
    method = RestoredAttention(probe, ())
    found = method.measure(1)
    loss = LogitsKL(KL(), 1.0)
    expected = sum(float(loss.loss_sums(probe.pair, one, None)) for one in probe.batches)
    assert float(found.sums.sum()) == pytest.approx(expected, rel=1e-5)
    assert float(found.units.sum()) == sum(one.num_tokens for one in probe.batches)
    # With attention there already, no other layer has anything to gain.
    rest = RestoredAttention(planted_probe(1), (1,))
    assert abs(rest.measure(2).mean()) < 1e-5


def test_columns_of_the_recipe_are_scored() -> None:
    """With `kl: {mask: answer}` in the recipe, columns that predict no answer do not count."""
    probe = replace(planted_probe(1), kl=KL(mask="answer"))
    found = RestoredAttention(probe, ()).measure(1)
    loss = LogitsKL(KL(mask="answer"), 1.0)
    expected = sum(float(loss.loss_sums(probe.pair, one, None)) for one in probe.batches)
    assert float(found.sums.sum()) == pytest.approx(expected, rel=1e-5)
    units = sum(int((one.labels[:, 1:] != IGNORE_INDEX).sum()) for one in probe.batches)
    assert float(found.units.sum()) == units < sum(one.num_tokens for one in probe.batches)


def test_a_training_leaves_the_student_as_it_was() -> None:
    probe = planted_probe(2, learns=True)
    before = {n: p.clone() for n, p in probe.pair.student.named_parameters()}
    method = method_of("kl", probe)
    method.measure(1)
    after = dict(probe.pair.student.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Without training both methods measure the same fall: the training has changed something.
    zero = RestoredAttention(planted_probe(2), ()).measure(2).mean()
    assert abs(method.measure(2).mean() - zero) > 1e-4


def test_recall_needs_questions_that_the_teacher_answers() -> None:
    pair = planted_pair(1)
    batch = random_batch(pair.teacher, 0, False)
    labels = batch.labels.clone()
    labels[labels >= 0] = (labels[labels >= 0] + 1) % IMAGE_ID
    unknown = type(batch)(**{**vars(batch), "labels": labels})
    with pytest.raises(DataError, match="answers none of the 4 questions"):
        ReplacedAttention(ProbeSamples(pair, (unknown,), 1.0))


def test_sums_of_samples_give_mean_halves_and_error() -> None:
    found = SampleSums(torch.tensor([4.0, 1, 6, 3]), torch.tensor([2.0, 1, 2, 1]))
    assert found.mean() == pytest.approx(14 / 6)
    assert found.halves() == (pytest.approx(10 / 4), pytest.approx(4 / 2))
    rest = torch.tensor([4.0, 1, 6, 3]) - 14 / 6 * torch.tensor([2.0, 1, 2, 1])
    assert found.standard_error() == pytest.approx(float((rest**2).sum() * 4 / 3) ** 0.5 / 6)
    with pytest.raises(MmmambaError, match="layer 7 has a score that is not finite"):
        SampleSums(torch.tensor([float("nan"), 1]), torch.ones(2)).check(7)
    with pytest.raises(DataError, match="nothing to score"):
        SampleSums(torch.ones(2), torch.tensor([1.0, 0.0])).check(0)


def test_batches_divide_the_samples() -> None:
    assert [probe_batch_size(n) for n in (2, 12, 128, 13)] == [2, 6, 8, 1]
