"""The whole page: self-contained, well-formed, escaped, and complete."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from ended import Command
from PIL import Image
from report_case import HOSTILE, Balanced, answer, hash_of, product, write_run

from mmmamba_cli.errors import RunError
from mmmamba_cli.recipe import dump_recipe, load_recipe
from mmmamba_cli.reporting import build_page, read_report_data
from mmmamba_cli.reporting.provenance import side_by_side
from mmmamba_cli.reporting.suite_results import suite_results

Full = tuple[Path, Path, Path]
# Attributes that make a browser load a resource.
LOADING = ("src", "srcset", "data", "poster", "background", "action", "xlink:href")


@pytest.fixture(scope="module")
def page(full: Full) -> Balanced:
    run, other, data = full
    found = build_page(read_report_data(run, [other]), created="2026-01-10 00:00", data=data)
    assert found.left_out == {}
    return Balanced(found.html)


def rescored(run: Path, name: str, **part: object) -> None:
    """Edit the first rule's scores in a result."""
    file = run / "evals" / name / "scenes" / "result.json"
    value = json.loads(file.read_text())
    value["rules"][0] |= part
    file.write_text(json.dumps(value))


def test_scores_by_different_rules_are_flagged(full: Full, tmp_path: Path) -> None:
    source, _, data = full
    run = tmp_path / "run"
    shutil.copytree(source, run)

    def words() -> str:
        found = build_page(read_report_data(run, []), created="2026-01-10 00:00", data=data)
        return Balanced(found.html).text

    assert "no rule in common" not in words()
    # As an older version wrote it, and as the newest does.
    rescored(run, "teacher", rule="vlmevalkit", scoring="choice_rows")
    rescored(run, "linear-stage3", rule="vlmevalkit-2026-06", scoring="choice_rows_2026_06")
    said = words()
    assert (
        "no rule in common: teacher by “vlmevalkit-2025-08”, linear-stage3 by “vlmevalkit-2026-06”"
    ) in said
    # With a rule in common, that one is shown of both.
    file = run / "evals" / "linear-stage3" / "scenes" / "result.json"
    value = json.loads(file.read_text())
    older = {**value["rules"][0], "rule": "vlmevalkit-2025-08", "metrics": {"mean": 12.25}}
    value["rules"].append({**older, "metric": "mean", "intervals": {}})
    file.write_text(json.dumps(value))
    said = words()
    assert "no rule in common" not in said and "12.2" in said


def test_a_profile_of_earlier_weights_is_named(full: Full, tmp_path: Path) -> None:
    source, _, _ = full
    run = tmp_path / "run"
    shutil.copytree(source, run)
    file = run / "profile" / "profile.json"
    for content_hash, count in ((hash_of("linear-stage3"), 0), ("e" * 64, 1)):
        value = json.loads(file.read_text())
        value["subjects"][1]["content_hash"] = content_hash
        file.write_text(json.dumps(value))
        remarks = read_report_data(run).remarks
        assert len(remarks) == count, remarks
    assert remarks[0].startswith("linear-stage3 was made again after it was profiled")


def test_other_kits_results_are_named(full: Full, tmp_path: Path) -> None:
    source, _, _ = full
    run = tmp_path / "run"
    shutil.copytree(source, run)
    (run / "evals" / "teacher" / "lm-eval").mkdir()
    (run / "evals" / "teacher" / "lm-eval" / "result.json").write_text('{"kit": "lm-eval"}')
    (remark,) = read_report_data(run).remarks
    assert "has the scores of lm-eval" in remark


def test_page_has_no_scripts_and_no_external_resources(page: Balanced) -> None:
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), f"<{tag}> runs {key}"
            if key in LOADING:
                assert value is not None and value.startswith("data:image/jpeg;base64,")
            if key == "href":
                assert value is not None and value.startswith("#")
    style = "".join(data for tag, data in page.texts if tag == "style")
    assert "url(" not in style and "@import" not in style
    (policy,) = [m for m in page.all("meta") if m.get("http-equiv")]
    assert (policy["content"] or "").startswith("default-src 'none'")


def test_answers_are_escaped(page: Balanced) -> None:
    # In the lead's pictures and among all answers.
    assert page.text.count(HOSTILE) == 2
    assert not [a for a in page.all("img") if a.get("src") == "x"]


def test_images_are_those_of_the_table_and_have_alt_texts(page: Balanced) -> None:
    pictures = page.all("img")
    assert len(pictures) == 4
    colours = []
    for one in pictures:
        assert "category" in (one["alt"] or "")
        image = Image.open(io.BytesIO(base64.b64decode((one["src"] or "").split(",")[1])))
        assert image.size == (40, 30)
        colours.append(image.getpixel((20, 15))[0])
    # The first picture of each of the two categories, in the lead and among all answers.
    assert [round(colour / 40) for colour in colours] == [0, 1, 0, 1]
    assert all(svg.get("aria-label") for svg in page.all("svg") if svg.get("role") == "img")
    assert all(s.get("role") == "img" or s.get("aria-hidden") for s in page.all("svg"))


def test_right_and_wrong_are_marked_in_words(page: Balanced) -> None:
    words = [data for _, data in page.texts if data in ("right: ", "wrong: ")]
    # Two examples of two questions. The lead asks teacher and student, of which the student is
    # wrong once; the examples ask three models, of which the unseeded one misses every Yes.
    assert (words.count("right: "), words.count("wrong: ")) == (7 + 9, 1 + 3)


def test_constant_answers_and_differences_are_named(page: Balanced) -> None:
    assert "linear-stage3 (other) answered 'No' to all 20 questions" in page.text
    assert "linear-stage3 is 45.0 points above linear-stage3 (other)" in page.text


def test_equal_answers_are_no_difference(full: Full, tmp_path: Path) -> None:
    run, source, data = full
    other = tmp_path / "other"
    shutil.copytree(source, other)
    shutil.rmtree(other / "evals")
    answer(
        other, data, "linear-stage3", ["Yes", HOSTILE, *["Yes", "No"] * 9], hash_of("linear-stage3")
    )
    page = build_page(read_report_data(run, [other]), created="now", data=data)
    text = Balanced(page.html).text
    assert "linear-stage3 and linear-stage3 (other) gave the same answers" in text
    assert "may be chance" not in text


def test_commands_are_listed_by_run_and_recipes_compared(
    full: Full, page: Balanced, tmp_path: Path
) -> None:
    assert side_by_side(read_report_data(full[0], [full[1]])) is None
    # Made between the products of the main run.
    third = write_run(tmp_path / "third", [product("linear-stage3", 2, None, "stage3")])
    sentence = side_by_side(read_report_data(full[0], [third]))
    assert (sentence or "").startswith("The runs main and third were made at the same time")
    assert "Lines of one panel have the same recipe for their stage." in page.text
    another = write_run(tmp_path / "another", [product("made-there", 2, None, "stage3")])
    both = build_page(read_report_data(full[0], [another]), created="now").html
    headings = [text for name, text in Balanced(both).texts if name == "h3"]
    assert headings[-2:] == ["main", "another"]


def test_lineage_does_not_show_the_path_of_the_teacher(page: Balanced) -> None:
    assert "my-teacher" in page.text and "/somewhere/" not in page.text
    assert hash_of("stage1")[:12] in page.text
    for name in ("seed", "stage1", "linear-stage3"):
        assert f"mmmamba make {name}" in page.text


def test_curves_of_a_stage_are_in_one_panel(page: Balanced) -> None:
    labels = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("role") == "img"]
    (stage3,) = [label for label in labels if label.startswith("stage3: ")]
    assert "linear-stage3: 2 at 1 to 0.5 at 3; linear-stage3 (other): 3 at 1" in stage3


def test_parts_without_content_are_left_out_and_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [product("seed", 1)])
    found = build_page(read_report_data(run), created="now")
    assert set(found.left_out) == {"scores and examples", "losses", "costs"}
    page = Balanced(found.html)
    assert "mmmamba profile" in page.text and "What is not on this page" in page.text
    assert not page.all("svg")


def test_a_missing_table_leaves_out_the_examples(full: Full, tmp_path: Path) -> None:
    run, _, _ = full
    found = build_page(read_report_data(run), created="now", data=tmp_path)
    assert list(found.left_out) == ["examples, scenes"]
    assert "scores, scenes" in found.shown and "examples, scenes" not in found.shown


def test_another_table_is_rejected(full: Full, tmp_path: Path) -> None:
    run, _, data = full
    text = (data / "SCENES.tsv").read_text().replace("Question 1?", "Question 1, altered?")
    (tmp_path / "SCENES.tsv").write_text(text)
    found = build_page(read_report_data(run), created="now", data=tmp_path)
    assert "is not the table" in found.left_out["examples, scenes"]


@pytest.mark.parametrize(
    ("name", "left"), [("linear-stage3", "teacher"), ("teacher", "linear-stage3")]
)
def test_answers_of_earlier_weights_are_left_out(
    name: str, left: str, full: Full, tmp_path: Path
) -> None:
    run, _, data = full
    shutil.copytree(run, tmp_path / "run")
    answer(tmp_path / "run", data, name, ["Yes"] * 20, content_hash="e" * 64)
    report = read_report_data(tmp_path / "run")
    assert [one.label for one in report.evaluated] == [left]
    assert "was made again" in build_page(report, created="now", data=data).html


def test_a_damaged_file_is_named_and_the_rest_is_shown(full: Full, tmp_path: Path) -> None:
    run, _, data = full
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/profile/profile.json").write_text("{")
    (tmp_path / "run/comparisons").mkdir()
    (tmp_path / "run/comparisons/x.json").write_text(json.dumps({"format": 1}))
    found = build_page(read_report_data(tmp_path / "run"), created="now", data=data)
    assert "costs" in found.left_out and "scores, scenes" in found.shown
    assert "profile.json is not valid JSON" in found.html
    assert "x.json is damaged" in found.html


def test_runs_of_one_name_are_rejected(full: Full) -> None:
    run, other, _ = full
    with pytest.raises(RunError, match="two runs to compare with are called other, other"):
        read_report_data(run, [other, other])


def test_a_run_is_not_compared_with_itself(full: Full) -> None:
    run, other, _ = full
    with pytest.raises(RunError, match="would be compared with itself"):
        read_report_data(run, [other, run.parent / "." / run.name])


def test_the_command_writes_one_file(full: Full, tmp_path: Path, mmmamba: Command) -> None:
    run, other, data = full
    words = ("--run", run, "--beside", other, "--data", data, "--title", "<A & B>", "--json")
    done = mmmamba(
        "report", *words, "--note", "Mind this.", "--out", tmp_path / "new" / "page.html"
    )
    assert done.code == 0
    told = json.loads(done.out)
    text = Path(told["file"]).read_text(encoding="utf-8")
    page = Balanced(text)
    assert [data for tag, data in page.texts if tag == "h1"] == ["<A & B>"]
    assert "<title>&lt;A &amp; B&gt;</title>" in text
    assert "Mind this." in page.text
    assert told["left_out"] == {} and "costs" in told["shown"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["page.html"]
    assert re.search(r"https?://", text) is None


def test_page_contains_no_path_of_this_machine(full: Full, tmp_path: Path) -> None:
    """Commands, recipes that fold their lines, and remarks."""
    run = tmp_path / "secret-place" / "run"
    shutil.copytree(full[0], run)
    for file in run.glob("products/*/manifest.json"):
        raw = json.loads(file.read_text())
        long = f"/home/someone/{'a folder/' * 12}my: data.jsonl"
        recipe = dump_recipe(load_recipe("smoke", (), {"data.train": long}))
        command = shlex.join(["mmmamba", "distill", "--data", long, f"--set=x={long}"])
        file.write_text(json.dumps(raw | {"recipe": recipe, "command": command, "final": None}))
    (run / "profile/profile.json").write_text("no JSON")
    found = build_page(read_report_data(run), created="now", data=full[2])
    text = Balanced(found.html).text
    assert "my: data.jsonl" in text and "not known" in text
    assert "profile.json is not valid JSON" in text
    for word in ("someone", "a folder", "secret-place", str(tmp_path)):
        assert word not in text


def test_only_a_report_is_replaced(full: Full, tmp_path: Path, mmmamba: Command) -> None:
    run, _, _ = full
    file = tmp_path / "thesis.html"
    file.write_text("<html>mine</html>")
    done = mmmamba("report", "--run", run, "--out", file)
    assert done.code == 2 and "thesis.html exists and is not a report of mmmamba" in done.err
    assert file.read_text() == "<html>mine</html>"
    done = mmmamba("report", "--run", run, "--out", tmp_path)
    assert done.code == 2 and "is a folder" in done.err
    file.unlink()
    for _ in range(2):
        assert mmmamba("report", "--run", run, "--out", file).code == 0


def test_a_folder_without_a_run(tmp_path: Path, mmmamba: Command) -> None:
    done = mmmamba("report", "--run", tmp_path / "nothing")
    assert done.code == 2 and "is not a run" in done.err
    assert not (tmp_path / "nothing").exists()


def test_shipped_models_are_labelled_without_the_run(full: Full, tmp_path: Path) -> None:
    run, other, data = full
    asked = shutil.copytree(other, tmp_path / "other")
    for name in ("scenes-linear", "elsewhere"):
        answer(asked, data, name, ["Yes"] * len((data / "SCENES.tsv").read_text().splitlines()[1:]))
    labels = read_report_data(run, [asked]).labels
    assert {"scenes-linear", "elsewhere (other)"} <= set(labels)


def test_chosen_and_generated_answers_are_not_compared(full: Full, tmp_path: Path) -> None:
    source, _, data = full
    run = tmp_path / "run"
    shutil.copytree(source, run)
    (before,) = suite_results(read_report_data(run), data)
    assert len(before.results) == 2 and before.kept
    file = run / "evals" / "linear-stage3" / "scenes" / "result.json"
    value = json.loads(file.read_text())
    value["settings"]["answers"] = "chosen by likelihood"
    file.write_text(json.dumps(value))
    (after,) = suite_results(read_report_data(run), data)
    assert (len(after.results), len(after.others)) == (1, 1)
