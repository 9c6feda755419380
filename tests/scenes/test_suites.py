"""Scene suites and lessons: tables, cache, scores, the blind baseline and the commands."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from PIL import Image
from preloaded_process import fork_server
from typer.testing import CliRunner

from mmmamba_cli.evaluate import EvalOptions, find_suite, open_suite
from mmmamba_cli.evaluate.images import pictures_of
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.processing.chat_template import place_images
from mmmamba_evals.scenes import blind_baseline, long_suite, scene_writers
from mmmamba_evals.scenes.atlas import Atlas
from mmmamba_evals.scenes.blind_baseline import (
    BlindResult,
    ask_with_bias,
    blind_accuracy,
    category_draws,
)
from mmmamba_evals.scenes.categories import PAIRS, SPLITS
from mmmamba_evals.scenes.cli import command
from mmmamba_evals.scenes.lessons import draw_lesson
from mmmamba_evals.scenes.long_suite import LONG_TABLE, PICTURES_OF, SENTENCES_OF, write_long_suite
from mmmamba_evals.scenes.scene_writers import (
    QUESTIONS_PER_CONVERSATION,
    write_lessons,
    write_suite,
)
from mmmamba_evals.scenes.scoring import accuracy_by_category
from mmmamba_evals.scenes.world import World

CSV_LIMIT = 1 << 24


def test_suite_table_is_readable(tmp_path: Path, atlas: Atlas, world: World) -> None:
    questions = write_suite(tmp_path / "SCENES.tsv", atlas, world, 0, of_split=2, of_pair=3)
    assert questions == 2 * 6 * len(SPLITS) + 3 * 2 * len(PAIRS)
    suite = find_suite("scenes")
    table, rows = open_suite(suite, EvalOptions(data=tmp_path))
    assert len(rows) == questions
    counts = Counter(row.category for row in rows)
    assert counts == {**dict.fromkeys(SPLITS, 12), **dict.fromkeys(PAIRS, 6)}
    for row in rows:
        (picture,) = pictures_of(table, table.cells[row.place], suite.dataset)
        assert picture.open().size == (224, 224)
    assert len({row.unit for row in rows}) == 2 * len(SPLITS) + 3 * len(PAIRS)


def test_suite_is_deterministic(tmp_path: Path, atlas: Atlas, world: World) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_suite(tmp_path / name, atlas, world, seed, of_split=1, of_pair=1)
    one, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert one == again != other


def test_suite_without_data_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmmamba_evals.scenes import scene_writers, shipped

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LMUData", str(tmp_path / "nothing"))
    monkeypatch.setattr(shipped.write_suite, "__defaults__", (1, 1, lambda pictures: None))
    assert scene_writers.write_suite is shipped.write_suite
    for name in ("scenes", "scenes-unseen"):
        said: list[str] = []
        table, rows = open_suite(find_suite(name), EvalOptions(), said.append)
        assert said == [f"making the table of suite {name}, once, in {table.file.parent}"]
        assert table.file.is_relative_to(tmp_path / "cache")
        assert len(rows) == 6 * len(SPLITS) + 2 * len(PAIRS)
        before = table.file.stat().st_mtime_ns
        table, _ = open_suite(find_suite(name), EvalOptions(), said.append)
        assert table.file.stat().st_mtime_ns == before
        assert len(said) == 1


def test_long_suite_table(tmp_path: Path, atlas: Atlas, world: World) -> None:
    questions = write_long_suite(tmp_path, atlas, world, 0, each=1, pool=60)
    suite = find_suite("scenes-long")
    table, rows = open_suite(suite, EvalOptions(data=tmp_path))
    assert len(rows) == questions == 2 * (len(PICTURES_OF) + 3 + len(SENTENCES_OF))
    by_category = {row.category: row for row in rows}
    shown = {
        name: pictures_of(table, table.cells[row.place], suite.dataset)
        for name, row in by_category.items()
    }
    for length, count in PICTURES_OF.items():
        assert len(shown[f"pictures {length}"]) == count
    assert [len(shown[f"tiles {length}"]) for length in ("1K", "2K", "4K")] == [1, 1, 1]
    assert shown["tiles 4K"][0].open().size == (8 * 224, 8 * 224)
    for length in SENTENCES_OF:
        assert shown[f"text {length}"] == ()
        assert "The secret word is" in by_category[f"text {length}"].question
    assert (tmp_path / LONG_TABLE).is_file()


def test_versions_of_the_long_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Version 1 is the first quarter of the inputs of version 2, at each length."""
    from mmmamba_evals.scenes import shipped

    assert (find_suite("scenes-long").version, find_suite("scenes-long-v1").version) == (2, 1)
    written = []
    monkeypatch.setattr(
        shipped,
        "write_long_suite",
        lambda *given, lengths: written.append((given[4], tuple(lengths))),
    )
    shipped.build_scenes_long(tmp_path)
    shipped.build_scenes_long_v1(tmp_path)
    shipped.build_scenes_long_4k(tmp_path)
    every = tuple(PICTURES_OF)
    assert written == [(100, every), (25, every), (100, ("1K", "2K", "4K"))]


def test_rows_do_not_depend_on_other_lengths(tmp_path: Path, atlas: Atlas, world: World) -> None:
    def rows(folder: str, lengths: Sequence[str]) -> list[str]:
        (tmp_path / folder).mkdir()
        write_long_suite(tmp_path / folder, atlas, world, 0, each=1, pool=60, lengths=lengths)
        with (tmp_path / folder / LONG_TABLE).open(encoding="utf-8", newline="") as handle:
            return [
                row["category"] + row["question"]
                for row in csv.DictReader(handle, dialect="excel-tab")
            ]

    some = rows("some", ["1K"])
    assert len(some) == 6
    assert some == [row for row in rows("more", ["1K", "2K"]) if "1K" in row]


def test_the_first_inputs_do_not_depend_on_their_number(world: World) -> None:
    one, two = (
        [asked[0].text for _, _, asked, _ in long_suite._texts(world, 0, each, PICTURES_OF)]
        for each in (1, 2)
    )
    assert one == two[::2]


def test_lessons_are_training_data(tmp_path: Path, atlas: Atlas, world: World) -> None:
    write_lessons(tmp_path, atlas, world, 0, 5)
    lines = [json.loads(line) for line in (tmp_path / "lessons.jsonl").read_text().splitlines()]
    numbers = [line["id"].split("-")[1] for line in lines]
    assert sorted(set(numbers)) == ["0", "1", "2", "3", "4"]
    for line, number in zip(lines, numbers, strict=True):
        said = [turn["from"] for turn in line["conversations"]]
        assert said == ["human", "gpt"] * (len(said) // 2)
        assert len(said) <= 2 * QUESTIONS_PER_CONVERSATION
        names = line.get("image", [])
        names = [names] if isinstance(names, str) else names
        assert (len(names) > 1, len(names) == 0) == (number == "1", number == "2")
        for name in names:
            assert Image.open(tmp_path / name).size == (224, 224)
        asked = line["conversations"][0]["value"]
        assert asked.startswith(place_images("", len(names)) if names else "The ")
        values = "".join(turn["value"] for turn in line["conversations"])
        assert values.count("<image>") == len(names)
    # Every question appears exactly once.
    asked = draw_lesson(Random("0 lesson 0"), world)[1]
    said = [t["value"] for line, n in zip(lines, numbers, strict=True) if n == "0"
            for t in line["conversations"]]  # fmt: skip
    assert [s.removeprefix("<image>\n") for s in said[::2]] == [one.text for one in asked]
    assert said[1::2] == [one.answer for one in asked]


def test_conversations_of_one_question_ask_the_same(
    tmp_path: Path, atlas: Atlas, world: World
) -> None:
    def turns(name: str, **options: int) -> list[list[str]]:
        write_lessons(tmp_path / name, atlas, world, 0, 2, short=True, **options)
        lines = (tmp_path / name / "lessons.jsonl").read_text().splitlines()
        return [[t["value"] for t in json.loads(line)["conversations"]] for line in lines]

    single, several = turns("single", questions=1), turns("several")
    assert {len(one) for one in single} == {2}
    assert max(map(len, several)) > 2
    asked = [[value.removeprefix("<image>\n") for value in one] for one in several]
    flat = [value.removeprefix("<image>\n") for one in single for value in one]
    assert flat == [value for one in asked for value in one]
    assert all(one[0].startswith("<image>\n") for one in single)


def test_short_lessons_have_one_picture(tmp_path: Path, atlas: Atlas, world: World) -> None:
    for name, short in (("all", False), ("short", True)):
        write_lessons(tmp_path / name, atlas, world, 0, 15, short=short)
    everything, lines = (
        [json.loads(line) for line in (tmp_path / name / "lessons.jsonl").read_text().splitlines()]
        for name in ("all", "short")
    )
    assert {line["id"].split("-")[1] for line in lines} == {str(number) for number in range(15)}
    assert all(isinstance(line.get("image"), str) for line in lines)
    # The other lessons are unchanged: of 15, numbers 1, 2, 13 and 14 are long.
    long = ("1", "2", "13", "14")
    assert [line for line in lines if line["id"].split("-")[1] not in long] == [
        line for line in everything if line["id"].split("-")[1] not in long
    ]


def test_workers_write_the_same_files(
    tmp_path: Path, atlas: Atlas, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes that get their tasks as spawned ones do, but import the package once."""
    monkeypatch.setattr(scene_writers, "get_context", lambda method: fork_server())
    monkeypatch.setattr(scene_writers, "LESSONS_PER_TASK", 8)
    for name, workers in (("alone", 0), ("two", 2)):
        write_lessons(tmp_path / name, atlas, world, 0, 30, workers=workers)
    alone, two = (sorted(tmp_path.glob(f"{name}/**/*.*")) for name in ("alone", "two"))
    assert [path.name for path in alone] == [path.name for path in two]
    for one, other in zip(alone, two, strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes()


def row(category: str, unit: str, answer: str) -> Row:
    return Row(index=f"{category}{unit}{answer}", question="", answer=answer, category=category,
               unit=unit)  # fmt: skip


def test_scores_by_hand() -> None:
    rows = [
        row("count", "a", "Yes"),
        row("count", "a", "No"),
        row("count", "b", "Yes"),
        row("count", "b", "No"),
        row("random", "c", "Yes"),
        row("random", "c", "No"),
    ]
    tally = accuracy_by_category(rows, ["Yes.", "no", "yes", "YES", "Not sure", "No, yes"])
    count, random = tally.categories["count"], tally.categories["random"]
    assert count == {"accuracy": 75.0, "accuracy+": 50.0, "rows": 4}
    assert random == {"accuracy": 0.0, "accuracy+": 0.0, "F1": 0.0, "rows": 2}
    assert tally.values() == {"mean": 37.5, "count": 75.0, "random": 0.0}
    assert tally.counts == {"right": 3, "wrong": 1, "unreadable": 2}
    assert len(tally.unreadable) == 2
    right = accuracy_by_category(rows, ["Yes", "No"] * 3)
    assert right.categories["random"]["F1"] == 100
    assert next(iter(right.values().items())) == ("mean", 100.0)
    only_yes = accuracy_by_category(rows, ["Yes"] * 6)
    assert only_yes.categories["random"]["F1"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("category", (*SPLITS, *PAIRS))
def test_blind_baseline_is_at_chance(world: World, category: str) -> None:
    pytest.importorskip("sklearn")
    found = blind_accuracy(world, category_draws(world)[category], category, [0], 1500)
    # Four standard deviations of a fair coin; the control below exceeds them by far.
    assert abs(found.accuracy - 50) < 100 * 4 * 0.5 / 1500**0.5


def test_blind_baseline_finds_a_leak(world: World) -> None:
    pytest.importorskip("sklearn")
    assert blind_accuracy(world, ask_with_bias, "control", [0], 600).accuracy >= 70


def test_exact_binomial_test() -> None:
    pytest.importorskip("scipy")
    assert BlindResult(50, 100).p == 1
    assert BlindResult(5, 10).accuracy == 50
    # Ten of ten: 2 / 2^10.
    assert BlindResult(10, 10).p == pytest.approx(2 / 1024)


def test_missing_scikit_learn_names_the_extra(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(Exception, match=r"pip install 'mmmamba\[scenes\]'"):
        blind_baseline.predict_answers([], [])


def test_commands(tmp_path: Path) -> None:
    run = CliRunner()
    words = ["build", "--out", str(tmp_path / "s"), "--pictures", "1", "--lessons", "2", "--json"]
    done = run.invoke(command, words)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["questions"] == 6 * len(SPLITS) + 2 * len(PAIRS)
    csv.field_size_limit(CSV_LIMIT)
    with (tmp_path / "s" / "SCENES.tsv").open() as handle:
        assert len(list(csv.DictReader(handle, delimiter="\t"))) == said["questions"]
    lines = (tmp_path / "s" / "lessons.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"].split("-")[1] for line in lines} == {"0", "1"}
    again = run.invoke(command, words)
    assert again.exit_code != 0
    assert "exists" in str(again.exception)
    mine = tmp_path / "s" / "pictures" / "mine.txt"
    mine.write_text("mine")
    again = run.invoke(command, [*words, "--overwrite"])
    assert again.exit_code != 0 and mine.is_file()
    assert "did not write: pictures/mine.txt" in str(again.exception)
    mine.unlink()
    assert run.invoke(command, [*words, "--overwrite"]).exit_code == 0
    sheet = tmp_path / "sheet.png"
    done = run.invoke(command, ["sheet", "--out", str(sheet), "--rows", "2", "--style", "fluent"])
    assert done.exit_code == 0, done.output
    assert Image.open(sheet).size == (8 * 226, 2 * 226)
    assert "position: Is the" in done.stdout
    done = run.invoke(command, ["sheet", "--out", str(tmp_path / "s" / "SCENES.tsv")])
    assert done.exit_code != 0 and "SCENES.tsv already exists" in str(done.exception)
    done = run.invoke(command, ["sheet", "--out", str(tmp_path), "--overwrite"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "is a folder (give a file, as in --out sheet.png)" in str(done.exception)


def test_blind_command_reports_the_leak() -> None:
    pytest.importorskip("sklearn")
    done = CliRunner().invoke(command, ["blind", "--questions", "300", "--seeds", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert "guessing: 0/17 categories" in done.stderr
    assert "guessing: 17/17 categories" in done.stderr
    table = json.loads(done.stdout)
    assert set(table) == {"noto", "fluent", "leaky control"}
    assert set(table["noto"]) == {*SPLITS, *PAIRS}
    assert table["leaky control"]["count"]["accuracy"] >= 70
    assert all(one["n"] == 300 for split in table.values() for one in split.values())
