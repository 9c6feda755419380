"""Corrupted training states: indexes and shards with code, false sizes, or truncated."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from case import Case, numbers
from hostile_pickles import Calls, bad_state, payloads
from mutations import spoil_bytes, spoil_json
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from mmmamba_cli.distill.stage_attempt import DistillOptions, StageRequest, plan_stage
from mmmamba_cli.distill.training_state import Progress, StateFolder, state_record
from mmmamba_cli.distributed import World
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.recipe import load_recipe
from mmmamba_cli.runs import Run, read_manifest

CaseOf = Callable[[str, int], Case]
NAME = "step-00000002"
INDEX = ".metadata"
SHARD = "__0_0.distcp"
WORLD = World(torch.device("cpu"))


def learning(seed: int) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    """Two small parameters and their optimiser."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"model.a.weight": (3, 4), "model.b.bias": (5,)}
    made = {n: torch.nn.Parameter(torch.randn(s, generator=rng)) for n, s in shapes.items()}
    optimiser = torch.optim.AdamW(made.values())
    for parameter in made.values():
        optimiser.state[parameter] = {
            "step": torch.full((), float(seed)),
            "exp_avg": torch.randn(parameter.shape, generator=rng),
            "exp_avg_sq": torch.rand(parameter.shape, generator=rng),
        }
    return made, optimiser


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage folder with one valid state."""
    states = StateFolder(tmp_path_factory.mktemp("states") / "stage1", WORLD)
    settings = {"stage": {"name": "stage1"}, "data": {"held_out": None}, "seed": 0, "parent": "x"}
    states.save(NAME, *learning(1), state_record(Progress(step=2), settings))
    return states.folder


def load(case: Case, folder: Path) -> Any:
    """Load the state; a refused state must not change any value."""
    parameters, optimiser = learning(2)
    states = StateFolder(folder, WORLD)
    return case.call(lambda: states.load(NAME, parameters, optimiser), MmmambaError)


def refused(case: Case, folder: Path) -> None:
    assert isinstance(load(case, folder), MmmambaError), case.done


def test_a_good_state(case_of: CaseOf, state: Path) -> None:
    case = case_of("good-state", 0)
    folder = case.copy(state)
    parameters, optimiser = learning(2)
    case.call(lambda: StateFolder(folder, WORLD).load(NAME, parameters, optimiser), MmmambaError)
    wanted, before = learning(1)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, wanted[name])
        for key, value in optimiser.state[parameter].items():
            assert torch.equal(value, before.state[wanted[name]][key])


@pytest.mark.parametrize("number", numbers(26))
def test_indexes_that_run_code(case_of: CaseOf, state: Path, number: int) -> None:
    case = case_of("state-code", number)
    folder = case.copy(state)
    file = folder / NAME / INDEX
    good = pickle.loads(file.read_bytes())
    all_payloads = payloads(case.canary)
    payload = all_payloads[number % len(all_payloads)]
    place = case.rng.choice(("whole", "planner", "field", "key", "path"))
    case.done.append(place)
    value: Any = payload if place == "whole" else good
    if place == "planner":
        good.planner_data = payload
    elif place == "field":
        good.storage_meta = payload
    elif place == "key":
        good.state_dict_metadata[payload] = None
    elif place == "path":
        next(iter(good.storage_data.values())).relative_path = payload
    file.write_bytes(pickle.dumps(value, protocol=case.rng.choice((2, 4, 5))))
    refused(case, folder)
    assert "code" in str(load(case, folder))


def write_entry(folder: Path, content: bytes) -> None:
    """Append `content` to the shard and make it the entry of every tensor."""
    shard, index = folder / NAME / SHARD, folder / NAME / INDEX
    good = pickle.loads(index.read_bytes())
    for entry in good.storage_data.values():
        entry.offset, entry.length = shard.stat().st_size, len(content)
    shard.write_bytes(shard.read_bytes() + content)
    index.write_bytes(pickle.dumps(good))


@pytest.mark.parametrize("number", numbers(30))
def test_shards_that_run_code(case_of: CaseOf, state: Path, number: int) -> None:
    """Malicious tensor entries, and objects, which torch unpickles without checks."""
    case = case_of("state-shard", number)
    folder = case.copy(state)
    tensor = {"a": torch.randn(3, 4)}
    content = bad_state(case.rng, tensor, case.canary, case.done)
    if number % 3 == 0:
        file = io.BytesIO()
        torch.save(case.rng.choice(payloads(case.canary)), file)
        content = file.getvalue()
        case.done.append("payload alone")
    write_entry(folder, content)
    if number % 2:
        index = folder / NAME / INDEX
        good = pickle.loads(index.read_bytes())
        for name in good.state_dict_metadata:
            good.state_dict_metadata[name] = BytesStorageMetadata()
        index.write_bytes(pickle.dumps(good))
        case.done.append("as objects")
    refused(case, folder)


def _paths(rng: random.Random, good: Any) -> None:
    entry = rng.choice(list(good.storage_data.values()))
    entry.relative_path = rng.choice(
        (
            "/dev/zero",
            "/etc/passwd",
            "../step-00000002/__0_0.distcp",
            "",
            ".",
            "a\0b",
            "__9_9.distcp",
        )
    )


def _numbers(rng: random.Random, good: Any) -> None:
    entry = rng.choice(list(good.storage_data.values()))
    field = rng.choice(("offset", "length"))
    setattr(entry, field, rng.choice((-1, 2**62, 2**70, None, "3", True, 1.5, [])))


def _shapes(rng: random.Random, good: Any) -> None:
    tensor = rng.choice(list(good.state_dict_metadata.values()))
    tensor.size = rng.choice((torch.Size([7]), torch.Size([2**40, 2**20]), (3, 4), None, "x"))


def _chunks(rng: random.Random, good: Any) -> None:
    tensor = good.state_dict_metadata["master.model.a.weight"]
    part = tensor.chunks[0]
    how = rng.randrange(4)
    if how == 0:
        tensor.chunks = []
    elif how == 1:
        part.offsets = torch.Size([1, 0])
    elif how == 2:
        part.sizes = torch.Size([1, 4])
    else:
        tensor.chunks = tensor.chunks * 2


def _names(rng: random.Random, good: Any) -> None:
    name = rng.choice(list(good.state_dict_metadata))
    value = good.state_dict_metadata.pop(name)
    if rng.random() < 0.5:
        good.state_dict_metadata[rng.choice(("\x1b[2J", "x" * 5000, 7))] = value


def _keys(rng: random.Random, good: Any) -> None:
    good.storage_data.pop(rng.choice(list(good.storage_data)))


def _parts(rng: random.Random, good: Any) -> None:
    field = rng.choice(("state_dict_metadata", "storage_data", "planner_data"))
    setattr(good, field, rng.choice((None, [], {}, 3, "text", {"a": 1}, {1: 2})))


def _transforms(rng: random.Random, good: Any) -> None:
    for entry in good.storage_data.values():
        entry.transform_descriptors = rng.choice((["stream.zstd"], ["x"], "zstd", 3))


LIES = (_paths, _numbers, _shapes, _chunks, _names, _keys, _parts, _transforms)


@pytest.mark.parametrize("number", numbers(48))
def test_indexes_that_lie(case_of: CaseOf, state: Path, number: int) -> None:
    case = case_of("state-lie", number)
    folder = case.copy(state)
    file = folder / NAME / INDEX
    good = pickle.loads(file.read_bytes())
    lie = LIES[number % len(LIES)]
    case.done.append(lie.__name__)
    lie(case.rng, good)
    file.write_bytes(pickle.dumps(good))
    refused(case, folder)


@pytest.mark.parametrize("number", numbers(40))
def test_spoiled_bytes(case_of: CaseOf, state: Path, number: int) -> None:
    case = case_of("state-bytes", number)
    folder = case.copy(state)
    file = folder / NAME / (INDEX, SHARD)[number % 2]
    file.write_bytes(spoil_bytes(case.rng, file.read_bytes(), case.done))
    load(case, folder)


def test_a_packed_shard_is_refused(case_of: CaseOf, state: Path) -> None:
    case = case_of("state-packed", 0)
    folder = case.copy(state)
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(3, 4), plain)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        source = zipfile.ZipFile(plain)
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr("archive/data/999", b"\0" * (64 << 20))
    write_entry(folder, packed.getvalue())
    refused(case, folder)


@pytest.mark.parametrize("what", ["gone", "link", "folder", "fifo-like"])
def test_files_that_are_none(case_of: CaseOf, state: Path, what: str) -> None:
    case = case_of("state-files", 0)
    folder = case.copy(state)
    for name in (INDEX, SHARD):
        copy = case.copy(state, f"{what}-{name}")
        file = copy / NAME / name
        good = file.read_bytes()
        file.unlink()
        if what == "link":
            file.symlink_to("/dev/zero")
        elif what == "folder":
            file.mkdir()
        elif what == "fifo-like":
            file.write_bytes(struct.pack("<Q", len(good)))
        refused(case, copy)
    shutil.rmtree(folder)


@pytest.mark.parametrize("number", numbers(40))
def test_records(case_of: CaseOf, state: Path, materials: Any, number: int) -> None:
    """Corrupted `state.json` and `attempt.json`."""
    case = case_of("state-record", number)
    run = Run(case.copy(materials.run, "run"))
    folder = run.folder / "training/stage1"
    shutil.copytree(state, folder)
    file = folder / NAME / "state.json"
    if number % 4 == 3:
        file = folder / "attempt.json"
        file.write_text(json.dumps({"format": 1, "replaces": None}))
    file.write_bytes(spoil_json(case.rng, json.loads(file.read_text()), case.done))
    parent = read_manifest(run.product_folder("seed"))
    stage = load_recipe("smoke").stages[0]
    settings = {"stage": {"name": "stage1"}, "data": {}, "seed": 0, "parent": "x"}
    request = StageRequest(
        "stage1", parent, stage, settings, DistillOptions(overwrite=number % 2 == 0)
    )
    case.call(lambda: plan_stage(run, StateFolder(folder, WORLD), request), MmmambaError)


def test_calls_are_calls(tmp_path: Path) -> None:
    """Control: plain pickle runs the payloads and creates the canary."""
    pickle.loads(pickle.dumps(Calls(Path.touch, tmp_path / "canary")))
    assert (tmp_path / "canary").exists()
