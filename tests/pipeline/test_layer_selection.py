"""`mmmamba hybridize --select`: scores on disk, resuming, budgets, the product's record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.layer_selection import selection
from mmmamba_cli.layer_selection.layer_scores import file_digest
from mmmamba_cli.recipe import dump_recipe, parse_recipe
from mmmamba_cli.runs import Run

LAYERS = 8


@pytest.fixture
def hybridize(work: Path, seeded: Path) -> Any:
    """Run `mmmamba hybridize` on a copy of the seeded run; a MmmambaError is raised."""

    def run(*words: object, data: str | None = "train") -> Any:
        given = () if data is None else ("--data", seeded / f"{data}.jsonl", "--samples", "6")
        arguments = ["hybridize", *map(str, ("--run", work / "run", *given, *words))]
        return CliRunner().invoke(app, arguments, catch_exceptions=False)

    return run


def scores_files(work: Path) -> list[Path]:
    return sorted((work / "run" / "selection").glob("*.json"))


def test_layers_chosen_by_measurement(work: Path, hybridize: Any) -> None:
    done = hybridize("--attn-layers", "1/4", "--select", "kl-zero")
    assert "kl-zero: fall of KL, nats per token" in done.stdout
    assert "Spearman of the rankings by both halves:" in done.stdout
    (file,) = scores_files(work)
    layers = json.loads(file.read_text())["rounds"][0]["layers"]
    best = sorted(layers, key=lambda one: -one["score"])[:2]
    manifest = Run(work / "run").product("hybrid-2-kl-zero")
    assert manifest.attention_layers == tuple(sorted(one["layer"] for one in best))
    assert manifest.selection["method"] == "kl-zero"
    assert manifest.selection["scores"] == f"selection/{file.name}"
    assert manifest.selection["scores_sha256"] == file_digest(file)
    assert manifest.selection["budget"] == {"attention_layers": 2}
    recipe = parse_recipe(manifest.recipe, "recipe")
    assert (recipe.layers.attention, recipe.layers.select) == (2, "kl-zero")
    assert file.with_suffix(".svg").read_text().startswith("<svg xmlns=")
    # The product without a measurement has no record of one.
    hybridize("--attn-layers", "2", "--from", "seed", data=None)
    assert "selection" not in json.loads((work / "run/products/hybrid-2/manifest.json").read_text())


def test_a_short_training_for_each_layer(work: Path, hybridize: Any, seeded: Path) -> None:
    words = ("--attn-layers", "1", "--select", "kl", "--steps", "1", "--dry-run", "--json")
    done = hybridize(*words, "--held-out", seeded / "held_out.jsonl")
    found = json.loads(done.stdout)
    ranking = found["selection"]["ranking"]
    assert [one["layer"] for one in ranking[:1]] == found["layers"]
    assert len(ranking) == LAYERS and len({one["score"] for one in ranking}) == LAYERS
    (file,) = scores_files(work)
    assert json.loads(file.read_text())["inputs"]["stage"]["steps"] == 1


def test_answers_are_scored_without_a_kl_stage(work: Path, hybridize: Any) -> None:
    """The product of shared stages of `ablate` has a recipe of stages 1 and 2 only."""
    manifest = work / "run/products/seed/manifest.json"
    record = json.loads(manifest.read_text())
    recipe = parse_recipe(record["recipe"], "recipe")
    shared = recipe.model_copy(update={"stages": recipe.stages[:2]})
    manifest.write_text(json.dumps(record | {"recipe": dump_recipe(shared)}))
    done = hybridize("--attn-layers", "2", "--select", "kl-zero", "--dry-run")
    assert "kl-zero: fall of KL, nats per answer token" in done.stdout
    (file,) = scores_files(work)
    assert json.loads(file.read_text())["inputs"]["columns"] == "answer"


@pytest.mark.parametrize("method", ["kl-zero", "mse"])
def test_killed_and_resumed(
    work: Path, hybridize: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    words = ("--attn-layers", "2", "--select", method, "--dry-run")
    hybridize(*words)
    (file,) = scores_files(work)
    whole = file.read_bytes()
    file.unlink()
    write, written = selection.write_layer_scores, 0

    def write_some(file: Path, scores: Any) -> None:
        nonlocal written
        if written == 3:
            raise KeyboardInterrupt
        write(file, scores)
        written += 1

    monkeypatch.setattr(selection, "write_layer_scores", write_some)
    assert hybridize(*words).exit_code == 130
    assert len(json.loads(file.read_text())["rounds"][0]["layers"]) == 3
    monkeypatch.setattr(selection, "write_layer_scores", write)
    resumed = hybridize(*words)
    assert "3 of 8 layers have been scored before" in resumed.stderr
    assert file.read_bytes() == whole
    # Scores that are complete are taken without loading a model.
    monkeypatch.setattr(selection.Measurement, "probe", None)
    assert "would have attention in layers" in hybridize(*words).stdout
    assert [p.name for p in (work / "run/products").iterdir()] == ["seed"]


def test_changed_inputs_are_measured_again(work: Path, hybridize: Any) -> None:
    words = ("--attn-layers", "1", "--select", "mse", "--dry-run")
    hybridize(*words)
    again = hybridize(*words, "--samples", "4")
    assert "are not reused, changed since: samples" in again.stderr
    assert "changed since: scored on" in hybridize(*words, data="held_out").stderr
    assert len(scores_files(work)) == 3


def test_greedy_scores_the_rest_again(work: Path, hybridize: Any) -> None:
    done = hybridize("--attn-layers", "2", "--select", "kl-zero", "--greedy", "--json")
    found = json.loads(done.stdout)
    (file,) = scores_files(work)
    first, second = json.loads(file.read_text())["rounds"]
    best = max(first["layers"], key=lambda one: one["score"])["layer"]
    assert (first["kept"], second["kept"]) == ([], [best])
    assert len(second["layers"]) == LAYERS - 1
    then = max(second["layers"], key=lambda one: one["score"])["layer"]
    assert found["product"]["attention_layers"] == sorted((best, then))
    assert [one["layer"] for one in found["selection"]["ranking"][:2]] == [best, then]
    # The first round is that of a measurement without --greedy.
    words = ("--attn-layers", "2", "--select", "kl-zero", "--dry-run", "--from", "seed")
    assert "scoring layers" not in hybridize(*words).stderr and len(scores_files(work)) == 1


def test_a_budget_in_bytes(work: Path, hybridize: Any) -> None:
    # 2 heads of 8, keys and values, at 1,000 columns; three layers of them.
    size = {"bfloat16": 2, "float32": 4}[Run(work / "run").product("seed").dtype] * 32 * 1000
    words = ("--kv-bytes", 3 * size + 1, "--context", "1000", "--select", "mse")
    hybridize(*words)
    manifest = Run(work / "run").product("hybrid-3-mse")
    assert manifest.selection["budget"] == {"kv_bytes": 3 * size + 1, "context": 1000}
    layers = parse_recipe(manifest.recipe, "recipe").layers
    assert (layers.attention, layers.select) == (manifest.attention_layers, None)
    with pytest.raises(MmmambaError, match="allows no attention layer"):
        hybridize(*words[2:], "--kv-bytes", size - 1, "--from", "seed")


def test_scores_of_ones_own(work: Path, hybridize: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"scores": [0, 0, 3, 0, 0, 9, 0, 0]}))
    hybridize("--attn-layers", "2", "--select", f"file:{file}")
    manifest = Run(work / "run").product("hybrid-2-file")
    assert manifest.attention_layers == (2, 5)
    assert manifest.selection["scores_sha256"] == file_digest(file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--select", "kl-zero", "--layers", "0"), "--select and --layers exclude each other"),
        (
            ("--select", "kl-zero", "--attn-layers", "0"),
            "--select has no number of layers to choose",
        ),
        (("--select", "best", "--attn-layers", "1"), "must be kl-zero, kl, recall, mse"),
        (("--kv-bytes", "1MiB", "--context", "10"), "--kv-bytes needs scores"),
        (("--kv-bytes", "1MiB", "--select", "mse"), "--kv-bytes and --context belong together"),
        (("--select", "mse", "--greedy", "--attn-layers", "1"), "--greedy is not possible"),
        (("--select", "kl", "--attn-layers", "1"), "give --held-out FILE"),
        (("--attn-layers", "1"), "--data is for layers that are chosen by their scores"),
        (("--select", "mse", "--attn-layers", "9"), "must be from 0 to 8"),
    ],
)
def test_options_that_do_not_fit(hybridize: Any, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(MmmambaError, match=message):
        hybridize(*words)


def test_a_recipe_that_selects_layers_is_distilled(
    work: Path, seeded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["distill", "--run", str(work / "run"), "--data", str(seeded / "train.jsonl")]
    for option in ("layers.select=mse", "layers.attention=2", "stages.stage3.steps=1"):
        words += ["--set", option]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    run = Run(work / "run")
    (file,) = scores_files(work)
    layers = json.loads(file.read_text())["rounds"][0]["layers"]
    best = sorted(layers, key=lambda one: -one["score"])[:2]
    hybrid, final = run.product("hybrid-2-mse"), run.product("hybrid-2-mse-stage3")
    assert hybrid.attention_layers == tuple(sorted(one["layer"] for one in best))
    assert hybrid.selection["method"] == "mse" and hybrid.stages == ("stage1", "stage2")
    assert (final.attention_layers, final.selection) == (hybrid.attention_layers, {})
