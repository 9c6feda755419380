"""The section of a report on stability, its charts, and the files of one model."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from report_case import HOSTILE, Balanced, product, write_run

from mmmamba_cli.reporting import build_page, read_report_data, write_stability_pictures
from mmmamba_cli.reporting.stability import half_life_chart, joined_blocks
from mmmamba_cli.reporting.strip_chart import Strip, strips
from mmmamba_cli.stability import (
    STABILITY,
    STABILITY_FILE,
    DeviationRecord,
    HeadDecay,
    LayerStability,
    PrecisionRecord,
    StabilityRecord,
)


def head(exponent: float, start: float | None = None) -> HeadDecay:
    return HeadDecay(
        exponent=exponent,
        certified=-1e-6,
        gain=10.0,
        state_bound=2.0,
        start=start,
        read_out_median=0.5,
        read_out_smallest=0.1,
    )


def stability(name: str, content_hash: str | None) -> StabilityRecord:
    layers = (
        LayerStability(layer=0, mixer=HOSTILE, decay=None, forgetting="keeps everything"),
        LayerStability(
            layer=1, mixer="Mamba-2", decay="exact", heads=(head(-0.1, -0.2), head(-0.01))
        ),
    )
    precision = PrecisionRecord(
        dtype="bf16",
        spans=(
            {
                "begin": 0,
                "end": 640,
                "mean_kl": 1e-4,
                "largest_kl": 1e-3,
                "largest_difference": 0.1,
                "same_top1": 0.99,
            },
        ),
        slope=None,
        median_kl=1e-4,
        spikes=0,
        top1_changes=6,
        top1_changes_at_spikes=0,
        block_kl=tuple(1e-4 * (i + 1) for i in range(10)),
    )
    deviation = DeviationRecord(
        what="state",
        size=1e-3,
        tokens=(1, 2, 4),
        layers={1: (1e-3, 1e-4, 0.0)},
        logits=(0.1, 0.05, 0.0),
        predicted=(1e-3, 1e-4, 1e-30),
    )
    return StabilityRecord(
        name=name,
        content_hash=content_hash,
        text="a text",
        tokens=640,
        created="2026-11-30T00:00:00",
        device="cpu",
        versions={},
        seed=0,
        layers=layers,
        low_read_out=0.03,
        precision=precision,
        deviations=(deviation,),
    )


def place(run: Path, record: StabilityRecord) -> Path:
    file = run / STABILITY / record.name / STABILITY_FILE
    file.parent.mkdir(parents=True)
    file.write_text(record.model_dump_json(), encoding="utf-8")
    return file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", [product("seed", 1), product("stage1", 2, "seed", "stage1")])


def content_hash(run: Path, name: str) -> str:
    return read_report_data(run).main.products[name].content_hash


def test_a_page_shows_the_models_that_were_measured(run: Path) -> None:
    assert "stability" not in build_page(read_report_data(run), created="now").shown
    place(run, stability("stage1", content_hash(run, "stage1")))
    place(run, stability("teacher", "t" * 64))
    report = read_report_data(run)
    assert list(report.main.stability) == ["teacher", "stage1"]
    page = build_page(report, created="now")
    assert "stability" in page.shown
    found = Balanced(page.html)
    assert "stage1, 640 tokens of a text, 2026-11-30" in found.text
    assert "Layer 1 remembers longest" in found.text
    assert "stage1: states off once by 0.001 of their norm" in found.text
    assert "<script" not in page.html
    pictures = [one["aria-label"] or "" for one in found.all("svg") if "aria-label" in one]
    assert any("layer 0: <script>" in text and "layer 1: 6.9 to 69" in text for text in pictures)
    assert any(text.startswith("KL from fp32.") for text in pictures)


def test_results_of_other_weights_and_damaged_ones_are_left_out(run: Path) -> None:
    place(run, stability("stage1", "0" * 64))
    place(run, stability("seed", None)).write_text("{", encoding="utf-8")
    report = read_report_data(run)
    assert not report.main.stability
    remarks = " ".join(report.remarks)
    assert "stage1 was made again after its stability was measured" in remarks
    assert "stability.json is not valid JSON" in remarks
    assert "stability" not in build_page(report, created="now").shown


def test_half_lives_have_a_dot_for_each_head() -> None:
    root = ET.fromstring(half_life_chart("x", stability("x", None)))
    dots = root.findall(".//circle")
    # Two heads, and the start of one.
    assert sorted("hollow" in dot.attrib["class"] for dot in dots) == [False, False, True]
    filled = [float(dot.attrib["cx"]) for dot in dots if "hollow" not in dot.attrib["class"]]
    (start,) = (float(dot.attrib["cx"]) for dot in dots if "hollow" in dot.attrib["class"])
    # Half-lives of 6.9 and 69 tokens, and of 3.5 at the start: a decade is as long as another.
    assert start < filled[0] < filled[1]
    assert (filled[1] - filled[0]) == pytest.approx(3.32 * (filled[0] - start), rel=0.02)


def test_strips_leave_out_what_has_no_place() -> None:
    rows = [Strip("a", (1.0, float("inf"))), Strip("b", (), note="none")]
    root = ET.fromstring(strips("t", rows, x_name="x", series=0))
    assert len(root.findall(".//circle")) == 1
    with pytest.raises(ValueError, match="nothing to draw"):
        strips("t", [Strip("a", (float("inf"),))], x_name="x", series=0)


def test_blocks_are_joined_more_at_later_positions() -> None:
    points = joined_blocks([1.0] * 3 + [2.0] * 97)
    assert points[:3] == [(32.0, 1.0), (96.0, 1.0), (160.0, 1.0)]
    assert len(points) < 25
    positions = [position for position, _ in points]
    assert positions == sorted(set(positions))
    assert points[-1][1] == 2.0


def test_pictures_of_one_model(tmp_path: Path) -> None:
    write_stability_pictures(tmp_path, stability("x", None))
    names = ["deviation-state.svg", "half-lives.svg", "precision.svg"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    for name in names:
        ET.parse(tmp_path / name)
    root = ET.parse(tmp_path / "deviation-state.svg").getroot()
    assert "layer 1, predicted" in [
        text.text for text in root.iter("{http://www.w3.org/2000/svg}text")
    ]
    only = stability("x", None).model_copy(update={"layers": (), "deviations": ()})
    (tmp_path / "few").mkdir()
    write_stability_pictures(tmp_path / "few", only)
    assert [file.name for file in (tmp_path / "few").iterdir()] == ["precision.svg"]
