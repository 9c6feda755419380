"""`runs.models`: models opened by product name, `teacher` and path."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mmmamba_cli.errors import CheckpointError, DataError, RunError
from mmmamba_cli.runs import Run, check_unique_names, resolve_model, resolve_path, resolve_product


def test_a_product_knows_what_its_run_recorded(student_run: Path) -> None:
    run = Run(student_run)
    found = resolve_model(run, "seed")
    assert (found.name, found.origin, found.kind, found.final) == (
        "seed",
        "product",
        "linear",
        False,
    )
    assert found.content_hash == run.product("seed").content_hash
    assert resolve_product(run).name == run.record.current
    found.verify()
    model = found.load("cpu", torch.float32)
    assert model.dtype == torch.float32 and not any(p.requires_grad for p in model.parameters())


def test_the_teacher_has_no_manifest(student_run: Path) -> None:
    run = Run(student_run)
    found = resolve_model(run, "teacher")
    assert (found.origin, found.kind, found.final) == ("teacher", "all attention", None)
    assert found.content_hash == run.teacher.content_hash


def test_a_path_has_no_recorded_hash(student_run: Path, llama: Path) -> None:
    """A copied product keeps its manifest, but no run vouches for its tensors."""
    product = resolve_path(Run(student_run).product_folder("seed"))
    assert (product.origin, product.kind, product.final) == ("path", "linear", False)
    assert product.content_hash is None
    product.verify()
    other = resolve_model(Run(student_run), str(llama))
    assert (other.name, other.kind, other.final) == ("small-llama", "all attention", None)


def test_changed_tensors_are_refused(student_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(student_run, folder)
    file = next(Run(folder).product_folder("seed").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(RunError, match="was changed since it was written"):
        resolve_model(Run(folder), "seed").verify()


def test_a_missing_tokenizer_is_an_error(student_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(Run(student_run).product_folder("seed"), folder)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"bare has no tokenizer, so it cannot be asked"):
        resolve_path(folder).require_processor("asked anything", "add one")


def test_names_must_be_unique() -> None:
    check_unique_names(["a", "b"], hint="rename one")
    with pytest.raises(DataError, match="more than one model is called a, and so on"):
        check_unique_names(["a", "b", "a"], ", and so on", hint="rename one")
