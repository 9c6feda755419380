"""`mmmamba inspect --stability`: text, JSON, files, and input that is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ended import Command

from mmmamba_cli.stability import read_stability

TOKENS = ("--tokens", "128")


@pytest.fixture(scope="module")
def own_run(student_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stability") / "run"
    shutil.copytree(student_run, folder)
    return folder


def test_a_product_is_measured(mmmamba: Command, own_run: Path) -> None:
    words = ("inspect", "seed", "--run", own_run, "--stability", *TOKENS)
    done = mmmamba(*words)
    assert done.code == 0, done.err
    assert "seed: stability over 128 tokens of the installed text" in done.out
    assert "remembers longest: half of a state is left after" in done.out
    assert "The text is too short for a slope over its length." in done.out
    assert "have a decay that does not depend on the input." in done.out
    assert "bf16 against fp32: logits at the same tokens" in done.out
    file = own_run / "stability" / "seed" / "stability.json"
    assert f"written to {file.parent}" in done.err
    record = read_stability(file)
    assert (record.name, record.tokens, record.seed) == ("seed", 128, 0)
    assert [layer.mixer for layer in record.layers] == ["Mamba-2"] * 8
    assert all(head.is_constant for layer in record.layers for head in layer.heads)
    assert record.precision is not None and record.precision.dtype == "bf16"
    assert [one.what for one in record.deviations] == ["input", "state"]
    assert record.tangents is None


def test_a_product_is_compared_with_its_start(
    mmmamba: Command, own_run: Path, tmp_path: Path
) -> None:
    """Decays that no stage has changed are those of the seeded student."""
    run = tmp_path / "run"
    shutil.copytree(own_run, run)
    done = mmmamba("hybridize", "--run", run, "--layers", "2")
    assert done.code == 0, done.err
    name = json.loads((run / "run.json").read_text(encoding="utf-8"))["current"]
    words = ("--stability", *TOKENS, "--perturb", 0)
    done = mmmamba("inspect", "--run", run, *words)
    assert done.code == 0, done.err
    layers = read_stability(run / "stability" / name / "stability.json").layers
    assert [layer.layer for layer in layers if layer.decay is None] == [2]
    heads = [head for layer in layers for head in layer.heads]
    assert len(heads) == 7 * 4
    for head in heads:
        assert head.start == pytest.approx(head.exponent, rel=1e-6)


def test_json_has_all_numbers(mmmamba: Command, own_run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text of words " * 40, encoding="utf-8")
    words = ("--stability", "--text", text, "--perturb", 0, "--against-dtype", "fp16")
    done = mmmamba("inspect", "teacher", "--run", own_run, *words, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found == json.loads((tmp_path / "stability.json").read_text(encoding="utf-8"))
    assert found["text"] == "text.txt"
    assert found["precision"]["dtype"] == "fp16"
    assert found["deviations"] == []
    attention = {(one["mixer"], one["forgetting"]) for one in found["layers"]}
    assert attention == {("attention", "keeps the key and value of every token")}
    assert not (own_run / "stability" / "teacher").exists()


def test_int8_weights_are_compared_with_fp32(
    mmmamba: Command, own_run: Path, tmp_path: Path
) -> None:
    words = ("--stability", *TOKENS, "--against-dtype", "int8", "--out", tmp_path, "--json")
    done = mmmamba("inspect", "seed", "--run", own_run, *words)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["precision"]["dtype"] == "int8"
    assert 0 < found["precision"]["median_kl"] < 0.1
    assert found["deviations"][0]["dtype"] == "bf16"
    pictures = ("deviation-input", "deviation-state", "half-lives", "precision")
    assert sorted(file.stem for file in tmp_path.glob("*.svg")) == sorted(pictures)


def test_layers_without_a_decay_have_no_tangents(
    mmmamba: Command, own_run: Path, tmp_path: Path
) -> None:
    words = ("--stability", *TOKENS, "--tangent", 1, "--perturb", 0, "--out", tmp_path)
    done = mmmamba("inspect", "teacher", "--run", own_run, *words)
    assert done.code == 0, done.err
    assert "8 of 8 layers have attention, which keeps the key and value of every" in done.out
    assert "not measured: exponents by tangents: 8 layers have attention" in done.out


def test_conversations_are_read_without_pictures(
    mmmamba: Command, own_run: Path, tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": "<image>\nhow many?"}, {"from": "gpt", "value": "seven"}]
    row = json.dumps({"conversations": turns * 20, "image": None})
    data = tmp_path / "rows.jsonl"
    data.write_text(f"{row}\n" * 3, encoding="utf-8")
    words = ("--stability", "--data", data, "--perturb", 0, "--out", tmp_path, "--json")
    done = mmmamba("inspect", "seed", "--run", own_run, *words)
    assert done.code == 0, done.err
    assert json.loads(done.out)["text"] == "rows.jsonl"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens", "64"), "--tokens is an option of --stability"),
        (("--stability", "--context", "8k"), "--context cannot be used with --stability"),
        (("--stability", "--against", "seed"), "--against cannot be used with --stability"),
        (("--stability", "--tokens", "1m"), "expected at least 1,048,576"),
        (("--stability", "--tokens", "63"), "63 tokens are too few to measure (give 64 or more)"),
        (("--stability", "--tokens", "1,2"), "--tokens is 1,2, expected one length"),
        (("--stability", "--text", "{short}"), "short.txt has 4 tokens, expected at least 64"),
        (("--stability", "--text", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("--stability", "--text", "{binary}"), "binary.txt is not text in UTF-8 (byte 0)"),
        (("--stability", "--text", "a", "--data", "b"), "--text and --data were given"),
        (("--stability", "--against-dtype", "fp32"), "expected a dtype narrower than fp32"),
        (("--stability", "--against-dtype", "int3"), "dtype 'int3' is not known"),
    ],
)
def test_bad_input_is_named(
    mmmamba: Command, own_run: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "short.txt").write_text("abc", encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    places = {"short": tmp_path / "short.txt", "binary": tmp_path / "binary.txt"}
    given = [word.format(**places) for word in words]
    done = mmmamba("inspect", "seed", "--run", own_run, "--out", tmp_path / "out", *given)
    if "--stability" not in words:
        done = mmmamba("inspect", "seed", "--run", own_run, *given)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_found_before_measuring(
    mmmamba: Command, own_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    words = ("--stability", *TOKENS, "--out", tmp_path / "out" / "deep")
    done = mmmamba("inspect", "seed", "--run", own_run, *words)
    assert done.code == 2 and "measuring" not in done.err
    assert f"{tmp_path / 'out'} is not a folder (give another --out)" in done.err
