"""A teacher of transformers that is right agrees; one that is broken is named at its place."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refused_families import refused_config
from teacher_processors import HAS_TORCHVISION
from verification_teachers import edit_json, edit_tensors, names_with, result, verify

from mmmamba_cli.architecture import mixer_specs
from mmmamba_cli.errors import CheckpointError, MmmambaError
from mmmamba_cli.teachers import convert, mixers_of
from mmmamba_cli.verification import in_place_teacher, student_checks
from mmmamba_cli.verification import steps as verification_steps

Folders = Callable[[str], Path]
MIXERS = [f"mixer {name}" for name in mixer_specs() if name != "attention"]
ON_FILES = ["tensors", "anatomy", "finite values", "tokenizer", "special tokens", "chat template"]
ON_MODELS = [*MIXERS, "student from the files"]
NORM = "model.layers.2.self_attn.q_norm.weight"


@pytest.fixture
def one_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify one mixer, where the mixers are not the point."""
    few = {"mamba2": mixer_specs()["mamba2"]}
    monkeypatch.setattr(student_checks, "mixer_specs", lambda: few)


def test_a_language_model_agrees(teacher_folders: Folders) -> None:
    report = verify(teacher_folders("qwen3"))
    assert report.agrees, report
    assert names_with(report, "ok") == [
        *ON_FILES,
        "stock class",
        "logits, text",
        "logits, left-padded batch",
        "generation",
        "cache and padding",
        *ON_MODELS,
        "HolisticVLM",
        "memory",
        "memory, estimates",
    ]
    assert len(report.checks) == len(names_with(report, "ok"))
    assert "bit for bit" in result(report, "logits, text").detail
    assert report.compared_with is not None and "Qwen3ForCausalLM" in report.compared_with


@pytest.mark.usefixtures("one_mixer")
def test_a_vision_language_model_agrees_and_warns(teacher_folders: Folders) -> None:
    report = verify(teacher_folders("gemma3"))
    if HAS_TORCHVISION or "processor, one picture" in names_with(report, "ok"):
        assert result(report, "processor, one picture").detail.startswith("4 image tokens")
        assert "bit for bit" in result(report, "logits, two pictures").detail
        assert not names_with(report, "skipped")
    assert report.agrees, report
    assert "both directions" in report.warnings[0]


@pytest.mark.skipif(HAS_TORCHVISION, reason="the processor needs torchvision, which is there")
@pytest.mark.usefixtures("one_mixer")
def test_a_processor_without_its_package_is_skipped_with_the_remedy(
    teacher_folders: Folders,
) -> None:
    report = verify(teacher_folders("qwen3_vl"))
    assert report.agrees, report
    pictures = ["logits, one picture", "logits, two pictures"]
    processor = ["processor, one picture", "processor, two pictures", "processor, batch"]
    assert names_with(report, "skipped") == [*processor, *pictures]
    assert "pip install torchvision" in result(report, "processor, one picture").detail


@pytest.mark.usefixtures("one_mixer")
def test_tensors_are_named_and_models_left_out(copied: Folders) -> None:
    folder = copied("qwen3")

    def break_three(tensors: dict[str, Any]) -> None:
        del tensors[NORM]
        tensors["model.extra.weight"] = torch.ones(2)
        tensors["model.norm.weight"] = torch.ones(3)

    edit_tensors(folder, break_three)
    report = verify(folder)
    assert names_with(report, "different") == ["tensors"]
    detail = result(report, "tensors").detail
    assert f"missing: {NORM};" in detail
    assert "unexpected: model.extra.weight;" in detail
    assert "other shapes: model.norm.weight is [3], expected [32]" in detail
    assert "stock class" in names_with(report, "skipped")


@pytest.mark.usefixtures("one_mixer")
def test_values_that_are_not_finite_are_named(copied: Folders) -> None:
    folder = copied("qwen3")
    edit_tensors(folder, lambda tensors: tensors[NORM].fill_(float("nan")))
    report = verify(folder)
    assert {"finite values", "logits, text"} <= set(names_with(report, "different"))
    assert NORM in result(report, "finite values").detail
    assert "NaN or infinity" in result(report, "logits, text").detail


@pytest.mark.usefixtures("one_mixer")
def test_the_first_layer_that_differs_is_named(
    teacher_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert_wrongly(teacher: Any, plan: Any, **options: Any) -> Any:
        student = convert(teacher, plan, **options)
        norm = student.model.layers[2].self_attn.q_norm
        norm.weight = torch.nn.Parameter(norm.weight * 1.5)
        return student

    monkeypatch.setattr(student_checks, "convert", convert_wrongly)
    report = verify(teacher_folders("qwen3"))
    assert "logits, text" in names_with(report, "different")
    detail = result(report, "logits, text").detail
    assert "hidden states differ first behind text layer 2" in detail
    assert "logits of the first token differ by" in result(report, "generation").detail
    # What does not go through `convert` agrees.
    assert result(report, "student from the files").status == "ok"


@pytest.mark.usefixtures("one_mixer")
def test_a_student_that_its_config_changes_is_found(
    teacher_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = student_checks.student_config

    def other_epsilon(config: Any, plan: Any) -> Any:
        own = original(config, plan)
        own.rms_norm_eps = 0.1
        return own

    monkeypatch.setattr(student_checks, "student_config", other_epsilon)
    report = verify(teacher_folders("qwen3"))
    assert names_with(report, "different") == ["student from the files"]


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (lambda hidden: hidden.shape[1] == 1, "with a cache [1-9]"),
        (lambda hidden: hidden.shape[0] > 1, "in a left-padded batch [1-9]"),
    ],
    ids=["cache", "batch"],
)
@pytest.mark.usefixtures("one_mixer")
def test_a_mixer_that_a_cache_or_a_batch_changes_is_found(
    breaks: Callable[[Any], bool],
    words: str,
    teacher_folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def convert_wrongly(teacher: Any, plan: Any, **options: Any) -> Any:
        student = convert(teacher, plan, **options)
        for mixer in mixers_of(student):
            if mixer.mixer_name == "mamba2":
                mixer.o_proj = torch.nn.Sequential(mixer.o_proj)
                mixer.o_proj.register_forward_hook(
                    lambda module, args, output: output + (1.0 if breaks(args[0]) else 0.0)
                )
        return student

    monkeypatch.setattr(student_checks, "convert", convert_wrongly)
    report = verify(teacher_folders("llama"))
    assert names_with(report, "different") == ["mixer mamba2"]
    assert re.search(words, result(report, "mixer mamba2").detail)


@pytest.mark.usefixtures("one_mixer")
def test_a_mixer_without_effect_is_found(
    teacher_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep_attention(teacher: Any, plan: Any, **options: Any) -> Any:
        student = convert(teacher, plan, **options)
        if plan.mixers[0] == "mamba2":
            student.forward = teacher.forward
        return student

    monkeypatch.setattr(student_checks, "convert", keep_attention)
    report = verify(teacher_folders("qwen3"))
    assert "mixer mamba2" in names_with(report, "different")
    assert "no effect" in result(report, "mixer mamba2").detail


@pytest.mark.usefixtures("one_mixer")
def test_without_a_tokenizer_ids_are_random(copied: Folders) -> None:
    folder = copied("qwen3")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).unlink()
    report = verify(folder)
    assert report.agrees
    assert names_with(report, "skipped") == ["tokenizer", "special tokens", "chat template"]
    assert "(1 x 12 tokens)" in result(report, "logits, text").detail


@pytest.mark.usefixtures("one_mixer")
def test_a_teacher_that_cannot_be_converted_is_told_by_its_field(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(refused_config("phi3")).save_pretrained(tmp_path)
    report = verify(tmp_path)
    assert names_with(report, "different") == ["anatomy"]
    assert "phi3 cannot be converted" in result(report, "anatomy").detail
    assert "stock class" in names_with(report, "skipped")


@pytest.mark.usefixtures("one_mixer")
def test_an_exception_of_a_class_is_a_difference_with_its_place(
    teacher_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise ValueError("no such layer\nsecond line")

    monkeypatch.setattr(student_checks, "compare_generation", fail)
    report = verify(teacher_folders("qwen3"))
    assert names_with(report, "different") == ["generation"]
    detail = result(report, "generation").detail
    assert detail.startswith("ValueError: no such layer (test_teachers_of_transformers.py:")


@pytest.mark.usefixtures("one_mixer")
def test_a_model_that_does_not_fit_is_one_sentence(
    teacher_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: Any, nbytes: int, what: str) -> None:
        raise verification_steps.OutOfMemory(f"{what} needs {nbytes} bytes")

    monkeypatch.setattr(in_place_teacher, "require_memory", refuse)
    with pytest.raises(MmmambaError, match=r"a model in float32 needs \d+ bytes \(give --dtype"):
        verify(teacher_folders("qwen3"))


@pytest.mark.usefixtures("one_mixer")
def test_students_and_configs_that_transformers_lacks_are_refused(copied: Folders) -> None:
    folder = copied("qwen3")
    for values, words in (
        ({"model_type": "mmmamba_qwen3"}, "is a student of qwen3"),
        ({"model_type": "no_such_model"}, "whose model_type is no_such_model"),
        ({"model_type": "internvl_chat", "vision_config": {}}, "ends with -hf"),
        ({"model_type": None}, "has no model_type"),
    ):
        edit_json(folder / "config.json", **values)
        with pytest.raises(CheckpointError, match=words):
            verify(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        verify(folder)
