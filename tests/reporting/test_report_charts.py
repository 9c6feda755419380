"""Positions of values and intervals in charts, and values that are not finite."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_case import HOSTILE, Balanced

from mmmamba_cli.evaluate.bootstrap import difference_interval
from mmmamba_cli.evaluate.scoring.unit_scores import accuracy_scores
from mmmamba_cli.reporting.chart_scales import Scale, axis_range
from mmmamba_cli.reporting.charts import MARGIN, WIDTH, Bar, Line, Mark, bars, lines
from mmmamba_cli.reporting.comparisons import external_differences
from mmmamba_cli.reporting.html import tag
from mmmamba_cli.reporting.loss_curves import downsample
from mmmamba_cli.reporting.run_contents import ExternalComparison

BEGIN, END = MARGIN, WIDTH - 52


def teacher_name(value: float) -> float:
    """The x coordinate of a percentage in a panel that ends at 100."""
    return BEGIN + value / 100 * (END - BEGIN)


def test_positions_of_bars_and_whiskers() -> None:
    rows = [Bar("one", 80.0, 0, (70.0, 95.0)), Bar("two", 50.0, 1)]
    svg = Balanced(bars("scores", rows, high=100.0, reference=(50.0, "guessing")))
    widths = [float(rect["width"] or 0) for rect in svg.all("rect")]
    assert widths == pytest.approx([teacher_name(80) - BEGIN, teacher_name(50) - BEGIN], abs=0.01)
    (whisker,) = [p["d"] or "" for p in svg.all("path") if p.get("class") == "whisker"]
    ends = [float(x) for x in re.findall(r"M([\d.]+) ", whisker)]
    assert ends == pytest.approx([teacher_name(70), teacher_name(95), teacher_name(70)], abs=0.01)
    assert float(whisker.rpartition("H")[2]) == pytest.approx(teacher_name(95), abs=0.01)
    (guess,) = [one["d"] or "" for one in svg.all("path") if one.get("class") == "reference"]
    pieces = [tuple(map(float, piece)) for piece in re.findall(r"M([\d.]+) ([\d.]+)v(\d+)", guess)]
    assert [x for x, _, _ in pieces] == pytest.approx([teacher_name(50)] * 2, abs=0.01)
    # The line is named, and its pieces leave out the labels of the bars.
    labels = [float(one["y"] or 0) for one in svg.all("text") if one.get("class") == "label"]
    assert all(not y <= label <= y + height for _, y, height in pieces for label in labels)
    assert "guessing" in svg.text
    (picture,) = svg.all("svg")
    assert "one: 80, 70 to 95; two: 50" in (picture["aria-label"] or "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_written_but_has_no_bar(value: float) -> None:
    rows = [Bar("one", value, 0, (value, value)), Bar("two", 50.0, 1, (40.0, value))]
    for high in (100.0, None):
        svg = Balanced(bars("scores", rows, high=high))
        assert len(svg.all("rect")) == 1
        places = [one[key] for one in svg.all("text") for key in ("x", "y")]
        assert all(math.isfinite(float(place or 0)) for place in places)
    assert not math.isnan(axis_range([1.0])[1])
    assert bars("scores", rows[:1]).count(str(value)) >= 2


def test_thinning_leaves_out_values_that_are_not_finite() -> None:
    """A mean uses the finite points only; a mean of none is a gap."""
    curve = [(float(i), math.nan if i in (3, 6, 7, 8) else 2.0) for i in range(12)]
    found = downsample(curve, most=4)
    assert [y for _, y in found[:2]] == [2.0, 2.0]
    assert math.isnan(found[2][1])
    assert found[1][0] == pytest.approx(4.5)


def test_positions_of_points() -> None:
    drawn = Line("one", 0, ((1.0, 1.0), (2.0, 10.0), (4.0, 100.0)))
    svg = Balanced(lines("t", [drawn], x_name="x", y_name="y", log_x=True, log_y=True))
    (path,) = [p["d"] or "" for p in svg.all("path") if "stroke" in (p.get("class") or "")]
    points = [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
    # Both axes are logarithmic, so the middle point is the middle of both.
    assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2, abs=0.02)
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.02)
    assert points[0][1] > points[2][1], "more stands higher"


@pytest.mark.parametrize("places", [(2.0, 3.0), (3.0, 2.0), (60.0, 90.0), (2.0, 95.0)])
def test_labels_of_marks_lie_on_no_line(places: tuple[float, float]) -> None:
    drawn = [Line("one", 0, ((1.0, 1.0), (100.0, 2.0)), True, frozenset({100.0}))]
    marks = [Mark(f"a student from {place:g}", i, place) for i, place in enumerate(places)]
    svg = Balanced(lines("times", drawn, x_name="x", y_name="y", log_x=True, marks=marks))
    labels = [one for one in svg.all("text") if str(one.get("class")).startswith("fill")]
    upright = [one for one in svg.all("line") if "mark" in str(one.get("class"))]
    assert len(labels) == len(upright) == 2
    for label in labels:
        begin, y = float(label["x"] or 0), float(label["y"] or 0)
        width = 6.0 * len("a student from 2")
        left, right = (
            (begin - width, begin) if label["text-anchor"] == "end" else (begin, begin + width)
        )
        assert left >= 0 and right <= WIDTH
        for line in upright:
            crossed = left < float(line["x1"] or 0) < right
            assert not (crossed and float(line["y1"] or 0) < y), (label, line)
    # A noisy point is drawn in another way than the reliable one.
    (noisy,) = [one for name, one in svg.elements if "noisy" in str(one.get("class"))]
    assert noisy["class"] == "noisy hollow stroke s0"


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    drawn = Line("one", 0, ((1.0, 2.0), (2.0, math.nan), (3.0, 1.0), (4.0, math.inf)))
    text = lines("t", [drawn], x_name="x", y_name="y", log_y=True)
    assert "nan" not in text and "inf" not in text
    (path,) = [p["d"] or "" for p in Balanced(text).all("path")]
    assert path.count("M") == 2


def test_no_finite_value_raises_and_zero_gives_a_linear_axis() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        lines("t", [Line("one", 0, ((1.0, math.nan),))], x_name="x", y_name="y")
    text = lines(
        "t", [Line("one", 0, ((1.0, 0.0), (2.0, 1.0)))], x_name="x", y_name="y", log_y=True
    )
    Balanced(text)


@given(
    st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=8),
    st.booleans(),
)
def test_ranges_contain_values_and_ticks(values: list[float], log: bool) -> None:
    low, high = axis_range(values, log=log)
    assert low <= min(values) * (1 + 1e-6) and high >= max(values) * (1 - 1e-6) and low < high
    ticks = Scale(low, high, 0, 1, log).ticks()
    assert ticks and len(ticks) <= 24
    assert all(low - abs(low) * 1e-6 <= t <= high * (1 + 1e-6) for t in ticks)


def test_everything_is_escaped() -> None:
    text = bars(HOSTILE, [Bar(HOSTILE, 1.0, 0)])
    text += lines(HOSTILE, [Line(HOSTILE, 0, ((0.0, 1.0),))], x_name=HOSTILE, y_name=HOSTILE)
    svg = Balanced(text)
    assert not {"script", "img"} & {name for name, _ in svg.elements}
    assert not [1 for _, attributes in svg.elements if "onerror" in attributes]
    assert tag("p", HOSTILE, title='"><b>').count("<") == 2


def test_thinning_keeps_the_mean() -> None:
    curve = [(float(i), float(i % 7)) for i in range(1000)]
    few = downsample(curve, 100)
    assert len(few) == 100
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in curve) / 1000)
    assert downsample(curve[:50], 100) == tuple(curve[:50])


def test_difference_interval_is_paired() -> None:
    # Both are right on the same half: each score varies over draws, their difference does not.
    units = [str(i) for i in range(40)]
    one = accuracy_scores([1.0] * 20 + [0.0] * 20, units, [""] * 40)
    same = accuracy_scores([1.0] * 20 + [0.0] * 20, units, [""] * 40)
    assert difference_interval(one, same, "accuracy") == (0.0, 0.0)
    worse = accuracy_scores([1.0] * 10 + [0.0] * 30, units, [""] * 40)
    low, high = difference_interval(one, worse, "accuracy")
    assert 5 < low < 25 < high < 45
    fewer = accuracy_scores([1.0], ["0"], [""])
    with pytest.raises(ValueError, match="not of the same rows"):
        difference_interval(one, fewer, "accuracy")


def comparison(**changed: object) -> ExternalComparison:
    values = {
        "format": 1,
        "title": "t",
        "metric": "m",
        "unit": "lesson",
        "command": "c",
        "created": "2026-01-01",
        "models": {"a": [[3, 4]] * 30, "b": [[1, 4]] * 30},
        "compare": [["a", "b"]],
    }
    return ExternalComparison.model_validate({**values, **changed})


def test_an_external_comparison_is_a_share_of_all_units() -> None:
    (found,) = external_differences(comparison())
    assert (found.value, found.interval, found.significant) == (50.0, (50.0, 50.0), True)
    assert found.sample == "30 lessons"


@pytest.mark.parametrize(
    "changed",
    [
        {"models": {"a": [[3, 4]], "b": [[1, 5]]}},
        {"models": {"a": [[5, 4]], "b": [[1, 4]]}},
        {"models": {"a": [], "b": []}},
        {"compare": [["a", "stranger"]]},
    ],
)
def test_an_invalid_external_comparison_is_rejected(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"same units|more right|stranger"):
        comparison(**changed)
