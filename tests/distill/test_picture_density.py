"""Weights of layer losses by the density of pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from in_place_distillation import make_batch, make_objective, make_stage
from small import distance, prompt, small_model
from small_distillation import batch_of, padded, pair_of
from test_in_place_losses import record
from test_objectives import gradients, stage

from mmmamba_cli.distill.objective import build_objective
from mmmamba_cli.distill.picture_density import density_weights, patch_density
from mmmamba_cli.distill.trainable import trainable_names
from mmmamba_cli.errors import RecipeError
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.recipe import Stage
from mmmamba_cli.teachers.anatomy import text_decoder
from mmmamba_cli.teachers.picture_grids import picture_grids, picture_token_id

# A picture of two rows and columns: three tokens alike, and one at a right angle to them.
PICTURE = [[1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 3.0]]
# 1 - cos to the neighbours: (0 + 0) / 2, (0 + 1) / 2, (0 + 1) / 2, (1 + 1) / 2.
DENSITY = [0.0, 0.5, 0.5, 1.0]
# Their mean is 1/2, so a weight is 1/2 + d.
WEIGHTS = [0.5, 1.0, 1.0, 1.5]


def test_a_picture_by_hand() -> None:
    features = torch.tensor(PICTURE).view(1, 2, 2, 2)
    assert patch_density(features).flatten().tolist() == pytest.approx(DENSITY)
    # A text token on each side, and a second row of text.
    hidden = torch.ones(2, 6, 2)
    hidden[0, 1:5] = torch.tensor(PICTURE)
    grid = torch.tensor([[[1, 2], [3, 4]]])
    weights = density_weights(hidden, [grid], None)
    assert weights[0].tolist() == pytest.approx([1.0, *WEIGHTS, 1.0])
    assert weights[1].tolist() == [1.0] * 6


def test_a_picture_of_one_colour_and_a_single_token_weigh_one() -> None:
    hidden = torch.ones(1, 6, 3)
    grids = [torch.tensor([[[0, 1], [2, 3]]]), torch.tensor([[[5]]])]
    assert density_weights(hidden, grids, None).tolist() == [[1.0] * 6]


def test_pictures_of_a_conversation_share_a_mean_and_packed_ones_do_not() -> None:
    """A blank tile beside the picture of `PICTURE` halves the mean of the conversation."""
    hidden = torch.ones(1, 8, 2)
    hidden[0, :4] = torch.tensor(PICTURE)
    grids = [torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])]
    together = density_weights(hidden, grids, None)[0].tolist()
    assert together == pytest.approx([0.5, 1.5, 1.5, 2.5, 0.5, 0.5, 0.5, 0.5])
    seq_idx = torch.tensor([[0] * 4 + [1] * 4])
    assert density_weights(hidden, grids, seq_idx)[0].tolist() == pytest.approx(
        [*WEIGHTS, *[1] * 4]
    )


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.pictures])
def test_grids_cover_the_image_tokens_of_each_family(name: str) -> None:
    config, inputs = FAMILIES[name].config(), make_batch(name).inputs
    grids = picture_grids(config, inputs)
    columns = torch.cat([grid.flatten() for grid in grids]).tolist()
    image = (inputs["input_ids"] == picture_token_id(config)).flatten().nonzero().flatten()
    assert sorted(columns) == image.tolist() and len(set(columns)) == len(columns)
    sizes = {tuple(grid.shape[1:]) for grid in grids}
    if name != "llava_onevision":
        # Neighbours above and below, in every family but that of lines that end with a token.
        assert all(min(size) > 1 for size in sizes), sizes
    if name == "qwen3_vl":
        # Rows of patches, two of which are merged.
        thw = inputs["image_grid_thw"].tolist()
        assert sizes == {(rows // 2, width // 2) for _, rows, width in thw}


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_a_weighted_loss_equals_a_transcription(inputs: str) -> None:
    """Of the running model's pictures, whose grid Qwen3-VL gives, by plain loops."""
    batch = make_batch("qwen3_vl")
    objective, pair = make_objective(
        "qwen3_vl", make_stage("mixer-mse", loss_weights="density", inputs=inputs), linear=(0,)
    )
    value = objective.loss_sums(pair, batch, None)
    layer = record(pair, batch)[0]
    mask = batch.inputs["attention_mask"].bool()
    weights = torch.ones(mask.shape, dtype=torch.float64)
    image = batch.inputs["input_ids"] == picture_token_id(pair.teacher.config)
    unit = layer["hidden"] / layer["hidden"].norm(dim=-1, keepdim=True)
    for row, (_, high, wide) in enumerate(batch.inputs["image_grid_thw"].tolist()):
        high, wide = high // 2, wide // 2
        places = image[row].nonzero().flatten().tolist()
        found: list[float] = []
        for y in range(high):
            for x in range(wide):
                sides = ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
                near = [b * wide + a for b, a in sides if 0 <= b < high and 0 <= a < wide]
                cos = [float(unit[row, places[y * wide + x]] @ unit[row, places[n]]) for n in near]
                found.append(1 - sum(cos) / len(cos))
        mean = sum(found) / len(found)
        for place, density in zip(places, found, strict=True):
            weights[row, place] = 0.5 + density / (2 * mean)
    assert weights.min() < 0.95 and weights.max() > 1.05
    mixer: Any = text_decoder(pair.student).layers[0].self_attn
    empty = layer["normed"].new_empty(1, mask.shape[1], 0)
    columns = SequenceLayout(empty, empty, 0, mask, None, mask)
    with torch.no_grad():
        errors = (mixer.mix(layer["normed"], columns) - layer["mixed"]).square().sum(-1)
    expected = float((errors * weights)[mask].sum())
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert float(errors[mask].sum()) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("shuffle", ["pre", "post"])
@pytest.mark.parametrize("loss", ["mixer-mse", "matrix-orientation", "hidden-alignment"])
def test_weights_do_not_depend_on_the_batch(loss: str, shuffle: str) -> None:
    teacher, student = small_model("aaaa", shuffle), small_model("mmmm", shuffle, seed=1)
    names = [name for name, _ in student.named_parameters()]
    weighted = stage(loss, loss_weights="density")
    pair = pair_of(
        teacher.double(), student.double(), trainable_names(weighted, student.config, names)
    )
    objective = build_objective(weighted, student.config, pair.trainable)
    (one, pixels), (two, _) = prompt(2, 5), prompt(0, 9, seed=1)
    alone, gradient = gradients(objective, pair, [batch_of(one, pixels), batch_of(two)])
    ids, mask = padded([one[0], two[0]])
    together, its_gradient = gradients(objective, pair, [batch_of(ids, pixels, mask=mask)])
    assert together == pytest.approx(alone, rel=1e-10)
    assert distance(its_gradient, gradient) < 1e-10
    plain = build_objective(stage(loss), student.config, pair.trainable)
    assert gradients(plain, pair, [batch_of(one, pixels)])[0] != pytest.approx(
        gradients(objective, pair, [batch_of(one, pixels)])[0], rel=1e-6
    )


def test_wrong_places_are_refused() -> None:
    with pytest.raises(ValueError, match="is density, must be none or left out: the loss is kl"):
        Stage(
            name="s", learns="new", loss="kl", inputs="student", steps=1, batch_size=1, lr=1e-3,
            loss_weights="density",
        )  # fmt: skip
    weighted = stage("mixer-mse", loss_weights="density")
    config = small_model("mm").config
    config.vision_config = None
    with pytest.raises(RecipeError, match="and the student reads text only"):
        build_objective(weighted, config, ["model.layers.0.mixer.A_log"])
