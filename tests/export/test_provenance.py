"""Provenance survives every export and import."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mmmamba_hf_case import released_tensors, write_released
from safetensors.torch import save_file
from typer.testing import CliRunner

from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.runs import Run

CASE = Path(__file__).parents[1] / "golden/hovle_pre"
ALL = ["stage1", "stage2", "stage3"]
State = tuple[list[str], bool | None]


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


def imported(source: Path, run: Path) -> dict[str, Any]:
    return json.loads(mmmamba("import", source, "--run", run, "--json").stdout)["product"]


def state_of(source: Path, run: Path) -> State:
    product = imported(source, run)
    return product["stages"], product["final"]


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a seed."""
    run = tmp_path_factory.mktemp("seeded") / "run"
    mmmamba("seed", CASE.resolve(), "--run", run, "--dtype", "fp32", "--no-report")
    return run


def product_with(seeded: Path, run: Path, stages: list[str], final: bool | None) -> Path:
    """A copy of the run, with these stages in the manifest of its product."""
    shutil.copytree(seeded, run)
    file = run / "products/seed/manifest.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"stages": stages, "final": final}))
    return run


@pytest.mark.parametrize(
    ("form", "by", "stages", "final"),
    [
        ("hub", "--run", [], False),
        ("hub", "--run", ["stage1"], False),
        ("hub", "--run", ALL, True),
        ("hub", "--run", [], None),
        ("mmmamba-hf", "--model", ALL, True),
        ("mmmamba-hf", "--model", [], None),
    ],
)
def test_provenance_round_trip(
    tmp_path: Path, seeded: Path, form: str, by: str, stages: list[str], final: bool | None
) -> None:
    """Each layout is also the `other` one of the first export, there by --run."""
    run = product_with(seeded, tmp_path / "run", stages, final)
    source = run if by == "--run" else run / "products/seed"
    mmmamba("export", by, source, "--format", form, "--out", tmp_path / "out")
    assert state_of(tmp_path / "out", tmp_path / "b") == (stages, final)
    # The same from the import into the other layout.
    other = "hub" if form == "mmmamba-hf" else "mmmamba-hf"
    mmmamba("export", "--run", tmp_path / "b", "--format", other, "--out", tmp_path / "again")
    assert state_of(tmp_path / "again", tmp_path / "c") == (stages, final)
    card = (tmp_path / "out/README.md").read_text()
    assert ("never distilled end to end" in card) == (final is False)
    assert ("How far it was distilled is not known." in card) == (final is None)


@pytest.mark.parametrize("form", ["hub", "mmmamba-hf"])
def test_a_published_model_stays_one(tmp_path: Path, form: str) -> None:
    folder = write_released(tmp_path / "published", CASE, "linear")
    assert state_of(folder, tmp_path / "a") == (ALL, True)
    mmmamba("export", "--model", folder, "--format", form, "--out", tmp_path / "out")
    product = imported(tmp_path / "out", tmp_path / "b")
    assert (product["stages"], product["final"]) == (ALL, True)
    assert "published as distilled end to end, which was not checked" in product["notes"][0]


def test_old_exports_have_unknown_provenance(tmp_path: Path, seeded: Path) -> None:
    """It has no provenance field; its `auto_map` names the code repository."""
    run = product_with(seeded, tmp_path / "run", [], False)
    mmmamba("export", "--run", run, "--format", "mmmamba-hf", "--out", tmp_path / "out")
    file = tmp_path / "out/config.json"
    raw = json.loads(file.read_text())
    assert raw.pop("mmmamba")["distilled_end_to_end"] is False
    file.write_text(json.dumps(raw))
    product = imported(tmp_path / "out", tmp_path / "b")
    assert (product["stages"], product["final"]) == ([], None)
    assert "how far it was distilled is not known" in product["notes"][0]
    said = mmmamba("status", "--run", tmp_path / "b").stdout
    assert "how far it was distilled is not known" in said and "not distilled" not in said


def test_training_states_have_unknown_provenance(tmp_path: Path) -> None:
    folder = write_released(tmp_path / "training", CASE, "training")
    assert state_of(folder, tmp_path / "run") == ([], None)


def test_malformed_field(tmp_path: Path) -> None:
    folder = write_released(tmp_path / "published", CASE, "linear", mmmamba={"stages": "all"})
    with pytest.raises(CheckpointError, match=r"mmmamba of config.json is .*expected stages"):
        imported(folder, tmp_path / "run")


def test_a_model_of_attention_alone_round_trips_as_hovle(tmp_path: Path) -> None:
    mmmamba("export", "--model", CASE, "--format", "hovle", "--out", tmp_path / "out")
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["mmmamba"]["distilled_end_to_end"] is None
    mmmamba("seed", tmp_path / "out", "--run", tmp_path / "run", "--no-report")
    source = json.loads((tmp_path / "run/products/seed/config.json").read_text())
    assert "mmmamba" not in source
    mmmamba("seed", CASE, "--run", tmp_path / "direct", "--no-report")
    one, two = (Run(tmp_path / name).product("seed") for name in ("run", "direct"))
    assert one.content_hash == two.content_hash


@pytest.mark.parametrize("form", ["hub", "mmmamba-hf"])
def test_products_of_an_export_drop_its_field(tmp_path: Path, seeded: Path, form: str) -> None:
    run = product_with(seeded, tmp_path / "run", ALL, True)
    mmmamba("export", "--run", run, "--format", form, "--out", tmp_path / "out")
    imported(tmp_path / "out", tmp_path / "b")
    product = tmp_path / "b/products/imported"
    assert "mmmamba" not in json.loads((product / "config.json").read_text())
    file = product / "manifest.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"stages": [], "final": False}))
    mmmamba("export", "--run", tmp_path / "b", "--format", "mmmamba-hf", "--out", tmp_path / "c")
    assert state_of(tmp_path / "c", tmp_path / "d") == ([], False)


# Casts.


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("door", ["seed", "import", "load"])
def test_weights_beyond_a_dtype_are_refused(tmp_path: Path, door: str, dtype: str) -> None:
    import mmmamba_cli

    teacher = tmp_path / "teacher"
    write_released(teacher, CASE, "linear")
    tensors = {name: t.contiguous() for name, t in released_tensors(CASE, "linear").items()}
    name = "language_model.output.weight"
    if door == "seed":
        from safetensors.torch import load_file

        tensors = load_file(CASE / "model.safetensors")
        (teacher / "config.json").write_bytes((CASE / "config.json").read_bytes())
    tensors[name] = tensors[name].float()
    tensors[name][3, 0] = 1e5 if dtype == "fp16" else 3.4e38
    save_file(tensors, teacher / "model.safetensors")
    ours = "lm_head.weight"
    kind = {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    with pytest.raises(
        CheckpointError, match=rf"'{ours}' holds values that do not fit into {kind}"
    ):
        if door == "load":
            mmmamba_cli.load(str(teacher), dtype=dtype)
        else:
            words = ["--no-report"] if door == "seed" else []
            mmmamba(door, teacher, "--run", tmp_path / "run", "--dtype", dtype, *words)
    assert not (tmp_path / "run").exists()
