"""Rendering: no overlaps, named colours, and agreement of both renderers."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFont

from mmmamba_cli.errors import DataError
from mmmamba_evals.scenes import fonts
from mmmamba_evals.scenes.atlas import Atlas
from mmmamba_evals.scenes.augmentation import Augmentation
from mmmamba_evals.scenes.batch_renderer import BatchRenderer, SceneEncoder
from mmmamba_evals.scenes.composition import MIN_CONTRAST, Content, brightness, compose
from mmmamba_evals.scenes.hues import dominant_hue, to_hsv, to_rgb, turn_hue
from mmmamba_evals.scenes.layout import MIN_GAP, overlap, place_boxes
from mmmamba_evals.scenes.lessons import draw_lesson
from mmmamba_evals.scenes.renderer import contact_sheet, draw_background, render
from mmmamba_evals.scenes.scene import Background, Scene
from mmmamba_evals.scenes.world import COLOURS, World


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.floats(20, 100), min_size=1, max_size=9),
)
def test_boxes_do_not_overlap(seed: int, sizes: list[float]) -> None:
    boxes = place_boxes(Random(seed), [(size, size) for size in sizes], 224, 224)
    for i, (x, y, w, h) in enumerate(boxes):
        assert w / 2 <= x <= 224 - w / 2
        assert h / 2 <= y <= 224 - h / 2
        assert not any(overlap(boxes[i], other) for other in boxes[:i])
        assert w <= sizes[i]


def test_boxes_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="5000 things do not fit into a picture of 50 x 50"):
        place_boxes(Random(0), [(40, 40)] * 5000, 50, 50)


def test_overlap_counts_the_gap() -> None:
    box = (50.0, 50.0, 20.0, 20.0)
    assert overlap(box, (70.0 + MIN_GAP - 0.1, 50.0, 20.0, 20.0))
    assert not overlap(box, (70.0 + MIN_GAP, 50.0, 20.0, 20.0))


def test_things_do_not_overlap(world: World, atlas: Atlas) -> None:
    white = Background("flat", (255, 255, 255), (255, 255, 255))
    for number in range(12):
        scene = draw_lesson(Random(number), world)[0]
        covered = np.zeros((scene.height, scene.width), int)
        for thing in scene.things:
            alone = Scene(scene.width, scene.height, white, (thing,))
            changed = (np.asarray(render(alone, atlas)) != 255).any(-1)
            assert changed.any()
            covered += changed
        for one in scene.letterings:
            word = replace(scene, background=white, things=(), letterings=(one,))
            covered += (np.asarray(render(word, atlas)) != 255).any(-1)
        assert covered.max() == 1


def test_recoloured_thing_has_the_named_hue(world: World, atlas: Atlas) -> None:
    white = Background("flat", (255, 255, 255), (255, 255, 255))
    rng = Random(3)
    for name in world.colourable:
        for colour, hue in COLOURS.items():
            scene = compose(rng, world, [Content(name, 1, colour)])
            pixels = np.asarray(render(replace(scene, background=white), atlas)) / 255
            hsv = to_hsv(pixels[(pixels < 1).any(-1)])
            vivid = hsv[(hsv[:, 1] >= 0.45) & (hsv[:, 2] >= 0.5), 0]
            apart = np.abs((vivid - hue + 0.5) % 1 - 0.5) * 360
            assert np.median(apart) < 7, (name, colour)
            assert (apart < 20).mean() > 0.75, (name, colour)


def test_words_do_not_depend_on_raqm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def drawn() -> list[bytes]:
        fonts._load.cache_clear()
        words = ("AVATAR", "office", "Toffee")
        return [
            fonts.word_mask(word, font).tobytes()
            for font in range(len(fonts.all_fonts()))
            for word in words
        ]

    here = drawn()
    monkeypatch.setattr(ImageFont.core, "HAVE_RAQM", False)
    assert drawn() == here


def test_words_have_contrast(world: World) -> None:
    for number in range(60):
        scene = compose(Random(number), world, [Content("apple")], [world.words[number]])
        (lettering,) = scene.letterings
        ground = scene.background
        behind = (brightness(ground.first) + brightness(ground.second)) / 2
        assert abs(brightness(lettering.colour) - behind) >= MIN_CONTRAST


def test_hsv_round_trip() -> None:
    rgb = np.random.default_rng(0).random((500, 3))
    assert np.allclose(to_rgb(to_hsv(rgb)), rgb, atol=1e-12)
    assert np.allclose(turn_hue(np.array([[1.0, 0, 0]]), 1 / 3), [[0, 1, 0]], atol=1e-12)
    assert np.allclose(to_hsv(np.array([[0.2, 0.2, 0.2]])), [[0, 0, 0.2]])


def test_greys_browns_and_mixed_colours_have_no_hue() -> None:
    def plain(*colour: int) -> np.ndarray:
        return np.full((8, 8, 4), (*colour, 255), np.uint8)

    assert dominant_hue(plain(200, 20, 20)) == pytest.approx(0.0, abs=0.01)
    assert dominant_hue(plain(120, 120, 120)) is None
    assert dominant_hue(plain(110, 60, 20)) is None
    motley = plain(200, 20, 20)
    motley[:4, :, :3] = (20, 20, 220)
    assert dominant_hue(motley) is None
    nothing = plain(200, 20, 20)
    nothing[..., 3] = 0
    assert dominant_hue(nothing) is None


def test_backgrounds_follow_their_formula() -> None:
    ramp = draw_background(Background("gradient", (0, 0, 0), (200, 100, 50), 0.0), 8, 4)
    assert np.allclose(ramp[2, :, 0], np.arange(8) / 8 * 200)
    wave = draw_background(Background("texture", (0, 0, 0), (255, 255, 255), 0.0, 1.0), 8, 8)
    assert wave[0, 0, 0] == pytest.approx(127.5)
    assert wave[2, 2, 0] == pytest.approx(255)


def test_batch_renderer_matches_reference(world: World, atlas: Atlas) -> None:
    scenes = [draw_lesson(Random(number), world)[0] for number in range(16)]
    layouter = SceneEncoder(atlas, world)
    drawn = BatchRenderer(layouter, "cpu").draw(layouter.layouts(scenes, 7))
    for scene, ours in zip(scenes, drawn, strict=True):
        reference = np.asarray(render(scene, atlas)).astype(float)
        difference = np.abs(ours.permute(1, 2, 0).numpy() * 255 - reference)
        # Interpolation differs at edges, mostly of words; a misplaced, rotated or missing thing
        # differs by far more.
        assert difference.mean() < 3.0
        assert (difference.max(-1) > 80).mean() < 0.006 * (1 + len(scene.letterings))


def test_scene_in_a_batch_equals_scene_alone(world: World, atlas: Atlas) -> None:
    scenes = [draw_lesson(Random(number), world)[0] for number in range(6)]
    layouter = SceneEncoder(atlas, world)
    composer = BatchRenderer(layouter, "cpu")
    together = composer.draw(layouter.layouts(scenes, 7))
    alone = [composer.draw(layouter.layouts([scene], 9))[0] for scene in scenes]
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)


def test_augmentation_is_deterministic(world: World, atlas: Atlas) -> None:
    scenes = [draw_lesson(Random(number), world)[0] for number in range(3)]
    layouter = SceneEncoder(atlas, world)
    composer, layouts = BatchRenderer(layouter, "cpu"), layouter.layouts(scenes, 7)

    def draw(seed: int) -> torch.Tensor:
        return composer.draw(layouts, Augmentation(), torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert (draw(1) - composer.draw(layouts)).abs().mean() > 0.01
    assert (draw(1) - composer.draw(layouts)).abs().mean() < 0.15


def test_contact_sheet_has_all_pictures(world: World, atlas: Atlas) -> None:
    pictures = [render(draw_lesson(Random(i), world)[0], atlas) for i in range(5)]
    sheet = contact_sheet(pictures, 3)
    assert sheet.size == (3 * 226, 2 * 226)
    assert sheet.crop((226, 226, 226 + 224, 226 + 224)).tobytes() == pictures[4].tobytes()
