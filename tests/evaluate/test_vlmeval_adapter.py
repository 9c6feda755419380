"""The VLMEvalKit adapter against a stand-in package with the kit's interface."""

from __future__ import annotations

import json
import ssl
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ended import Command
from suite_tables import ScriptedModel, mme_rows, picture, write_tsv
from vlmeval_stand_in import write_package

from mmmamba_cli.evaluate import find_evaluator, find_suite

find_evaluator("vlmeval")
import mmmamba_evals.vlmeval_adapter as adapter  # noqa: E402

WORD = "Answer the question using a single word or phrase."
LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
MISSING = float("nan")


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(write_package(tmp_path / "kit")))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "vlmeval"]:
        del sys.modules[name]


def built(model: ScriptedModel | None = None, **options: Any) -> Any:
    return adapter.register("ours", model or ScriptedModel(lambda prompt: "Yes"), **options)()


def test_registration_keeps_certificate_verification(kit: None) -> None:
    before = ssl._create_default_https_context
    model = built()
    from vlmeval.config import supported_VLM
    from vlmeval.vlm.base import BaseModel

    assert isinstance(supported_VLM["ours"](), BaseModel)
    assert model.INTERLEAVE
    assert ssl._create_default_https_context is before


# Data set, line, and the exact prompt.
PROMPTS: list[tuple[str, dict[str, Any], str]] = [
    (
        "MME",
        {"question": "Is it? Please answer yes or no."},
        f"Is it? Please answer yes or no.{WORD}",
    ),
    ("POPE", {"question": "Is it? Please answer yes or no."}, f"Is it?\n{WORD}"),
    (
        "HallusionBench",
        {"question": "Is it?"},
        f"Is it? Please answer yes or no. {WORD}",
    ),
    (
        "MMBench_DEV_EN",
        {"question": "Q?", "hint": "H.", "A": "x", "B": 2, "C": MISSING, "D": MISSING},
        f"H.\nQ?\nA. x\nB. 2\n{LETTER_INSTRUCTION}",
    ),
    (
        "MMStar",
        {"question": "Q?", "hint": MISSING, "A": "x", "B": "y"},
        f"Q?\nA. x\nB. y\n{LETTER_INSTRUCTION}",
    ),
    ("MMMU_DEV_VAL", {"question": "Q?"}, "Q?\nAnswer the question directly."),
    (
        "MMBench_DEV_EN",
        {"question": "问？", "A": "x", "B": "y"},
        "问？\nA. x\nB. y\n请直接回答选项字母。",
    ),
    ("TextVQA_VAL", {"question": "Q?"}, f"Q?\n{WORD}"),
    ("ChartQA_TEST", {"question": "Q?"}, f"Q?\n{WORD}"),
    ("DocVQA_VAL", {"question": "Q?"}, f"Q?\n{WORD}"),
    ("InfoVQA_VAL", {"question": "Q?"}, f"Q?\n{WORD}"),
    ("OCRBench", {"question": "Q?"}, f"Q?\n{WORD}"),
    ("MMVet", {"question": "Q?"}, "Q?"),
    ("MathVista_MINI", {"question": "Q?"}, "Q?"),
]
TILES = {
    "MME": 6,
    "POPE": 6,
    "HallusionBench": 6,
    "MMMU_DEV_VAL": 12,
    "MMMU_TEST": 12,
    "ChartQA_TEST": 12,
    "DocVQA_VAL": 18,
    "InfoVQA_VAL": 24,
    "OCRBench": 24,
    "SEEDBench_IMG": 6,
}


@pytest.mark.parametrize(("dataset", "line", "expected"), PROMPTS)
def test_prompts(kit: None, dataset: str, line: dict[str, Any], expected: str) -> None:
    model = built()
    model.set_dump_image(lambda line: ["/a.jpg"])
    assert model.use_custom_prompt(dataset)
    assert model.build_prompt({"index": 1, **line}, dataset) == [
        {"type": "text", "value": expected},
        {"type": "image", "value": "/a.jpg"},
    ]


def test_unknown_data_set_uses_the_kits_prompt(kit: None) -> None:
    assert not built().use_custom_prompt("LLaVABench")


@pytest.mark.parametrize(("dataset", "tiles"), TILES.items())
def test_tiles(kit: None, tmp_path: Path, dataset: str, tiles: int) -> None:
    import base64

    file = tmp_path / "a.png"
    file.write_bytes(base64.b64decode(picture(1)))
    scripted = ScriptedModel(lambda prompt: "fine")
    message = [{"type": "text", "value": "Q"}, {"type": "image", "value": str(file)}]
    assert built(scripted).generate(message, dataset) == "fine"
    (prompt,) = scripted.asked
    assert prompt.max_tiles == tiles
    assert prompt.pictures[0].enlarge == (2 if "MMMU" in dataset else 1)
    built(scripted, max_tiles=3).generate(message, dataset)
    assert scripted.asked[1].max_tiles == 3


def text(value: str) -> dict[str, str]:
    return {"type": "text", "value": value}


IMAGE = {"type": "image", "value": "a.png"}
HEAD = "Image-1: <image>\nImage-2: <image>\n"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ([text("Q"), IMAGE], "<image>\nQ"),
        ([IMAGE, text("Q"), text("R")], "<image>\nQ\nR"),
        ([text("Q")], "Q"),
        ([text("Q"), IMAGE, IMAGE], f"{HEAD}Q"),
        (
            [text("See "), IMAGE, text(" and "), IMAGE, text(".")],
            f"{HEAD}See <Image-1> and <Image-2>.",
        ),
    ],
)
def test_messages(message: list[dict[str, str]], expected: str) -> None:
    assert adapter.message_text(message) == expected


def test_evaluation_with_the_kit(
    kit: None, tmp_path: Path, small_run: Path, mmmamba: Command
) -> None:
    data = tmp_path / "data"
    write_tsv(data / "MME.tsv", mme_rows(pairs=1))
    words = ["--suite", "mme", "--run", small_run, "--data", data, "--out", tmp_path / "out"]
    # In fp32, answers do not depend on the batch.
    words += ["--device", "cpu"]
    done = mmmamba("eval", *words, "--with", "vlmeval", "--max-new-tokens", 3, "--json")
    assert done.code == 0, done.err
    (found,) = json.loads(done.out)
    assert (found["kit"], found["model"]) == ("vlmeval", "seed")
    assert set(found["scores"]) == {"MME"}
    assert 0 <= found["scores"]["MME"]["Overall"] <= 100
    folder = tmp_path / "out" / "seed" / "vlmeval"
    assert json.loads((folder / "result.json").read_text()) == found
    (file,) = folder.glob("MME-*/seed_MME.tsv")
    answers = file.read_text()
    # The same answers as with the suite's runner, which has the same prompts.
    assert mmmamba("eval", *words, "--max-new-tokens", 3).code == 0
    ours = (tmp_path / "out/seed/mme/predictions.tsv").read_text().splitlines()[1:]
    assert len(ours) == 28
    assert [line.rpartition("\t")[2] for line in ours] == [
        line.rpartition("\t")[2] for line in answers.splitlines()[1:]
    ]


def test_perfect_model(kit: None, tmp_path: Path, monkeypatch: Any) -> None:
    write_tsv(tmp_path / "MME.tsv", mme_rows(pairs=1))
    model = ScriptedModel(lambda prompt: "No" if " no 1" in prompt.text else "Yes")
    from mmmamba_cli.evaluate import EvalOptions

    monkeypatch.delenv("LMUData", raising=False)
    scores = adapter.evaluate(model, ["MME"], EvalOptions(data=tmp_path), tmp_path / "out")
    assert scores == {"MME": {"Overall": 100.0}}
    import os

    assert "LMUData" not in os.environ
    assert {prompt.max_tiles for prompt in model.asked} == {find_suite("mme").max_tiles}


def test_answers_of_another_model_or_table_are_not_reused(
    kit: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmmamba_cli.evaluate import EvalOptions

    write_tsv(tmp_path / "MME.tsv", mme_rows(pairs=1))
    monkeypatch.delenv("LMUData", raising=False)

    def asked(name: str, **options: Any) -> int:
        model = ScriptedModel(lambda prompt: "Yes", name=name)
        adapter.evaluate(model, ["MME"], EvalOptions(data=tmp_path, **options), tmp_path / "out")
        return len(model.asked)

    assert (asked("one"), asked("one"), asked("one", max_tiles=2)) == (28, 0, 28)
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "style_of", lambda *_: adapter.DatasetStyle(adapter.PromptStyle()))
        assert asked("one") == 28
    other = ScriptedModel(lambda prompt: "Yes", name="one")
    other.identity = replace(other.identity, content_hash="other weights")
    adapter.evaluate(other, ["MME"], EvalOptions(data=tmp_path), tmp_path / "out")
    assert len(other.asked) == 28
    write_tsv(tmp_path / "MME.tsv", mme_rows(pairs=2))
    assert asked("one") == 56


def test_missing_vlmeval_gives_pip_line(
    small_run: Path, tmp_path: Path, mmmamba: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vlmeval", None)
    words = ["--run", small_run, "--out", tmp_path, "--with", "vlmeval"]
    done = mmmamba("eval", "--suite", "mme", *words)
    assert done.code == 2
    assert "VLMEvalKit cannot be imported" in done.err
    assert "git+https://github.com/open-compass/VLMEvalKit" in done.err


def test_unknown_data_set(kit: None, small_run: Path, tmp_path: Path, mmmamba: Command) -> None:
    words = ["--run", small_run, "--out", tmp_path, "--data", tmp_path, "--with", "vlmeval"]
    done = mmmamba("eval", "--suite", "Nothing", *words)
    assert (done.code, "has no data set Nothing" in done.err) == (2, True)
    done = mmmamba("eval", "--suite", "MME", "--limit", 4, *words)
    assert (done.code, "leave out --limit" in done.err) == (2, True)
