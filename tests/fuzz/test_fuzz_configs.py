"""Corrupted configs of every supported model type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from case import Case, numbers, outcome
from materials import Materials
from mutations import same_json, spoil_json

from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.runs import Run

CaseOf = Callable[[str, int], Case]


def convert(case: Case, folder: Path) -> str | None:
    """Seed or import the folder; the product's hash, or None if it was refused."""
    run, out = case.home / "run", case.home / "out"
    kind = case.kind.split("-")[0]
    words: dict[str, tuple[object, ...]] = {
        "own": ("export", "--model", folder, "--format", "mmmamba-hf", "--out", out),
        "hub": ("export", "--model", folder, "--format", "hub", "--out", out),
        "released": ("import", folder, "--run", run),
    }
    done = case.command(*words.get(kind, ("seed", folder, "--run", run, "--no-report")), "--json")
    if done.code:
        return None
    if kind in ("own", "hub"):
        assert open_checkpoint(out).source.content_hash() == outcome(done)["content_hash"]
        return str(outcome(done)["content_hash"])
    product = outcome(done)["product"]
    Run(run).verify_product(product["name"])
    return str(product["content_hash"])


def source_of(materials: Materials, kind: str) -> Path:
    name = kind.split("-")[0]
    return materials.own if name == "hub" else getattr(materials, name)


@pytest.mark.parametrize("number", numbers(40))
@pytest.mark.parametrize("kind", ["hovle", "own", "released", "llama"])
def test_spoiled(case_of: CaseOf, materials: Materials, kind: str, number: int) -> None:
    case = case_of(f"{kind}-config", number)
    folder = case.copy(source_of(materials, kind))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_bytes(spoil_json(case.rng, raw, case.done))
    convert(case, folder)


@pytest.mark.parametrize("number", numbers(10))
@pytest.mark.parametrize("kind", ["qwen2", "internlm2", "hub"])
def test_spoiled_kin(case_of: CaseOf, materials: Materials, kind: str, number: int) -> None:
    case = case_of(f"{kind}-config", number)
    folder = case.copy(source_of(materials, kind))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_bytes(spoil_json(case.rng, raw, case.done))
    convert(case, folder)


@pytest.mark.parametrize("number", numbers(3))
@pytest.mark.parametrize("kind", ["hovle", "own", "released", "llama", "qwen2", "internlm2"])
def test_the_same(case_of: CaseOf, materials: Materials, kind: str, number: int) -> None:
    """Key order, whitespace, unused files and unused keys change nothing."""
    case = case_of(f"{kind}-same", number)
    folder = case.copy(source_of(materials, kind))
    expected = convert(case, folder)
    case.home = case.home / "again"
    (case.home / "tmp").mkdir(parents=True)
    raw = json.loads((folder / "config.json").read_text())
    again = case.copy(source_of(materials, kind))
    raw["a_remark_of_mine"] = "read by nobody"
    (again / "config.json").write_bytes(same_json(case.rng, raw, case.done))
    (again / "notes.txt").write_text("not read")
    assert expected is not None and convert(case, again) == expected
