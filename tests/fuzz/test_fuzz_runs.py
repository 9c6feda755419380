"""Corrupted runs: run.json, manifests, products."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from case import Case, numbers, outcome
from materials import Materials
from mutations import same_json, spoil_json

from mmmamba_cli.runs import Run

CaseOf = Callable[[str, int], Case]
NAMES = (
    "../../canary",
    "..",
    ".",
    "",
    "/etc",
    "seed/../seed",
    "hybrid-1/",
    "gone",
    "a\0b",
    "\ud800",
    "x" * 400,
    "\x1b[2J",
    "a\nerror: b",
)


def commands(case: Case, run: Path) -> list[tuple[object, ...]]:
    """Commands that read a run."""
    return [
        ("status", "--run", run, "--json"),
        ("status", "--run", run),
        ("hybridize", "--run", run, "--layers", "0,2", "--json"),
        ("export", "--run", run, "--format", "mmmamba-hf", "--out", case.home / "out", "--json"),
    ]


def use(case: Case, run: Path) -> None:
    """Run two of the commands; a product they write must be complete."""
    looking, making = case.rng.randrange(2), 2 + case.rng.randrange(2)
    for place in (looking, making):
        done = case.command(*commands(case, run)[place])
        if done.code == 0 and place == 2:
            Run(run).verify_product(outcome(done)["product"]["name"])


@pytest.mark.parametrize("number", numbers(32))
def test_records(case_of: CaseOf, materials: Materials, number: int) -> None:
    case = case_of("run-record", number)
    run = case.copy(materials.run, "run")
    raw = json.loads((run / "run.json").read_text())
    if number % 4 == 0:
        raw["current"] = NAMES[number // 4 % len(NAMES)]
        case.done.append(f"current {raw['current']!r:.40}")
        text = json.dumps(raw).encode()
    else:
        text = spoil_json(case.rng, raw, case.done)
    (run / "run.json").write_bytes(text)
    use(case, run)


@pytest.mark.parametrize("number", numbers(40))
def test_manifests(case_of: CaseOf, materials: Materials, number: int) -> None:
    case = case_of("manifest", number)
    run = case.copy(materials.run, "run")
    file = run / "products/hybrid-1/manifest.json"
    raw: dict[str, Any] = json.loads(file.read_text())
    if number % 4 == 0:
        where = (raw, *raw["parents"])[number // 4 % 3]
        where["name"] = case.rng.choice((*NAMES, "hybrid-1"))
        case.done.append(f"name {where['name']!r:.40}")
        text = json.dumps(raw).encode()
    elif number % 4 == 1:
        key = case.rng.choice(("dtype", "recipe", "attention_layers", "stages", "num_layers"))
        values = ("nn", "float16", "", "!!python/name:os.system", [], [99], [-1], ["stage1"], 0, -5)
        raw[key] = case.rng.choice(values)
        case.done.append(f"{key} {raw[key]!r}")
        text = json.dumps(raw).encode()
    else:
        text = spoil_json(case.rng, raw, case.done)
    file.write_bytes(text)
    use(case, run)


@pytest.mark.parametrize("number", numbers(12))
def test_lineages(case_of: CaseOf, materials: Materials, number: int) -> None:
    """Products with missing, cyclic or changed parents."""
    case = case_of("lineage", number)
    run = case.copy(materials.run, "run")
    files = {name: run / f"products/{name}/manifest.json" for name in ("seed", "hybrid-1")}
    found = {name: json.loads(file.read_text()) for name, file in files.items()}
    way = number % 6
    case.done.append(f"way {way}")
    if way == 0:
        parent = {"role": "student", "name": "hybrid-1"}
        parent["content_hash"] = found["hybrid-1"]["content_hash"]
        found["hybrid-1"]["parents"][0] = parent
    elif way == 1:
        hash_above = found["hybrid-1"]["content_hash"]
        above = {"role": "student", "name": "hybrid-1", "content_hash": hash_above}
        found["seed"]["parents"] = [above]
    elif way == 2:
        shutil.rmtree(run / "products/seed")
        del found["seed"]
    elif way == 3:
        found["hybrid-1"]["parents"] = found["hybrid-1"]["parents"] * 20
    elif way == 4:
        found["hybrid-1"]["content_hash"] = "0" * 64
    else:
        (run / "products/hybrid-1/model.safetensors").write_bytes(b"short")
    for name, manifest in found.items():
        files[name].write_text(json.dumps(manifest))
    for words in commands(case, run)[1 + number // 6 % 2 :: 2]:
        case.command(*words)
    # Layer 0 becomes linear again with an ancestor's mixer.
    case.command("hybridize", "--run", run, "--layers", "1", "--json")


@pytest.mark.parametrize("number", numbers(10))
def test_imported(case_of: CaseOf, materials: Materials, number: int) -> None:
    """A native folder with a changed manifest, imported into another run."""
    case = case_of("imported", number)
    folder = case.copy(materials.own)
    file = folder / "manifest.json"
    file.write_bytes(spoil_json(case.rng, json.loads(file.read_text()), case.done))
    done = case.command("import", folder, "--run", case.home / "run", "--json")
    if done.code == 0:
        Run(case.home / "run").verify_product("imported")


@pytest.mark.parametrize("number", numbers(6))
def test_the_same(case_of: CaseOf, materials: Materials, number: int) -> None:
    case = case_of("same-run", number)
    run = case.copy(materials.run, "run")
    for file in (run / "run.json", *run.glob("products/*/manifest.json")):
        file.write_bytes(same_json(case.rng, json.loads(file.read_text()), case.done))
    (run / "products/.DS_Store").write_text("")
    (run / "notes.txt").write_text("mine")
    (run / "products/seed/notes.txt").write_text("mine")
    said = [case.command("status", "--run", one, "--json") for one in (run, materials.run)]
    one, two = map(outcome, said)
    for found in (one, two):
        del found["run"]
        for product in found["products"]:
            product.pop("bytes", None)
    assert one == two
    done = case.command("hybridize", "--run", run, "--layers", "2", "--json")
    Run(run).verify_product(outcome(done)["product"]["name"])
