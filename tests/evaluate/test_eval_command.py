"""`mmmamba eval` with a scripted model, a small real one, a teacher, and prediction files."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import openpyxl
import pytest
from ended import Command
from PIL import Image
from suite_tables import ScriptedModel, mme_rows, write_tsv

from mmmamba_cli import runs
from mmmamba_cli.evaluate import EncodedPrompt, EvalPrompt, model_adapter
from mmmamba_cli.evaluate.result import read_result

MME_RIGHT = {"perception": 2000.0, "reasoning": 800.0}


def of_mme(prompt: EvalPrompt) -> bool:
    return "in the image?" not in prompt.text


def mostly_right(prompt: EvalPrompt) -> str:
    """MME: right but for "Nope" to the second question of each first picture. POPE: see below."""
    number = int(prompt.index)
    if of_mme(prompt):
        return "Yes" if number % 2 == 0 else "Nope" if number % 4 == 1 else "No"
    # Four questions per split, two of them with the answer yes.
    return ("Yes", "Not sure", "No", "Yes")[number % 4]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[str, ScriptedModel]:
    """Replace every checkpoint by a scripted model with the name of its folder."""
    made: dict[str, ScriptedModel] = {}

    def resolve(path: Path) -> SimpleNamespace:
        made.setdefault(path.name, ScriptedModel(mostly_right, name=path.name))
        return SimpleNamespace(name=path.name, origin="path")

    monkeypatch.setattr(runs, "resolve_path", resolve)
    monkeypatch.setattr(model_adapter, "load_eval_model", lambda found, *where: made[found.name])
    return made


def found(mmmamba: Command, *words: object) -> dict[str, Any]:
    done = mmmamba("eval", "--json", *words)
    assert done.code == 0, done.err
    loaded: dict[str, Any] = json.loads(done.out)
    return loaded


def by_rule(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {part["rule"]: part["metrics"] for part in result["rules"]}


def test_mme_and_pope_by_both_rules_with_a_scripted_model(
    mmmamba: Command, data: Path, tmp_path: Path, scripted: dict[str, ScriptedModel]
) -> None:
    out = tmp_path / "out"
    words = ["--suite", "mme,pope", "--model", "student", "--data", data, "--out", out]
    said = found(mmmamba, *words)
    mme, pope = said["results"]
    # VLMEvalKit cannot parse "Nope": 3 of 4 and 1 of 2 pairs in each category.
    assert by_rule(mme) == {
        "vlmevalkit": {"perception": 1250.0, "reasoning": 500.0},
        "internvl": MME_RIGHT,
    }
    # A split: yes is right, "Not sure" missed (or yes), no is right, yes is wrong.
    assert by_rule(pope)["vlmevalkit"] == pytest.approx(
        {"F1": 50.0, "accuracy": 50.0, "precision": 50.0, "recall": 50.0}
    )
    assert by_rule(pope)["internvl"]["F1"] == pytest.approx(80.0)
    assert mme["rules"][0]["counts"] == {"right": 42, "wrong": 0, "unreadable": 14}
    assert mme["rules"][0]["unreadable"][0] == {"index": "1", "answer": "Nope"}
    assert len(mme["rules"][0]["categories"]) == 14
    assert set(pope["rules"][0]["categories"]) == {"random", "popular", "adversarial"}
    assert len(scripted["student"].asked) == 68
    file = out / "student" / "mme" / "result.json"
    assert json.loads(file.read_text()) == mme
    assert read_result(file).model.name == "student"
    lines = (out / "student" / "pope" / "predictions.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["index", "question", "answer", "category", "prediction"]
    assert lines[2].endswith("\tYes\trandom\tNot sure")


def test_printed_tables(
    mmmamba: Command, data: Path, tmp_path: Path, scripted: dict[str, ScriptedModel]
) -> None:
    words = ["--suite", "mme,pope", "--model", "student", "--data", data, "--out", tmp_path]
    done = mmmamba("eval", *words, "--compare")
    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert ["student", "mme", "vlmevalkit", "perception", "1250.00"] in [w[:5] for w in lines]
    assert ["student", "mme", "internvl", "perception", "2000.00"] in [w[:5] for w in lines]
    assert ["artwork", "125.00", "75.00", "50.00", "4"] in lines
    published = ["HoVLE", "2.6B", "1433.5", "87.6", "mmMamba,", "arXiv", "2502.13145"]
    assert published in lines
    assert ["student", "1250.00", "80.00", "this", "run"] in lines
    assert (
        "student, mme by vlmevalkit: 14 of 56 answers could not be read, as 1: 'Nope'" in done.err
    )


def test_rule_option_known_and_unknown(
    mmmamba: Command, data: Path, tmp_path: Path, scripted: dict[str, ScriptedModel]
) -> None:
    words = ["--model", "student", "--data", data, "--out", tmp_path]
    said = found(mmmamba, "--suite", "pope", "--rule", "internvl", *words)
    assert list(by_rule(said["results"][0])) == ["internvl"]
    done = mmmamba("eval", "--suite", "pope", "--rule", "lmms", *words)
    assert done.code == 2
    assert "suite pope has no rule lmms, it has: internvl, vlmevalkit" in done.err


class Interrupted(ScriptedModel):
    """Ctrl-C in the middle of the third batch."""

    def generate(self, batch: Sequence[EncodedPrompt], max_new_tokens: int) -> list[str]:
        if len(self.batches) == 2:
            raise KeyboardInterrupt
        return super().generate(batch, max_new_tokens)


def test_interrupt_reports_cached_answers_and_resumes(
    mmmamba: Command, data: Path, tmp_path: Path, scripted: dict[str, ScriptedModel]
) -> None:
    scripted["student"] = Interrupted(mostly_right, name="student")
    out = tmp_path / "out"
    words = ["--suite", "mme", "--model", "student", "--data", data, "--out", out, "--batch", 8]
    done = mmmamba("eval", *words)
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-1] == (
        f"interrupted: 16 of 56 answers to mme are kept in {out / 'student' / 'mme'}; the same "
        "command goes on"
    )
    scripted["student"] = ScriptedModel(mostly_right, name="student")
    assert mmmamba("eval", *words).code == 0
    assert len(scripted["student"].asked) == 40


def test_interrupt_before_the_first_answer(
    mmmamba: Command,
    data: Path,
    tmp_path: Path,
    scripted: dict[str, ScriptedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*words: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_adapter, "load_eval_model", interrupt)
    out = tmp_path / "out"
    words = ["--suite", "mme", "--model", "student", "--data", data, "--out", out]
    done = mmmamba("eval", *words)
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-1] == (
        f"interrupted: student was not asked yet; answers that are kept in {out} stay, and the "
        "same command goes on"
    )
    monkeypatch.setattr("mmmamba_cli.evaluate.external_results.find_evaluator", lambda kit: None)
    done = mmmamba("eval", *words, "--with", "lm-eval")
    assert (done.code, done.out) == (130, "")
    assert "interrupted: lm-eval was asking student, whose scores are not written" in done.err
    assert not list(out.rglob("result.json"))


def test_animated_picture_uses_first_frame_with_warning(
    mmmamba: Command, data: Path, tmp_path: Path, scripted: dict[str, ScriptedModel]
) -> None:
    rows = mme_rows()
    file = io.BytesIO()
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    rows[2]["image"] = base64.b64encode(file.getvalue()).decode()
    write_tsv(data / "MME.tsv", rows)
    words = ["--suite", "mme", "--model", "student", "--data", data, "--out", tmp_path]
    done = mmmamba("eval", *words)
    assert done.code == 0
    said = [line for line in done.err.splitlines() if "frames" in line]
    assert re.match(r"warning: the image of row [23] \(", said[0])
    assert said[0].endswith(" bytes) has 2 frames or pages; the first is taken")
    assert "ImageNote" not in done.err and "image.seek" not in done.err


def test_several_models(
    mmmamba: Command, data: Path, tmp_path: Path, scripted: dict[str, ScriptedModel]
) -> None:
    words = ["--suite", "mme", "--data", data, "--out", tmp_path, "--model"]
    said = found(mmmamba, *words, "a/one", "--model", "b/two")
    assert [result["model"]["name"] for result in said["results"]] == ["one", "two"]
    done = mmmamba("eval", *words, "a/one", "--model", "b/one")
    assert done.code == 2
    assert "more than one model is called one" in done.err


def test_small_real_model_and_its_teacher(
    mmmamba: Command, data: Path, small_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    words = ["--suite", "mme,pope", "--run", run, "--data", data, "--max-new-tokens", 4]
    words += ["--device", "cpu"]
    done = mmmamba("eval", *words, "--teacher")
    assert done.code == 0, done.err
    assert "seed was never distilled end to end" in done.err
    folder = run / "evals" / "seed" / "mme"
    result = read_result(folder / "result.json")
    manifest = json.loads((run / "products/seed/manifest.json").read_text())
    assert result.model.content_hash == manifest["content_hash"]
    assert (result.model.kind, result.model.final) == ("linear", False)
    assert (result.settings["device"], result.settings["dtype"]) == ("cpu", "float32")
    assert result.data.used == 56
    first = (folder / "result.json").read_bytes()
    shutil.rmtree(folder)
    # One by one, in fp32: the same answers, so the same file.
    assert mmmamba("eval", *words, "--batch", 1).code == 0
    assert (folder / "result.json").read_bytes() == first
    answers = (folder / "predictions.tsv").read_text()
    assert len({line.rpartition("\t")[2] for line in answers.splitlines()}) > 10
    assert (run / "evals" / "teacher" / "pope" / "result.json").is_file()


def test_retention_with_intervals(
    mmmamba: Command, data: Path, small_run: Path, tmp_path: Path
) -> None:
    words = ["--suite", "mme", "--run", small_run, "--data", data, "--out", tmp_path]
    said = found(mmmamba, *words, "--teacher", "--choose")
    assert [result["model"]["name"] for result in said["results"]] == ["seed", "teacher"]
    parts = {part["rule"]: part for part in said["retention"]}
    assert set(parts) == {"internvl", "vlmevalkit"}
    for part in parts.values():
        assert part["ratio"] == pytest.approx(part["student_value"] / part["teacher_value"])
        low, high = part["interval"] or (part["ratio"], part["ratio"])
        assert low <= part["ratio"] <= high
    written = json.loads((tmp_path / "seed" / "mme" / "retention.json").read_text())
    assert written == said["retention"]
    # MME asks for yes and no: its answers are those of --choose.
    again = found(mmmamba, *words, "--teacher", "--answers", "likelihood")
    assert again == said
    assert {part["chance"] for part in said["retention"]} == {750.0}


def test_folder_that_is_not_a_run(mmmamba: Command, data: Path, tmp_path: Path) -> None:
    done = mmmamba("eval", "--suite", "mme", "--run", tmp_path / "none", "--data", data)
    assert done.code == 2
    assert "is not a run" in done.err


def write_answers(data: Path, folder: Path) -> dict[str, Path]:
    """The same answers to MME in each file type, without pictures, as other kits write them."""
    rows = [{k: v for k, v in row.items() if k != "image"} for row in mme_rows()]
    for row in rows:
        row["prediction"] = row["answer"]
    rows[3]["prediction"] = ""
    files = {"tsv": write_tsv(folder / "scripted_MME.tsv", rows)}
    files["jsonl"] = folder / "scripted_MME.jsonl"
    files["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    book = openpyxl.Workbook()
    assert book.active is not None
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append([value or None for value in row.values()])
    # The first index is the number 0, not an empty cell.
    book.active.cell(2, 1).value = 0
    files["xlsx"] = folder / "scripted_MME.xlsx"
    book.save(files["xlsx"])
    return files


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "xlsx"])
@pytest.mark.parametrize("with_table", [True, False])
def test_predictions_from_a_file(
    mmmamba: Command,
    data: Path,
    tmp_path: Path,
    kind: str,
    with_table: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LMUData", str(data if with_table else tmp_path / "nowhere"))
    file = write_answers(data, tmp_path / "given")[kind]
    said = found(mmmamba, "--suite", "mme", "--predictions", file, "--out", tmp_path)
    (result,) = said["results"]
    # One empty answer in "existence": 75 and 50 instead of 100 and 100.
    assert by_rule(result)["vlmevalkit"] == {"perception": 1925.0, "reasoning": 800.0}
    assert result["rules"][0]["unreadable"] == [{"index": "3", "answer": ""}]
    assert result["model"]["kind"] == "predictions"
    assert result["data"]["file"] == ("MME.tsv" if with_table else file.name)


def test_cached_answers_and_predictions_tsv_can_be_scored_again(
    mmmamba: Command, data: Path, tmp_path: Path, scripted: dict[str, ScriptedModel]
) -> None:
    first = found(
        mmmamba, "--suite", "mme", "--model", "m", "--data", data, "--out", tmp_path / "first"
    )
    (file,) = (tmp_path / "first" / "m" / "mme").glob("predictions-*.jsonl")
    for again in (file, tmp_path / "first" / "m" / "mme" / "predictions.tsv"):
        words = ["--suite", "mme", "--predictions", again, "--data", data, "--out", tmp_path]
        said = found(mmmamba, *words)
        assert said["results"][0]["rules"] == first["results"][0]["rules"]


def test_predictions_file_with_missing_rows(mmmamba: Command, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    lines = [json.dumps({"index": i, "prediction": "Yes"}) for i in range(56) if i not in (7, 9)]
    file.write_text("\n".join(lines))
    words = ["eval", "--suite", "mme", "--predictions", file, "--out", tmp_path]
    done = mmmamba(*words, "--data", data)
    assert done.code == 2
    assert f"{file} lacks 2 of 56 rows: index 7, 9" in done.err
    # Without the table, the file lacks columns.
    done = mmmamba(*words, "--data", tmp_path / "nowhere")
    assert done.code == 2
    assert "MME.tsv, which is not in" in done.err
    assert "--limit N" in mmmamba(*words, "--data", data).err
    assert mmmamba(*words, "--data", data, "--limit", 6).code == 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "index,prediction\n", "is not one of .tsv, .csv, .jsonl, .xlsx"),
        ("a.csv", "index,prediction\n", "has no predictions"),
        ("a.tsv", "index\tprediction\n0\tYes\n1\n", "row 2 has 1 cells, the heading has 2"),
        ("a.tsv", "index\tprediction\n0\tYes\tno\n", "row 1 has 3 cells, the heading has 2"),
        ("a.csv", "index,prediction\n0,Yes\n1,No, no\n", "row 2 has 3 cells, the heading has 2"),
        (
            "a.tsv",
            'index\tprediction\n0\t"Yes\n1\tNo\n',
            "quoted cell of the last row is never closed",
        ),
        ("a.tsv", "index\tprediction\tprediction\n0\tYes\tNo\n", "more than one column prediction"),
        ("a.tsv", "index\tprediction\n1\tYes\n1.0\tNo\n", "answers index 1 more than once"),
        ("a.tsv", "index\tanswer\n1\tYes\n", "row 1 lacks prediction; it has index, answer"),
        ("a.tsv", "index\tprediction\n", "has no predictions"),
        ("a.jsonl", '{"index": 1, "prediction": "x"}\n[1]\n', "line 2 is not a JSON object"),
        ("a.jsonl", '{"index": 1, "prediction": "x"}\nx\n', "line 2 is not JSON"),
        ("a.jsonl", '{"index": 1, "prediction": "x"}\n' * 2, "answers index 1 more than once"),
        ("a.xlsx", "no workbook", "is not an XLSX workbook"),
        ("missing.tsv", None, "does not exist"),
    ],
)
def test_invalid_predictions_files(
    mmmamba: Command, data: Path, tmp_path: Path, name: str, content: str | None, said: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    words = ["--suite", "mme", "--predictions", file, "--data", data, "--out", tmp_path]
    done = mmmamba("eval", *words)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def number_as(kind: str, number: int) -> Any:
    return float(number) if kind == "xlsx" else f"{number}.0"


@pytest.mark.parametrize("kind", ["tsv", "csv", "xlsx", "jsonl"])
@pytest.mark.parametrize("with_table", [True, False])
def test_decimal_indexes_in_predictions(
    mmmamba: Command, data: Path, tmp_path: Path, kind: str, with_table: bool
) -> None:
    """A data frame with a missing index writes all indexes as decimal numbers."""
    rows = [{k: v for k, v in row.items() if k != "image"} for row in mme_rows()]
    rows = [{**row, "index": number_as(kind, row["index"]), "prediction": "Yes"} for row in rows]
    file = tmp_path / f"answers.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "xlsx":
        write_book(file, [list(rows[0]), *(list(row.values()) for row in rows)])
    else:
        write_tsv(file, rows)
        if kind == "csv":
            file.write_text(file.read_text().replace("\t", ","))
    place = data if with_table else tmp_path / "nowhere"
    words = ["--suite", "mme", "--predictions", file, "--data", place, "--out", tmp_path]
    (result,) = found(mmmamba, *words)["results"]
    assert by_rule(result)["vlmevalkit"] == {"perception": 500.0, "reasoning": 200.0}


def write_book(file: Path, rows: list[list[Any]]) -> None:
    book = openpyxl.Workbook()
    assert book.active is not None
    for row in rows:
        book.active.append(row)
    book.save(file)


def test_decimal_indexes_in_a_table(mmmamba: Command, data: Path, tmp_path: Path) -> None:
    rows = mme_rows()
    for row in rows:
        row["index"] = f"{row['index']}.0"
        row["image"] = f"{row['image']}.0" if len(row["image"]) < 9 else row["image"]
    write_tsv(data / "MME.tsv", rows)
    file = tmp_path / "answers.jsonl"
    lines = [json.dumps({"index": row["index"], "prediction": "Yes"}) for row in mme_rows()]
    file.write_text("\n".join(lines))
    words = ["--suite", "mme", "--predictions", file, "--data", data, "--out", tmp_path]
    (result,) = found(mmmamba, *words)["results"]
    assert by_rule(result)["vlmevalkit"] == {"perception": 500.0, "reasoning": 200.0}


def test_workbook_rows(mmmamba: Command, data: Path, tmp_path: Path) -> None:
    """Empty cells at the end of a row are ignored; extra cells and repeated columns are errors."""
    file = tmp_path / "answers.xlsx"
    words = ["--suite", "mme", "--predictions", file, "--data", data, "--out", tmp_path]
    right = [[row["index"], row["answer"]] for row in mme_rows()]
    right[3] = [3, "=No"]
    write_book(file, [["index", "prediction"], right[0] + [None, None], *right[1:]])
    (result,) = found(mmmamba, *words)["results"]
    # An answer that looks like a formula is read as text.
    assert result["rules"][0]["counts"] == {"right": 56, "wrong": 0, "unreadable": 0}
    answers = (tmp_path / "answers/mme/predictions.tsv").read_text().splitlines()
    assert answers[4].endswith("\t=No")
    for rows, said in (
        ([["index", "prediction"], *right[:2], [2, "Yes", "No"]], "row 3 has 3 cells"),
        ([["index", "prediction", "index"], [1, "Yes", 2]], "more than one column index"),
    ):
        write_book(file, rows)
        done = mmmamba("eval", *words)
        assert (done.code, said in done.err) == (2, True), done.err


def test_partial_suite_is_marked_as_partial(mmmamba: Command, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "part.csv"
    rows = [row for row in mme_rows() if row["category"] in ("existence", "color")]
    file.write_text("index,prediction\n" + "".join(f"{r['index']},{r['answer']}\n" for r in rows))
    words = ["--suite", "mme", "--predictions", file, "--data", data, "--out", tmp_path]
    done = mmmamba("eval", *words, "--limit", 6)
    assert done.code == 0, done.err
    assert "mme: a part, 6 of 56 rows were asked" in done.err
    assert "nothing was asked of count, position, posters" in done.err
    lines = [line.split() for line in done.out.splitlines()]
    shown = next(line for line in lines if line[:2] == ["part.csv", "mme"])
    assert shown[3:5] == ["perception", "400.00"] and "part" in shown
    assert next(line for line in lines if line[:1] == ["reasoning"])[1:] == ["-", "-"]
    written = json.loads((tmp_path / "part/mme/result.json").read_text())
    assert written["rules"][0]["metrics"] == {"perception": 400.0, "reasoning": None}
    assert len(written["data"]["categories_not_asked"]) == 12


def test_workbook_without_openpyxl(
    mmmamba: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    file = write_answers(data, tmp_path)["xlsx"]
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    done = mmmamba("eval", "--suite", "mme", "--predictions", file, "--data", data)
    assert done.code == 2
    assert "pip install 'mmmamba[eval]'" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "mmee"], "no suite is called mmee"),
        (["--suite", ","], "--suite names no suite"),
        (["--suite", "mme", "--batch", "many"], "--batch is 'many', expected a number"),
        (["--suite", "mme", "--batch", "0"], "--batch is '0'"),
        (["--suite", "mme", "--model", "nothing"], "nothing"),
        (["--suite", "mme", "--with", "lmeval"], "give lm-eval or vlmeval; did you mean vlmeval?"),
        (["--suite", "mme", "--device", "tpu"], "device 'tpu' is not known"),
        (["--suite", "mme", "--dtype", "int3"], "dtype 'int3' is not known"),
        (["--suite", "mme", "--from", "stage9"], "has no product 'stage9', it has: seed"),
        (["--suite", "mme", "--teacher-path", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_options_give_one_sentence(
    mmmamba: Command, data: Path, small_run: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    given = ["--run", small_run, "--data", data, "--out", tmp_path / "out"]
    done = mmmamba("eval", *words, *given)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
