"""The output of `mmmamba inspect`, as text and JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ended import Command, Done
from small import small_model
from terminals import Terminal

from mmmamba_cli.checkpoint import model_names
from mmmamba_cli.runs import resolved_model

Inspect = Callable[..., Done]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def inspect(mmmamba: Command) -> Inspect:
    return lambda *words: mmmamba("inspect", *words)


def test_a_product_is_described(inspect: Inspect, student_run: Path) -> None:
    done = inspect("seed", "--run", student_run)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("seed: linear, 0.1 M parameters")
    assert "layout     mmmamba, safetensors, 1 file, " in done.out
    assert "embedding  ··  layers 0 to 1" in done.out
    assert "language   ······  layers 2 to 7" in done.out
    assert "vision     tiles of 56 pixels, patches of 14" in done.out
    assert "At 103,424 tokens of context, one row" in done.out
    assert "all attention" in done.out
    assert "seed was never distilled end to end" in done.err


def test_mixers_that_are_not_the_default(
    inspect: Inspect, student_run: Path, tmp_path: Path
) -> None:
    assert "\nmixers  " not in inspect("seed", "--run", student_run).out
    small_model("dddk").save_pretrained(tmp_path)
    done = inspect(tmp_path)
    assert done.code == 0, done.err
    assert "\nmixers     Gated DeltaNet in layers 0-2\n" in done.out
    assert "\n           Kimi delta attention in layer 3\n" in done.out
    assert "decoding   token by token by generate: Kimi delta attention has no fast" in done.out
    # 4 heads of 8 x 8 in fp32.
    assert "4.0 KiB (4 x 1.0 KiB)" in done.out
    layers = {
        one["name"]: one["layers"] for one in json.loads(inspect(tmp_path, "--json").out)["mixers"]
    }
    assert layers == {"gated_delta": [0, 1, 2], "kda": [3]}


def test_options_of_mixers(inspect: Inspect, student_run: Path, tmp_path: Path) -> None:
    assert "\noptions " not in inspect("seed", "--run", student_run).out
    small_model("mwam", input_step=False, window=8).save_pretrained(tmp_path)
    done = inspect(tmp_path)
    shown = "options    input_step false, window 8, sinks 0, sink_logits false\n"
    assert shown in done.out, done.err
    reason = "Mamba-2 with mixer.input_step False has no fast decoding\n"
    assert f"decoding   token by token by generate: {reason}" in done.out


def test_default_is_the_current_product(inspect: Inspect, student_run: Path) -> None:
    seed = inspect("seed", "--run", student_run)
    assert inspect("--run", student_run).out == seed.out
    by_path = inspect(student_run / "products" / "seed")
    assert by_path.out == seed.out


def test_json_output(inspect: Inspect, student_run: Path, llama: Path) -> None:
    short = inspect("--run", student_run, "--json", "--context", "8k")
    assert json.loads(short.out)["context"] == 8192
    words = ("--run", student_run, "--json", "--context", 1000)
    found = json.loads(inspect("seed", *words).out)
    assert (found["name"], found["kind"], found["context"]) == ("seed", "linear", 1000)
    here, teacher = found["memory"]
    assert here["kv_cache"] == 0 < here["ssm_state"]
    # 8 layers, keys and values, 2 heads of 8, fp32.
    assert teacher["kv_cache"] == 8 * 2 * 2 * 8 * 1000 * 4
    half = json.loads(inspect("seed", *words, "--dtype", "bf16").out)["memory"][1]
    assert 2 * half["kv_cache"] == teacher["kv_cache"]
    only = json.loads(inspect(llama, "--json").out)
    assert len(only["memory"]) == 1
    assert "differences" not in only


def test_comparison_of_student_and_teacher(inspect: Inspect, student_run: Path) -> None:
    done = inspect("seed", "--run", student_run, "--against", "teacher", "--json")
    found = json.loads(done.out)["differences"]
    status = {one["name"]: one["status"] for one in found}
    assert status["model.layers.0.mlp.up_proj.weight"] == "equal"
    assert status["model.layers.0.mixer.A_log"] == "only here"
    same = inspect("seed", "--run", student_run, "--against", "seed")
    total = len(
        json.loads(inspect("seed", "--run", student_run, "--against", "seed", "--json").out)[
            "differences"
        ]
    )
    assert same.out.splitlines()[-1] == f"{total} of {total} tensors are equal"
    shown = inspect("seed", "--run", student_run, "--against", "teacher").out
    (row,) = [line.split() for line in shown.splitlines() if line.startswith("mixer.A_log ")]
    assert row == ["mixer.A_log", "only", "in", "a", "0-7", "-", "-"]


def test_a_product_takes_precedence_over_other_names(
    inspect: Inspect, student_run: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (llama.parent / "seed").symlink_to(llama)
    monkeypatch.chdir(llama.parent)
    monkeypatch.setattr(resolved_model, "shipped_models", lambda: {"small": llama})
    monkeypatch.setattr(model_names, "shipped_models", lambda: {"small": llama})

    def first(*words: object) -> str:
        return inspect(*words, "--json").out.partition('"kind": "')[2].partition('"')[0]

    assert first("seed", "--run", student_run) == "linear"
    assert first("./seed", "--run", student_run) == "all attention"
    assert first("small", "--run", student_run) == "all attention"
    # Without a run every name is a path, or a model that ships.
    assert first("seed", "--run", "nowhere") == first("small", "--run", "nowhere")
    missing = inspect("tiny", "--run", "nowhere")
    assert missing.code == 2
    assert missing.err.startswith("error: tiny does not exist (check the path, or give a model")


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_output_fits_the_terminal(student_run: Path, columns: int) -> None:
    terminal = Terminal(columns, "inspect", "--run", student_run, "--against", "teacher")
    shown = terminal.wait_for("tensors are equal")
    assert terminal.ended() == 0
    # A bar of progress is drawn over and over in its row.
    rows = [
        row.rpartition("\r")[2] for row in ESCAPES.sub("", shown).replace("\r\n", "\n").split("\n")
    ]
    assert max(map(len, rows)) <= columns
    assert "\x1b[1m" in shown
    words = " ".join(" ".join(rows).split())
    # A cell that is folded goes on in the next row, with other cells between.
    for whole in ("parameters", "without weights, ") if columns < 80 else ("mixer.dt_proj.weight",):
        assert whole in words


def test_no_color_disables_colours(
    student_run: Path,
) -> None:
    terminal = Terminal(80, "status", "--run", student_run, NO_COLOR="1")
    terminal.wait_for("seed")
    assert terminal.ended() == 0
    assert "[32m" not in terminal.text
    coloured = Terminal(80, "status", "--run", student_run)
    coloured.wait_for("[32m")
    assert coloured.ended() == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nothing",), "no product 'nothing', it has: seed"),
        (("no/where/at/all",), "no/where/at/all"),
        (("seed", "--context", 0), "--context: '0' is no length"),
        (("seed", "--context", "8k,1k"), "--context is 8k,1k, expected one length"),
        (("seed", "--dtype", "int8"), "dtype 'int8' is not known"),
        (("seed", "--against", "nothing"), "no product 'nothing'"),
    ],
)
def test_mistakes_are_sentences(
    inspect: Inspect, student_run: Path, words: tuple[object, ...], said: str
) -> None:
    done = inspect(*words, "--run", student_run)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert said in done.err


def test_module_does_not_shadow_the_standard_library() -> None:
    code = "import mmmamba_cli.cli.app, inspect; print(inspect.getsource is not None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
