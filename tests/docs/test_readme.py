"""README.md: its pictures, its numbers and its example are those of today's files."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import make_readme_pictures
import numpy as np
import pytest
import run_page
from pages import ROOT
from PIL import Image

from mmmamba_cli.reporting.crossing import round_context

README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = " ".join(README.split())
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def figures() -> make_readme_pictures.Figures:
    return make_readme_pictures.read_figures()


@pytest.mark.parametrize("theme", make_readme_pictures.PICTURES)
def test_the_pictures_hold_the_measured_figures(
    theme: str, figures: make_readme_pictures.Figures
) -> None:
    stored = ElementTree.parse(make_readme_pictures.PICTURES[theme]).getroot()
    found = stored.find(f"{SVG}metadata")
    assert found is not None
    assert found.text == figures.as_json(), f"run `{make_readme_pictures.COMMAND}`"
    drawn = ElementTree.fromstring(make_readme_pictures.picture(figures, theme))
    assert stored.get("aria-label") == drawn.get("aria-label")
    texts = [one.text for one in drawn.iter(f"{SVG}text")]
    assert {"98.5", "99.0 %", "linear faster from 2,300"} <= set(texts)
    # The files may be older than the layout, not than the numbers.
    assert set(texts) == {one.text for one in stored.iter(f"{SVG}text")}


def test_the_numbers_of_the_first_screen(figures: make_readme_pictures.Figures) -> None:
    for model, sentence in (
        ("linear", "keeps {} of the teacher's score, and {} on drawings"),
        ("hybrid", "the hybrid {} and {}."),
    ):
        shares = [figures.kept[suite][model] for suite in make_readme_pictures.SUITES]
        kept = [f"{share:.1f} % ({low:.1f} to {high:.1f})" for share, low, high in shares]
        assert sentence.format(*kept) in WORDS
    measured = json.loads((make_readme_pictures.RESULTS / make_readme_pictures.SCORES).read_text())
    counting = {
        result["model"]["name"]: result["rules"][0]["metrics"]["count"]
        for result in measured["results"]
        if result["suite"] == "scenes-unseen"
    }
    shares = [
        100 * counting[f"scenes-{name}"] / counting["teacher"] for name in ("linear", "hybrid")
    ]
    assert f"weakest category, with {shares[0]:.1f} and {shares[1]:.1f} %" in WORDS
    linear, hybrid = (round_context(figures.crossings[name]) for name in ("linear", "hybrid"))
    assert f"faster from about {linear} tokens" in WORDS
    assert f"the hybrid from about {hybrid};" in WORDS


def test_the_speeds_at_the_size_of_hovle() -> None:
    file = ROOT / "benchmarks" / "results" / "decode_mixers_h200.json"
    rows = {row["what"]: row["value"] for row in json.loads(file.read_text())["rows"]}

    def cost(model: str) -> str:
        time, memory = (rows[f"{what} at 103,424: {model}"] for what in ("a token", "memory"))
        return f"{time:.2f} ms and {memory:.1f} GiB"

    assert f"takes a linear student {cost('linear')}," in WORDS
    assert f"with the same decoder, {cost('teacher tuned')}" in WORDS


def test_the_picture_of_the_example() -> None:
    stored, drawn = (
        np.asarray(picture.convert("RGB"), dtype=int)
        for picture in (Image.open(make_readme_pictures.SCENE), make_readme_pictures.scene())
    )
    # Versions of Pillow round differently.
    assert stored.shape == drawn.shape
    assert np.abs(stored - drawn).mean() < 1


def test_the_example_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (fence for fence in run_page.fences(README) if fence.mark == "python")
    assert len(example.text.splitlines()) <= 11
    exec(compile(example.text, "README.md", "exec"), {})
    printed = capsys.readouterr().out.split()
    assert WORDS.count(f"It prints {' and '.join(f'`{word}`' for word in printed)}.") == 1
