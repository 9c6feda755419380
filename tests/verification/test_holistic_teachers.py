"""HoVLE and language models of the fast path: golden values, eager attention, tiling, faults."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from verification_teachers import GOLDEN, edit_tensors, names_with, result, verify

from mmmamba_cli.doctor.op_checks import largest_error
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.ops.attention import ATTENTION_BACKENDS
from mmmamba_cli.verification import (
    comparison,
    native_model,
    native_verifier,
    student_checks,
    verifier,
    verify_teacher,
)

Folders = Callable[[str], Path]
MIXERS = ["gated_delta", "gla", "kda", "mamba2", "window"]


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A small HoVLE with the values of the method's reference implementation."""
    source, folder = GOLDEN / "hovle_pre", tmp_path / "hovle"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "golden.safetensors"):
        shutil.copy(source / name, folder / name)
    return folder


@pytest.fixture
def one_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_model, "replacing_mixers", lambda: ["mamba2"])


def test_a_hovle_agrees_with_golden_values(golden: Path) -> None:
    report = verify(golden)
    assert report.agrees, report
    assert report.compared_with == "golden.safetensors"
    assert names_with(report, "ok") == [
        *("config and tensors", "finite values", "loading", "eager attention", "golden values"),
        "cache and padding",
        *(f"mixer {name}" for name in MIXERS),
        *("memory", "memory, estimates"),
    ]
    assert names_with(report, "skipped") == ["tokenizer", "chat template", "tiling"]


@pytest.mark.usefixtures("one_mixer")
def test_other_golden_values_are_a_difference(golden: Path) -> None:
    file = golden / "golden.safetensors"
    tensors = load_file(file)
    tensors["teacher.logits"][0, 7] += 0.5
    save_file(tensors, file)
    report = verify(golden)
    assert names_with(report, "different") == ["golden values"]
    save_file({"input.input_ids": tensors["input.input_ids"]}, file)
    report = verify(golden)
    assert result(report, "golden values").detail.endswith("has no tensor teacher.logits")


@pytest.mark.usefixtures("one_mixer")
def test_without_golden_values_the_report_says_what_was_not_compared(golden: Path) -> None:
    (golden / "golden.safetensors").unlink()
    report = verify(golden)
    assert report.agrees and report.compared_with is None
    detail = result(report, "golden values").detail
    assert detail.endswith("not compared with another implementation")


@pytest.mark.usefixtures("one_mixer")
def test_attention_that_differs_from_eager_is_found(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = ATTENTION_BACKENDS["reference"]

    def wrong(*args: Any, **options: Any) -> torch.Tensor:
        return 1.1 * eager(*args, **options)

    monkeypatch.setitem(ATTENTION_BACKENDS, "reference", wrong)
    report = verify(golden)
    assert "eager attention" in names_with(report, "different")
    assert result(report, "golden values").status == "ok"


def test_a_tensor_that_is_missing_is_named(golden: Path) -> None:
    name = "language_model.model.norm.weight"
    edit_tensors(golden, lambda tensors: tensors.pop(name))
    report = verify(golden)
    assert names_with(report, "different") == ["config and tensors"]
    assert name in result(report, "config and tensors").detail


@pytest.mark.usefixtures("one_mixer")
def test_a_shipped_teacher_has_a_tokenizer_a_template_and_tiles() -> None:
    report = verify_teacher("scenes-teacher", device="cpu", tokens=1)
    assert report.agrees, report
    assert names_with(report, "skipped") == ["golden values"]
    assert "224 x 224: 1; 160 x 288: 3" in result(report, "tiling").detail
    assert "an answer ends with <|im_end|>" in result(report, "chat template").detail


def test_a_student_is_no_teacher() -> None:
    with pytest.raises(CheckpointError, match="some of its layers are linear already"):
        verify_teacher("scenes-linear", device="cpu")


@pytest.fixture(scope="module")
def shipped_processor() -> Any:
    from mmmamba_cli.runs import open_processor, resolve_path

    return open_processor(resolve_path(Path("scenes-teacher")).checkpoint)


def test_other_tiles_than_the_picture_has_are_found(
    shipped_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native_verifier.check_tiling(shipped_processor).status == "ok"
    monkeypatch.setattr(native_verifier, "count_tiles", lambda width, height, tiling: 2)
    found = native_verifier.check_tiling(shipped_processor)
    assert found.status == "different"
    assert found.detail.startswith("1 tiles and 64 context ids, expected 2 tiles of 64")


def test_an_answer_without_a_stop_token_is_found(
    shipped_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmmamba_cli.runs import resolve_path

    checkpoint = resolve_path(Path("scenes-teacher")).checkpoint
    assert native_verifier.check_template(shipped_processor, checkpoint).status == "ok"
    monkeypatch.setattr(type(shipped_processor), "stop_token_ids", [3])
    found = native_verifier.check_template(shipped_processor, checkpoint)
    assert found.detail == "an answer ends with <|im_end|>, which is no stop token"


def test_a_fast_path_that_differs_from_the_stock_class_is_found(
    teacher_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = verifier.load_model

    def load_wrongly(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        with torch.no_grad():
            model.model.norm.weight[0] += 1.0
        return model

    monkeypatch.setattr(verifier, "load_model", load_wrongly)
    monkeypatch.setattr(student_checks, "mixer_specs", dict)
    report = verify(teacher_folders("llama"))
    assert names_with(report, "different") == ["HolisticVLM"]


def test_a_mixer_that_a_cache_changes_is_found(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = native_model.student_of

    def make_wrongly(model: Any, mixer: str) -> Any:
        student = make(model, mixer)
        student.model.layers[0].mixer.o_proj.register_forward_hook(
            lambda module, args, output: output + (1.0 if args[0].shape[1] == 1 else 0.0)
        )
        return student

    monkeypatch.setattr(native_model, "student_of", make_wrongly)
    monkeypatch.setattr(native_model, "replacing_mixers", lambda: ["gla"])
    report = verify(golden)
    assert names_with(report, "different") == ["mixer gla"]


@pytest.mark.parametrize("distances", [(math.nan, 1.0), (1.0, math.nan), (0.0, math.nan, 2.0)])
def test_a_distance_that_is_not_a_number_is_the_largest(distances: tuple[float, ...]) -> None:
    assert math.isnan(largest_error(distances))
    assert math.isnan(comparison.Rounding(*distances[:2]).largest)
    assert largest_error((1.0, 3.0, 2.0)) == 3.0
