"""`mmmamba eval` with a scripted model, a small real one and its teacher."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest
from ended import Command
from eval_results import by_rule, found
from PIL import Image
from scripted_mme import mostly_right
from suite_tables import ScriptedModel, mme_rows, write_tsv

from mmmamba_cli.evaluate import EncodedPrompt, model_adapter
from mmmamba_cli.evaluate.result import read_result

MME_RIGHT = {"perception": 2000.0, "reasoning": 800.0}


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
    file = tmp_path / "seed" / "mme" / "retention.json"
    assert json.loads(file.read_text()) == said["retention"]
    # MME asks for yes and no: its answers are those of --choose.
    again = found(mmmamba, *words, "--teacher", "--answers", "likelihood")
    assert again == said
    assert {part["chance"] for part in said["retention"]} == {750.0}
    # It stays beside its own result, and goes with it.
    found(mmmamba, *words, "--choose")
    assert file.exists()
    found(mmmamba, *words)
    assert not file.exists()


def test_folder_that_is_not_a_run(mmmamba: Command, data: Path, tmp_path: Path) -> None:
    done = mmmamba("eval", "--suite", "mme", "--run", tmp_path / "none", "--data", data)
    assert done.code == 2
    assert "is not a run" in done.err


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
