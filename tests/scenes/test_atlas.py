"""Atlases of photographs and cut-outs, and invalid ones."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from mmmamba_cli.errors import DataError
from mmmamba_evals.scenes.atlas import MAX_SPRITE_SIDE, merge_atlases, open_atlas, read_sprite
from mmmamba_evals.scenes.categories import SPLITS
from mmmamba_evals.scenes.renderer import render
from mmmamba_evals.scenes.sampling import DRAWS, ask_about_objects, available_categories
from mmmamba_evals.scenes.shipped import STYLES, shipped_atlas
from mmmamba_evals.scenes.world import EVERYTHING, make_world


def photograph() -> Image.Image:
    """A photograph from matplotlib."""
    matplotlib = pytest.importorskip("matplotlib")
    sample = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return Image.open(sample).convert("RGB")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """An atlas of nine crops of a photograph, with class names outside the table."""
    picture = photograph()
    width, height = picture.width // 3, picture.height // 3
    for number in range(9):
        x, y = number % 3 * width, number // 3 * height
        folder = tmp_path / "atlas" / f"strange_part_{'abcdefghi'[number]}"
        folder.mkdir(parents=True)
        picture.crop((x, y, x + width, y + height)).save(folder / "photo.jpg")
    return tmp_path / "atlas"


def save(folder: Path, image: Image.Image, name: str = "a.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name)
    return folder / name


def test_atlas_of_photographs(photographs: Path) -> None:
    atlas = open_atlas(photographs)
    world = make_world(atlas, fonts=(0, 1))
    assert set(world.themes) == {EVERYTHING}
    assert "strange part a" in world.classes
    for draw in [DRAWS[name] for name in available_categories(world)]:
        scene, asked = draw(Random(0), world)
        assert render(scene, atlas).size == (224, 224)
        assert {one.answer for one in asked} == {"Yes", "No"}
    for split in SPLITS:
        scene, asked = ask_about_objects(Random(1), world, split)
        assert any("strange part" in one.text for one in asked)
        assert len(scene.things) >= 3


def test_photograph_is_drawn_as_a_rectangle(photographs: Path) -> None:
    file = next(photographs.glob("*/photo.jpg"))
    pixels = read_sprite(file).pixels
    assert (pixels[..., 3] == 255).all()
    assert max(pixels.shape[:2]) == MAX_SPRITE_SIDE


def test_transparent_border_is_cropped(tmp_path: Path) -> None:
    image = Image.new("RGBA", (100, 60))
    image.paste((200, 0, 0, 255), (10, 20, 50, 50))
    pixels = read_sprite(save(tmp_path, image)).pixels
    assert pixels.shape == (30, 40, 4)
    assert (pixels == (200, 0, 0, 255)).all()


def test_palette_and_grey_alpha_pictures_are_read(tmp_path: Path) -> None:
    grey = Image.new("LA", (40, 40))
    grey.paste((90, 255), (0, 0, 30, 40))
    assert read_sprite(save(tmp_path, grey, "grey.png")).pixels.shape == (40, 30, 4)
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 10, 200, 10])
    palette.paste(0, (0, 0, 10, 40))
    palette.info["transparency"] = 0
    file = tmp_path / "palette.png"
    palette.save(file, transparency=0)
    assert read_sprite(file).pixels.shape == (40, 30, 4)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "has no class folders"),
        (lambda folder: (folder / "dog").mkdir(parents=True), "has no pictures for dog"),
        (lambda folder: save(folder / "dog", Image.new("RGB", (1, 1))), "shows 1 x 1 pixels"),
        (lambda folder: save(folder / "dog", Image.new("RGBA", (9, 9))), "is fully transparent"),
        (
            lambda folder: save(folder / "dog", Image.new("RGB", (20, 20))).write_bytes(b"no"),
            "is not in an image format",
        ),
    ],
)
def test_invalid_atlas(tmp_path: Path, prepare: object, message: str) -> None:
    prepare(tmp_path / "atlas")  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        open_atlas(tmp_path / "atlas")


def test_truncated_picture_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    file = save(tmp_path / "atlas" / "dog", Image.fromarray(noise))
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(DataError, match=r"dog/a\.png"):
        open_atlas(tmp_path / "atlas")


def test_too_few_classes(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        save(tmp_path / "atlas" / name, Image.new("RGB", (20, 20)))
    with pytest.raises(DataError, match="has 2 classes, at least 6 are needed"):
        make_world(open_atlas(tmp_path / "atlas"), ())


def test_questions_without_fonts_or_recolourable_classes(photographs: Path) -> None:
    for file in photographs.glob("*/photo.jpg"):
        Image.open(file).convert("L").save(file)
    world = make_world(open_atlas(photographs), ())
    assert available_categories(world) == ["existence", "count", "position"]


def test_merged_atlases() -> None:
    noto, fluent = (shipped_atlas(style) for style in STYLES)
    both = merge_atlases([noto, fluent])
    assert set(both.sprites) == set(noto.sprites) == set(fluent.sprites)
    assert all(len(drawings) == 2 for drawings in both.sprites.values())
    assert len({both.digest, noto.digest, fluent.digest}) == 3
    with pytest.raises(DataError, match="style apple does not ship"):
        shipped_atlas("apple")
