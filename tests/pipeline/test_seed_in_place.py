"""Seeding of transformers' own models: a student has its teacher's tensors and the mixers'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, LAYERS, save_teacher
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

import mmmamba_cli
from mmmamba_cli.checkpoint import open_in_place
from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.runs import Run
from mmmamba_cli.teachers import StudentPlan, convert, model_names

# Other names on disk than in the model; a tied head; and a language model.
NAMES = ("qwen3_vl", "llava_onevision", "gemma3", "qwen2")
WEIGHTS = "model.safetensors"


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


def seed(source: Path, run: Path, *words: object) -> dict[str, Any]:
    options = ("--dtype", "fp32", "--no-report", "--json", "--in-place", "--allow-bidirectional")
    return json.loads(mmmamba("seed", source, "--run", run, *options, *words).stdout)


def weights(run: Path, name: str = "seed") -> dict[str, torch.Tensor]:
    return load_file(run / "products" / name / WEIGHTS)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teachers of `NAMES`; never changed."""
    folder = tmp_path_factory.mktemp("teachers")
    for name in NAMES:
        save_teacher(FAMILIES[name], folder / name)
    return folder


@pytest.fixture
def teacher(teachers: Path, tmp_path: Path) -> Path:
    """A copy of a teacher, to be damaged."""
    return Path(shutil.copytree(teachers / "qwen3_vl", tmp_path / "teacher"))


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_is_the_teacher_with_new_tensors(name: str, teachers: Path, tmp_path: Path) -> None:
    made = seed(teachers / name, tmp_path / "run")
    stored, tensors = load_file(teachers / name / WEIGHTS), weights(tmp_path / "run")
    assert all(torch.equal(tensors[key], value) for key, value in stored.items())
    family = FAMILIES[name]
    new = set(tensors) - set(stored)
    assert len(new) == 7 * LAYERS and all(".self_attn." in key for key in new)
    product = tmp_path / "run/products/seed"
    student = mmmamba_cli.load(str(product))
    expected = convert(family.model(), StudentPlan.of_layers(LAYERS), allow_bidirectional=True)
    state = student.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
    assert type(student).__name__ == type(expected).__name__
    manifest = Run(tmp_path / "run").product("seed")
    assert manifest.kind == "linear" and manifest.content_hash == made["product"]["content_hash"]
    assert manifest.content_hash == open_in_place(product).source.content_hash()
    assert Run(tmp_path / "run").is_in_place
    Run(tmp_path / "run").verify_teacher(open_in_place(teachers / name))


def test_files_of_processor_and_generation_are_copied(teachers: Path, tmp_path: Path) -> None:
    seed(teachers / "gemma3", tmp_path / "run")
    product, source = tmp_path / "run/products/seed", teachers / "gemma3"
    copied = {file.name for file in source.iterdir()} - {WEIGHTS, "config.json"}
    assert {"tokenizer.json", "processor_config.json", "chat_template.jinja"} <= copied
    for name in copied:
        assert (product / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((product / "source_config.json").read_text())["model_type"] == "gemma3"
    here, there = mmmamba_cli.load_processor(str(product)), FAMILIES["gemma3"].processor
    assert type(here) is type(there)
    assert here.tokenizer("a picture").input_ids == there.tokenizer("a picture").input_ids


def test_the_tokenizer_is_of_the_class_that_the_teacher_gets(
    teachers: Path, tmp_path: Path
) -> None:
    """Qwen2 is a family whose tokenizer_config.json transformers does not believe."""
    teacher = Path(shutil.copytree(teachers / "qwen2", tmp_path / "teacher"))
    file = teacher / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    seed(teacher, tmp_path / "run")
    here = mmmamba_cli.load_processor(str(tmp_path / "run/products/seed"))
    assert type(here) is type(AutoTokenizer.from_pretrained(teacher))
    assert "GPT2" not in type(here).__name__


def test_bf16_and_a_recipe_of_several_mixers(teachers: Path, tmp_path: Path) -> None:
    options = ("--set", "mixer.kind=gated_delta", "--set", "layers.mixers={mamba2: [1]}")
    seed(teachers / "qwen3_vl", tmp_path / "run", "--dtype", "bf16", *options)
    mixers = ("gated_delta", "mamba2", "gated_delta", "gated_delta")
    small = StudentPlan(mixers).fp32_parameters
    for name, tensor in weights(tmp_path / "run").items():
        is_small = not small.isdisjoint(name.split("."))
        assert tensor.dtype == (torch.float32 if is_small else torch.bfloat16), name
    student: Any = mmmamba_cli.load(str(tmp_path / "run/products/seed"))
    assert student.config.mmmamba["mixers"] == list(mixers)
    assert student.dtype == torch.bfloat16 == student.config.text_config.dtype


def test_scratch_has_random_projections_and_the_teachers_norms(
    teachers: Path, tmp_path: Path
) -> None:
    seed(teachers / "qwen3_vl", tmp_path / "run", "--init", "scratch")
    stored, tensors = load_file(teachers / "qwen3_vl" / WEIGHTS), weights(tmp_path / "run")
    changed = {key for key, value in stored.items() if not torch.equal(tensors[key], value)}
    projections = {f"{part}_proj.weight" for part in "qkvo"}
    own = model_names(open_in_place(teachers / "qwen3_vl").config, stored)
    assert len(changed) == 4 * LAYERS
    assert all(own[key].partition(".self_attn.")[2] in projections for key in changed)


def test_shards_give_the_same_student_and_a_missing_one_is_named(
    teacher: Path, tmp_path: Path
) -> None:
    whole = seed(teacher, tmp_path / "whole")["product"]
    tensors = load_file(teacher / WEIGHTS)
    (teacher / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, teacher / file)
    index = {key: file for file, keys in parts.items() for key in keys}
    (teacher / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    assert seed(teacher, tmp_path / "run")["product"]["content_hash"] == whole["content_hash"]
    (teacher / "b.safetensors").unlink()
    with pytest.raises(MmmambaError, match=r"missing: 'b.safetensors'"):
        seed(teacher, tmp_path / "other")


# What happens to W_K of the first text layer, and what is said of it.
DAMAGED = {
    "missing": (lambda weight: None, r"missing 1 tensors: model\S+0.self_attn.k_proj.weight"),
    "misshaped": (lambda weight: weight[:3].clone(), r"k_proj.weight \[3, 32\] instead of \[16, "),
    "NaN": (lambda weight: torch.full_like(weight, torch.nan), "k_proj.weight' holds 512 NaN"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_tensors_stop_the_step(case: str, teacher: Path, tmp_path: Path) -> None:
    damage, message = DAMAGED[case]
    state = load_file(teacher / WEIGHTS)
    name = next(key for key in state if key.endswith(".layers.0.self_attn.k_proj.weight"))
    value = damage(state.pop(name))
    state |= {} if value is None else {name: value}
    save_file(state, teacher / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(MmmambaError, match=message):
        seed(teacher, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unexpected_tensors_stop_the_step(teacher: Path, tmp_path: Path) -> None:
    state = load_file(teacher / WEIGHTS)
    save_file({**state, "model.other": torch.ones(1)}, teacher / WEIGHTS)
    with pytest.raises(MmmambaError, match=r"1 unexpected tensors: model.other"):
        seed(teacher, tmp_path / "run")


def test_a_students_folder_under_its_teachers_model_type(teachers: Path, tmp_path: Path) -> None:
    seed(teachers / "qwen3_vl", tmp_path / "run")
    product = tmp_path / "run/products/seed"
    file = product / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "model_type": "qwen3_vl"}))
    with pytest.raises(MmmambaError, match=r"set model_type to mmmamba_qwen3_vl"):
        mmmamba_cli.load(str(product))
    shutil.copyfile(product / "source_config.json", file)
    with pytest.raises(
        MmmambaError, match=r"it is a student's file with its teacher's config.json"
    ):
        mmmamba_cli.load(str(product))


def test_a_repeated_tied_head_is_left_out_if_it_is_equal(teachers: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(teachers / "gemma3", tmp_path / "teacher"))
    state = load_file(teacher / WEIGHTS)
    table = next(key for key in state if key.endswith("embed_tokens.weight"))
    head = state[table].clone()
    save_file({**state, "lm_head.weight": head}, teacher / WEIGHTS, metadata={"format": "pt"})
    seed(teacher, tmp_path / "run")
    assert "lm_head.weight" not in weights(tmp_path / "run")
    assert "lm_head.weight" in Run(tmp_path / "run").teacher.digests
    save_file({**state, "lm_head.weight": head + 1}, teacher / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(MmmambaError, match=r"lm_head.weight differs from"):
        seed(teacher, tmp_path / "other")


def test_teachers_that_are_refused_by_name(teachers: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(MmmambaError, match=r"both directions.*--allow-bidirectional"):
        mmmamba("seed", teachers / "gemma3", "--run", tmp_path / "run")
    config = json.loads((teacher / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "gptq"}}
    (teacher / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(MmmambaError, match=r"quant_method is gptq.*take the unquantized"):
        seed(teacher, tmp_path / "run")
    (teacher / "config.json").write_text(json.dumps({**config, "model_type": "qwen9_vl"}))
    with pytest.raises(MmmambaError, match=r"qwen9_vl, which the installed transformers does not"):
        seed(teacher, tmp_path / "run")
    with pytest.raises(MmmambaError, match=r"mixer.init is calibrated"):
        seed(teachers / "qwen2", tmp_path / "run", "--init", "calibrated")
    with pytest.raises(MmmambaError, match=r"leave out --config, --tokenizer and --arch"):
        seed(teachers / "qwen2", tmp_path / "run", "--arch", "hovle-2.6b")
    with pytest.raises(MmmambaError, match=r"layers.attention: is 99, must be from 0 to \d"):
        seed(teachers / "qwen2", tmp_path / "run", "--set", "layers.attention=99")
    assert not (tmp_path / "run").exists()


def test_a_language_model_takes_the_fast_path_unless_asked(teachers: Path, tmp_path: Path) -> None:
    words = (teachers / "qwen2", "--run", tmp_path / "run", "--no-report")
    mmmamba("seed", *words)
    config = json.loads((tmp_path / "run/products/seed/config.json").read_text())
    assert config["model_type"] == "mmmamba" and not Run(tmp_path / "run").is_in_place
    assert "in_place" not in json.loads((tmp_path / "run/run.json").read_text())["teacher"]
    mmmamba("seed", *words, "--in-place", "--overwrite")
    config = json.loads((tmp_path / "run/products/seed/config.json").read_text())
    assert config["model_type"] == "mmmamba_qwen2" and Run(tmp_path / "run").is_in_place


def test_commands_that_do_not_take_such_a_student_say_so(teachers: Path, tmp_path: Path) -> None:
    seed(teachers / "qwen3_vl", tmp_path / "run")
    with pytest.raises(MmmambaError, match="--select does not score yet"):
        words = ("--select", "kl-zero", "--attn-layers", 1, "--device", "cpu")
        mmmamba("hybridize", *words, "--run", tmp_path / "run")


def test_a_student_of_another_kind_is_refused(tmp_path: Path) -> None:
    """A run has students of one kind: of transformers' own class, or of this package's."""
    save_teacher(FAMILIES["llama"], tmp_path / "teacher")
    mmmamba("seed", tmp_path / "teacher", "--in-place", "--run", tmp_path / "run", "--no-report")
    mmmamba("seed", tmp_path / "teacher", "--run", tmp_path / "other", "--no-report")
    words = ("import", tmp_path / "other/products/seed", "--teacher", tmp_path / "teacher")
    with pytest.raises(MmmambaError, match="import into another --run"):
        mmmamba(*words, "--run", tmp_path / "run")
    assert Run(tmp_path / "run").record.current == "seed"
