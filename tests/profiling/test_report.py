"""Tables, warnings and plots of a profile."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from PIL import Image
from stand_ins import Bench, StandIn, subject_of

from mmmamba_cli.profiling import Plan, Profile, profile, write_profile
from mmmamba_cli.profiling.interfaces import AS_SHIPPED, GROWING, TUNED
from mmmamba_cli.profiling.plot import make_figure, render_plot
from mmmamba_cli.profiling.report import format_memory, format_ms, remarks, tables
from mmmamba_cli.profiling.result import OVER_BUDGET, PREFILL


@pytest.fixture
def planted() -> Profile:
    """Times and memory of stand-ins, the teacher as shipped too large for the longest context."""
    bench = Bench()
    shipped = StandIn("shipped", bench, lambda n: 0.02 * n, too_long=4000, weight_bytes=17666)
    tuned = StandIn("tuned", bench, lambda n: 0.005 * n, weight_bytes=5000)
    student = StandIn("student", bench, lambda n: 1.0, weight_bytes=5000)
    subjects = [subject_of(shipped, AS_SHIPPED, (0,), GROWING), subject_of(tuned, TUNED, (0,))]
    plan = Plan(contexts=(1024, 2048, 4096), repeats=3, rounds=3, roofline=False, gpu_metrics=False)
    return profile([*subjects, subject_of(student)], plan, timer=bench)


def test_tables(planted: Profile) -> None:
    shown = {title.partition(":")[0]: (heading, rows) for title, heading, rows in tables(planted)}
    heading, rows = shown["next token, ms"]
    assert heading == ("context", "shipped", "tuned", "student")
    assert rows[0][0] == "1,024"
    assert rows[0][3] == "1,000 ± 0"
    assert rows[2][1] == "out of memory"
    heading, rows = shown["next token"]
    assert heading[1:] == ("student / as shipped", "student / tuned")
    assert shown["memory while decoding, against the teacher"][1][0][1:] == ("-45%", "+0%")
    # 1024 columns and those of the warm-up: 0.02 s a column against 1 s.
    assert rows[0][1:] == ("20.5x", "5.12x")
    assert rows[2][1:] == (None, "20.5x")
    assert "student (0 of 8 layers attention), against the teacher as" in planted.compared
    assert any(line.startswith("shipped (next token at 4,096): out") for line in remarks(planted))


def test_plot_is_a_png_with_all_colours(planted: Profile) -> None:
    drawn = render_plot(planted)
    assert drawn is not None
    image = Image.open(io.BytesIO(drawn))
    assert image.format == "PNG"
    assert image.size[0] > 1500
    assert planted.compared in image.info["Description"]
    colours = {colour for _, colour in image.convert("RGB").getcolors(2**24) or []}
    # The student's blue, both greys of the teacher, and paper.
    assert {(0, 0x72, 0xB2), (0x22,) * 3, (0x77,) * 3, (255,) * 3} <= colours


def test_plot_of_a_budget_that_was_too_short_for_prefill(planted: Profile) -> None:
    """A busy machine measures no prompt within the budget."""
    skipped = tuple(
        one.model_copy(update={"status": OVER_BUDGET, "median": None, "rounds": ()})
        if one.task == PREFILL
        else one
        for one in planted.measurements
    )
    unmeasured = planted.model_copy(update={"measurements": skipped})
    assert render_plot(unmeasured) is not None
    prefill = make_figure(unmeasured).axes[2]
    assert [text.get_text() for text in prefill.texts] == ["nothing was measured"]


def test_plot_shows_every_number_on_logarithmic_axes(planted: Profile) -> None:
    latency, memory, prefill = make_figure(planted).axes
    for axes, unit in ((latency, "milliseconds"), (memory, "MiB"), (prefill, "seconds")):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("context, tokens", unit)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4K", "2K", "1K"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in latency.get_lines()}
    shipped = [planted.find("shipped", "decode", n) for n in (1024, 2048)]
    assert lines["shipped"] == [
        [one.context, pytest.approx(1000 * (one.median or 0))] for one in shipped if one
    ]
    colours = {line.get_label(): line.get_color() for line in latency.get_lines()}
    assert len({colours[name] for name in ("shipped", "tuned", "student")}) == 3
    assert lines["student"] == [[n, 1000.0] for n in (1024, 2048, 4096)]
    assert "shipped:\nout of memory" in [text.get_text() for text in latency.texts]


def test_without_matplotlib_an_old_plot_is_deleted(
    planted: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(write_profile(planted, tmp_path)) == 3
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert write_profile(planted, tmp_path) == [tmp_path / "profile.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["profile.json"]


def test_a_single_repeat_has_no_spread() -> None:
    bench = Bench()
    plan = Plan(contexts=(10,), repeats=1, rounds=1, roofline=False, gpu_metrics=False)
    found = profile([subject_of(StandIn("one", bench))], plan, timer=bench)
    assert tables(found)[0][2] == [("10", "1,000 (once)")]
    assert "against no teacher" in found.compared
    assert found.ratios == ()


def test_noisy_measurements_give_one_warning() -> None:
    bench = Bench()
    # The four tokens of the correctness check come first.
    costs = iter([1.0] * 4 + [1.0, 1.0, 3.0, 3.0, *[1.0, 1.2, 1.0, 1.2] * 2])
    plan = Plan(
        contexts=(10, 20, 30),
        repeats=4,
        rounds=1,
        warm_up=0,
        prefill=False,
        roofline=False,
        gpu_metrics=False,
    )
    shaky = StandIn("shaky", bench, lambda context: next(costs))
    said = remarks(profile([subject_of(shaky)], plan, timer=bench))
    assert len(said) == 1
    assert said[0].startswith(
        "noisy, the quartiles more than 25% of the median apart, are 1 of 3: "
    )
    assert "are 1 of 3: shaky (next token at 10); let nothing" in said[0]


def test_number_formats() -> None:
    shown = [format_ms(seconds) for seconds in (1.2345, 0.012345, 0.0012345, 0.00012345)]
    assert shown == ["1,234", "12.3", "1.23", "0.123"]
    assert (format_memory(3 * 2**20), format_memory(1536 * 2**20)) == ("3.0 MiB", "1.50 GiB")
