"""The lead: retention, the crossing of decoding times, and files of measured results."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ended import Command
from report_case import Balanced, hash_of

from mmmamba_cli.errors import RunError
from mmmamba_cli.profiling.result import (
    DECODE,
    Profile,
    RooflinePart,
    median_and_quartiles,
    ratios,
    read_profile,
)
from mmmamba_cli.reporting import Page, build_page, read_report_data
from mmmamba_cli.reporting.crossing import crossings, round_context
from mmmamba_cli.reporting.interval_filter import lacks_intervals, without_short_intervals
from mmmamba_cli.reporting.measured_results import read_measured_results
from mmmamba_cli.reporting.profile_tables import (
    measured_tables,
    skipped_sentences,
    withheld_sentences,
)
from mmmamba_cli.reporting.speed import headline, speed_sentences
from mmmamba_cli.reporting.suite_results import suite_results

Full = tuple[Path, Path, Path]
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CONTEXTS = (256, 512, 1024, 2048)
NOUNS = {"linear-stage3": "the linear student"}


def profile_of(
    full: Full, student: tuple[float, ...], teacher: tuple[float, ...], noisy: tuple[int, ...] = ()
) -> Profile:
    """The run's profile with other contexts and decoding times; `noisy` are contexts."""
    found = read_profile(full[0] / "profile" / "profile.json")
    baseline = found.subjects[0].name
    measurements = []
    for name, times in ((baseline, teacher), ("linear-stage3", student)):
        template = next(one for one in found.measurements if one.subject == name)
        for context, seconds in zip(CONTEXTS, times, strict=False):
            spread = 0.5 if context in noisy else 0.01
            rounds = ((seconds * (1 - spread), seconds, seconds * (1 + spread)),)
            median, quartiles = median_and_quartiles(rounds)
            changed = {"context": context, "rounds": rounds, "task": DECODE}
            measured = {"median": median, "quartiles": quartiles}
            measurements.append(template.model_copy(update={**changed, **measured}))
    plan = found.plan.model_copy(update={"contexts": CONTEXTS})
    return found.model_copy(update={"plan": plan, "measurements": tuple(measurements)})


def test_crossing_lies_between_the_contexts_where_the_order_changes(full: Full) -> None:
    profile = profile_of(full, (0.003,) * 4, (0.001, 0.002, 0.004, 0.008))
    (found,) = crossings(profile, DECODE)
    # Straight lines in the logarithms: the teacher's time is proportional to the context.
    assert (found.state, found.is_noisy) == ("crosses", False)
    assert found.at == pytest.approx(768)
    (sentence,) = speed_sentences(profile, NOUNS)
    assert "The linear student takes less time for a token than its teacher" in sentence
    assert "and more time in shorter contexts" in sentence
    assert "about 770 tokens" in sentence and "3.00 ms against 1.00 at 256" in sentence
    assert "At 2,048 tokens it takes 3.00 ms against 8.00 (2.7 times as fast)" in sentence
    assert "the linear student from about 770 tokens on" in (headline(profile, NOUNS) or "")


def test_a_student_that_never_crosses(full: Full) -> None:
    slower = profile_of(full, (0.02,) * 4, (0.001, 0.002, 0.004, 0.008))
    assert [one.state for one in crossings(slower, DECODE)] == ["slower"]
    (sentence,) = speed_sentences(slower, NOUNS)
    assert "does not become faster" in sentence and "times as fast" not in sentence
    faster = profile_of(full, (0.0005,) * 4, (0.001, 0.002, 0.004, 0.008))
    assert [one.state for one in crossings(faster, DECODE)] == ["faster"]
    assert headline(slower, NOUNS) is headline(faster, NOUNS) is None


def test_noisy_timings_are_no_headline(full: Full) -> None:
    times = (0.003,) * 4, (0.001, 0.002, 0.004, 0.008)
    profile = profile_of(full, *times, noisy=(1024, 2048))
    # The crossing rests on 1,024, and no quiet context lies beyond it.
    assert speed_sentences(profile, NOUNS) == [] and headline(profile, NOUNS) is None
    quiet = profile_of(full, *times, noisy=(2048,))
    assert "At 1,024 tokens it takes" in speed_sentences(quiet, NOUNS)[0]


def test_one_context_is_no_headline(full: Full) -> None:
    profile = profile_of(full, (0.003,), (0.004,))
    assert crossings(profile, DECODE) == [] and speed_sentences(profile, NOUNS) == []


@pytest.mark.parametrize(
    ("value", "shown"), [(2063.0, "2,100"), (98.7, "99"), (31_400.0, "31,000")]
)
def test_a_crossing_has_two_digits(value: float, shown: str) -> None:
    assert round_context(value) == shown


def test_measurements_not_made_are_a_sentence_and_no_row(full: Full) -> None:
    profile = profile_of(full, (0.003,) * 4, (0.004,) * 4)
    skipped = [
        one.model_copy(
            update={"status": "skipped: over budget", "median": None, "quartiles": None}
            | {"memory": None, "rounds": ()}
        )
        if one.context == 2048
        else one
        for one in profile.measurements
    ]
    profile = profile.model_copy(update={"measurements": tuple(skipped)})
    (sentence,) = skipped_sentences(profile)
    assert sentence.startswith("Not measured, because the time given by --budget was spent: ")
    assert "linear-stage3 (next token at 2,048)" in sentence
    for title, _, rows in measured_tables(profile):
        assert [row[0] for row in rows if row[0] == "2,048"] == [], title
        assert "256" in [row[0] for row in rows]


def own(full: Full, results: list[Path] | None = None) -> tuple[Page, Balanced]:
    run, other, data = full
    report = read_report_data(run, [other], results or ())
    page = build_page(report, created="2026-01-10 00:00", data=data)
    return page, Balanced(page.html)


def test_retention_of_a_run_is_paired_and_above_chance(full: Full) -> None:
    run, other, data = full
    (suite,) = suite_results(read_report_data(run, [other]), data)
    kept = {one.student: one for one in suite.kept}
    student = kept["linear-stage3"]
    # The teacher has all 20 answers right, the student 19 (one of 10 in the category count is
    # wrong), and chance is 50.
    assert student.teacher_score.value == 100
    assert student.student_score.value == pytest.approx(100 * (9 / 10 + 1) / 2)
    assert student.raw is not None and student.above is not None
    assert student.raw.value == pytest.approx(95)
    assert student.above.value == pytest.approx(90)
    low, high = student.above.interval or (0, 0)
    assert 0 < low < student.above.value < high <= 100
    guessing = kept["linear-stage3 (other)"]
    assert guessing.above is not None and guessing.above.value == 0


def test_a_run_leads_with_its_own_retention(full: Full) -> None:
    page, balanced = own(full)
    assert page.summary[0] == (
        "On scenes, the linear student keeps 90 % of its teacher's score above chance."
    )
    assert page.shown[:3] == ("retention", "crossing", "pictures")
    assert page.summary[0] in balanced.text.replace("\u00a0", " ")
    assert "run" not in page.shown


@pytest.fixture
def measured(full: Full, tmp_path: Path) -> Path:
    """Scores as `mmmamba eval --teacher --json` prints them, of the run's own models."""
    results, retention = [], []
    for name, score in (("linear-stage3", 80.0), ("elsewhere", 70.0), ("teacher", 90.0)):
        source = "linear-stage3" if name == "elsewhere" else name
        file = full[0] / "evals" / source / "scenes" / "result.json"
        value = json.loads(file.read_text())
        value["model"] |= {"name": name} | (
            {"content_hash": "e" * 64} if name == "elsewhere" else {}
        )
        value["rules"][0]["metrics"]["mean"] = score
        results.append(value)
        part: dict[str, Any] = {"suite": "scenes", "rule": value["rules"][0]["rule"]}
        part |= {"metric": "mean", "student": name, "teacher": "teacher"}
        part |= {"student_value": score, "teacher_value": 90.0, "ratio": score / 90}
        part |= {"interval": [0.7, 0.95], "rows": 12, "seed": 0, "chance": 50.0}
        part |= {"above_chance": 0.75, "above_chance_interval": [0.6, 0.9]}
        retention += [] if name == "teacher" else [part]
    text = {"format": 1, "command": "mmmamba eval /secret/place", "date": "2026-02-03"}
    text |= {"device": "an abacus", "results": results, "retention": retention}
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(text))
    return file


def test_measured_results_lead_instead_of_the_run(full: Full, measured: Path) -> None:
    page, balanced = own(full, [measured, RESULTS / "profile_scenes_long_cpu.json"])
    assert "the linear student keeps 75 % of its teacher's score above chance" in page.summary[0]
    assert page.summary[0].endswith("above chance, elsewhere 50 %.")
    assert page.summary[1].startswith("On a CPU, students decode faster than the teacher")
    text = " ".join(balanced.text.split())
    assert "75.0 (60.0 to 90.0)" in text and "88.9 (70.0 to 95.0)" in text
    assert "an abacus" in balanced.text and "2026-02-03" in balanced.text
    assert "secret" not in balanced.text
    # The run's own profile keeps its section, below what was measured elsewhere.
    assert page.shown.index("crossing") < page.shown.index("run") < page.shown.index("costs")
    assert "Noisy, with quartiles more than 25%" in balanced.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "has neither scores nor a profile"),
        ('{"results": []}', "is damaged"),
        ('{"format": 9, "results": []}', "has format 9"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_result_is_refused(
    full: Full, tmp_path: Path, mmmamba: Command, text: str | None, said: str
) -> None:
    file = tmp_path / "given.json"
    if text is not None:
        file.write_text(text)
    out = tmp_path / "page.html"
    done = mmmamba("report", "--run", full[0], "--results", file, "--out", out)
    assert done.code == 2 and said in done.err
    assert not out.exists()


def test_the_command_prints_the_result(
    full: Full, measured: Path, tmp_path: Path, mmmamba: Command
) -> None:
    run, _, data = full
    out = ("--data", data, "--out", tmp_path / "page.html", "--results", measured)
    done = mmmamba("report", "--run", run, *out)
    assert "the linear student keeps 75 % of its teacher's score above chance" in done.out
    told = json.loads(mmmamba("report", "--run", run, *out, "--json").out)
    assert len(told["summary"]) == 1


def test_committed_results_are_readable() -> None:
    """The files that `make demo` gives to the report, and results of older versions."""
    names = ("scenes_retention_cpu.json", "profile_scenes_long_cpu.json")
    older = ("profile_hovle_8m_cpu.json",)
    found = read_measured_results([RESULTS / name for name in (*names, *older)])
    assert [name for name, _ in found.scores] == [names[0]]
    assert [name for name, _ in found.profiles] == [names[1], *older]


def test_a_missing_profile_raises_before_a_page_is_built(full: Full, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        read_report_data(full[0], (), [tmp_path / "nothing.json"])


def test_few_pictures_have_no_interval(full: Full) -> None:
    report = read_report_data(full[0])
    (suite,) = suite_results(report, full[2])
    student = next(one for one in suite.results if one.label == "linear-stage3")
    assert set(student.result.rules[0].intervals) == {"mean", "count", "colour"}
    # The first picture of the category count is not asked: four are left.
    few = [row for row in suite.rows if row.unit != suite.rows[0].unit]
    reduced = without_short_intervals(student, few).result.rules[0]
    assert set(reduced.intervals) == {"colour"} and set(reduced.metrics) >= {"mean", "count"}
    assert lacks_intervals([reduced])
    again = [without_short_intervals(one, few) for one in suite.results]
    # Four pictures in two categories are four and not eight.
    shared = [replace(row, unit=str(index // 4 % 4)) for index, row in enumerate(suite.rows)]
    part = student.result.rules[0]
    whole = part.model_copy(update={"intervals": {"accuracy": (0.0, 1.0)}})
    one = replace(student, result=student.result.model_copy(update={"rules": (whole,)}))
    assert not without_short_intervals(one, shared).result.rules[0].intervals
    assert without_short_intervals(one, suite.rows).result.rules[0].intervals
    (kept,) = replace(suite, results=again).kept
    assert str(kept.above) == "90.0" and str(kept.student_score) == "95.0"


def test_unreliable_ratios_and_shares_are_dashes(full: Full) -> None:
    times = (0.003,) * 4, (0.001, 0.002, 0.004, 0.008)

    def cells(noisy: tuple[int, ...], floor: float) -> tuple[dict[str, list[Any]], list[str]]:
        profile = profile_of(full, *times, noisy=noisy)
        measured = [one.model_copy(update={"floor": floor}) for one in profile.measurements]
        names = {one.name: one.role for one in profile.subjects}
        ceilings = RooflinePart(copy_rate=1e10, matmul_rate=1e11, size=1, side=1)
        changed = {"measurements": tuple(measured), "ratios": ratios(measured, names)}
        profile = profile.model_copy(update={**changed, "ceilings": ceilings})
        tables = {title: rows for title, _, rows in measured_tables(profile)}
        return tables, withheld_sentences(profile)

    tables, sentences = cells((2048,), 0.0005)
    (faster,) = [rows for title, rows in tables.items() if "how many times faster" in title]
    assert faster == [("256", "0.33x"), ("512", "0.67x"), ("1,024", "1.33x")]
    (floors,) = [rows for title, rows in tables.items() if "floor" in title]
    assert [row[0] for row in floors] == ["256", "512", "1,024"]
    assert len(sentences) == 1 and "given only where" in sentences[0]
    # A ratio that is reliable at one context is none, and memory is counted without timing.
    tables, _ = cells((512, 1024, 2048), 0.0005)
    assert not [title for title in tables if "how many times faster" in title]
    assert [len(rows) for title, rows in tables.items() if "against the teacher" in title] == [4]
    # At 256 the teacher took 1 ms.
    tables, sentences = cells((), 0.0015)
    assert not [title for title in tables if "floor" in title]
    assert len(sentences) == 1 and "No floor is given for next token" in sentences[0]


def test_fidelity_of_other_weights_is_left_out(full: Full, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(full[0], run)
    layer = {"layer": 0, "cosine": 0.25, "relative_mse": 1.0}
    products = {
        "stage1": {"content_hash": hash_of("stage1"), "layers": [layer]},
        "linear-stage3": {"content_hash": "e" * 64, "layers": [layer]},
    }
    text = {"format": 1, "inputs": "two texts", "command": "c", "created": "2026-01-01"}
    (run / "fidelity.json").write_text(json.dumps({**text, "products": products}))
    report = read_report_data(run)
    assert [one for one in report.remarks if "linear-stage3's mixers" in one]
    page = build_page(report, created="now", data=full[2])
    assert "fidelity" in page.shown
    text_ = Balanced(page.html).text
    assert "stage1 has a mean cosine similarity of 0.25" in text_ and "two texts" in text_


def test_seeding_s_own_fidelity_is_shown(full: Full, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(full[0], run)
    file = run / "products" / "seed" / "fidelity.json"
    file.write_text(json.dumps([{"layer": 0, "cosine": 0.5, "relative_mse": 1.0}]))
    page = build_page(read_report_data(run), created="now", data=full[2])
    assert "seed has a mean cosine similarity of 0.50" in Balanced(page.html).text
    file.write_text("[{]")
    assert "seed/fidelity.json is damaged and left out" in read_report_data(run).remarks
