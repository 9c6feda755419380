"""Exports in the published layouts: names, dtypes and bits, and unsupported features."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mmmamba_hf_case import KINDS, kept_layers, released_tensors, write_released
from safetensors.torch import load_file, save_file
from small import small_model
from small_language_models import write
from test_as_a_new_user import write_teacher
from typer.testing import CliRunner

import mmmamba_cli
from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.export import FORMATS, export_checkpoint
from mmmamba_cli.runs import open_processor

LINEAR = Path(__file__).parents[2] / "evals/scenes/models/linear"


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


def export(source: Path, form: str, target: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Export and return the tensors."""
    export_checkpoint(open_checkpoint(source), form, target, **options)
    return load_file(target / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Assert equal names, dtypes and bits."""
    assert set(one) == set(two)
    for name, tensor in two.items():
        assert one[name].dtype == tensor.dtype and torch.equal(one[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_published_model_round_trip(golden_case: Path, tmp_path: Path, kind: str) -> None:
    """Directly and through a product; unfused names of the training code are fused."""
    folder = write_released(tmp_path / "in", golden_case, kind)
    expected = released_tensors(golden_case, "linear" if kind == "training" else kind)
    assert_same(export(folder, "mmmamba-hf", tmp_path / "out"), expected)
    mmmamba("import", folder, "--run", tmp_path / "run")
    product = tmp_path / "run/products/imported"
    assert_same(export(product, "mmmamba-hf", tmp_path / "again"), expected)
    raw = json.loads((tmp_path / "again/config.json").read_text())
    assert raw["architectures"] == "mmMambaChatModel" and raw["model_type"] == "mmMamba_chat"
    listed = raw["embedding_config"]["layers_block_type"] + raw["llm_config"]["layers_block_type"]
    assert [i for i, k in enumerate(listed) if k == "mha"] == kept_layers(golden_case, kind)
    assert raw["torch_dtype"] == "float32"


@torch.no_grad()
def test_golden_logits_of_an_exported_student(golden_case: Path, tmp_path: Path) -> None:
    """From a product of a HoVLE, whose config is not a published mmMamba's."""
    kept = ",".join(map(str, kept_layers(golden_case, "hybrid")))
    folder = write_released(tmp_path / "in", golden_case, "linear")
    mmmamba("seed", golden_case, "--run", tmp_path / "run", "--dtype", "fp32", "--no-report")
    mmmamba("import", folder, "--run", tmp_path / "run")
    shutil.copy(
        tmp_path / "run/products/seed/source_config.json",
        tmp_path / "run/products/imported/source_config.json",
    )
    mmmamba("hybridize", "--layers", kept, "--from", "imported", "--run", tmp_path / "run")
    mmmamba(
        *("export", "--run", tmp_path / "run", "--format", "mmmamba-hf", "--out", tmp_path / "out")
    )
    assert_same(
        load_file(tmp_path / "out/model.safetensors"), released_tensors(golden_case, "hybrid")
    )
    golden = load_file(golden_case / "golden.safetensors")
    model = mmmamba_cli.load(str(tmp_path / "out"))
    logits = model(golden["input.input_ids"], golden["input.pixel_values"]).logits
    expected = golden["stage3.hybrid.logits"]
    assert (logits - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hovle_round_trip(golden_case: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Through a hybrid with attention in all layers; unused tensors and dtypes are kept."""
    source, word = tmp_path / "teacher", str(dtype).removeprefix("torch.")
    source.mkdir()
    shutil.copy(golden_case / "config.json", source)
    teacher = {k: t.to(dtype) for k, t in load_file(golden_case / "model.safetensors").items()}
    save_file(teacher, source / "model.safetensors")
    assert_same(export(source, "hovle", tmp_path / "direct"), teacher)
    run = tmp_path / "run"
    mmmamba("seed", source, "--run", run, "--dtype", word, "--no-report")
    mmmamba("hybridize", "--attn-layers", "5", "--run", run)
    options = ("--run", run, "--format", "hovle", "--dtype", word)
    mmmamba("export", *options, "--out", tmp_path / "out")
    assert_same(load_file(tmp_path / "out/model.safetensors"), teacher)
    assert any("class_embedding" in name for name in teacher)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out")
    )
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed <= {
        *("architectures", "auto_map", "torch_dtype", "embedding_config", "llm_config"),
        *("_name_or_path", "_commit_hash"),
        "mmmamba",  # provenance
    }
    assert open_checkpoint(tmp_path / "out").config.to_dict() == (
        open_checkpoint(source).config.to_dict()
    )


def test_small_parameters_keep_their_dtype_unless_told(golden_case: Path, tmp_path: Path) -> None:
    """The decays of a bf16 student are fp32 and stay fp32 in its export."""
    run = tmp_path / "run"
    mmmamba("seed", golden_case, "--run", run, "--no-report")
    found = export(run / "products/seed", "mmmamba-hf", tmp_path / "kept")
    prefix = "embedding_model.encoder.0.attention."
    assert found[prefix + "A_log_bias"].dtype == torch.float32
    assert found[prefix + "wvkqgdt.weight"].dtype == torch.bfloat16
    told = export(run / "products/seed", "mmmamba-hf", tmp_path / "told", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in told.values()} == {torch.bfloat16}
    assert open_checkpoint(tmp_path / "told").shapes == open_checkpoint(tmp_path / "kept").shapes


@pytest.mark.parametrize("written", [True, False])
def test_a_tied_head_is_written_as_it_was_kept(
    golden_case: Path, tmp_path: Path, written: bool
) -> None:
    """A head that differs from the tied table is written although the config ties it."""
    source = tmp_path / "teacher"
    source.mkdir()
    raw = json.loads((golden_case / "config.json").read_text())
    raw["llm_config"]["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(raw))
    teacher = load_file(golden_case / "model.safetensors")
    if not written:
        del teacher["language_model.output.weight"]
    save_file(teacher, source / "model.safetensors")
    mmmamba("seed", source, "--run", tmp_path / "run", "--dtype", "fp32", "--no-report")
    mmmamba("hybridize", "--attn-layers", "5", "--run", tmp_path / "run")
    assert_same(export(tmp_path / "run/products/hybrid-5", "hovle", tmp_path / "out"), teacher)


# Unsupported features.

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"d_skip": True}, "no D skip .mixer.d_skip"),
    ({"qk_norm": True}, "no norm on q and k .mixer.qk_norm"),
    ({"rope": True}, "no RoPE inside the mixer .mixer.rope"),
    ({"input_step": False}, "no state without input step .mixer.input_step"),
    ({"tile_taps": True}, "no taps inside tiles .mixer.tile_taps"),
    ({"conv_width": 4}, "no convolution of width 4 .mixer.conv_width., only of 2"),
    ({"d_skip": True, "rope": True}, "no D skip .mixer.d_skip.; no RoPE inside"),
]


@pytest.mark.parametrize(("options", "said"), OPTIONS)
def test_options_of_the_mixer_are_refused_by_name(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    small_model("amam", **options).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=said):
        export(tmp_path / "model", "mmmamba-hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(tmp_path / "model", "hub", tmp_path / "out")


@torch.no_grad()
@pytest.mark.parametrize("form", ["mmmamba-hf", "hovle"])
def test_other_mixers_are_refused_by_name(tmp_path: Path, form: str) -> None:
    model = small_model("awam", window=3, sinks=1, sink_logits=True)
    model.save_pretrained(tmp_path / "model")
    said = {"hovle": "no linear layers", "mmmamba-hf": "no sliding-window attention mixer"}
    with pytest.raises(CheckpointError, match=f"{said[form]}, and layer 1 is one"):
        export(tmp_path / "model", form, tmp_path / "out")
    export(tmp_path / "model", "hub", tmp_path / "out")
    again, ids = mmmamba_cli.load(str(tmp_path / "out")), torch.arange(2, 14)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("qkv_bias", True, "no biases in attention .embedding stack"),
        ("output_bias", True, "no biases in attention .embedding stack"),
        ("qk_norm", True, "no norm on q and k .embedding stack"),
    ],
)
@pytest.mark.parametrize("form", ["mmmamba-hf", "hovle"])
def test_options_of_a_stack_are_refused_by_name(
    tmp_path: Path, form: str, field: str, value: Any, said: str
) -> None:
    from mmmamba_cli.model import HolisticVLM

    plan = "aaaa" if form == "hovle" else "amam"
    config = small_model(plan).config
    config.embedding_stack = {**config.embedding_stack, field: value}
    HolisticVLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=said):
        export(tmp_path / "model", form, tmp_path / "out")


def test_other_shapes_of_a_stack_are_refused_by_name(tmp_path: Path) -> None:
    from mmmamba_cli.model import HolisticVLM

    config = small_model("aaaa").config
    llama3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 64
    config.language_stack = {**config.language_stack, "head_dim": 16, "rope_scaling": llama3}
    HolisticVLM(config).save_pretrained(tmp_path / "model")
    said = "no head size other than hidden size / heads .language stack.; no RoPE scaling 'llama3'"
    with pytest.raises(CheckpointError, match=said):
        export(tmp_path / "model", "hovle", tmp_path / "out")


def test_hovle_names_the_first_linear_layer(golden_case: Path, tmp_path: Path) -> None:
    folder = write_released(tmp_path / "in", golden_case, "hybrid")
    kept = kept_layers(golden_case, "hybrid")
    first = next(i for i in range(5) if i not in kept)
    with pytest.raises(CheckpointError, match=rf"no linear layers, and layer {first} is one"):
        export(folder, "hovle", tmp_path / "out")


@pytest.mark.parametrize("form", ["mmmamba-hf", "hovle"])
def test_language_models_are_not_supported(tmp_path: Path, form: str) -> None:
    write(tmp_path / "llama", "Llama", {})
    with pytest.raises(CheckpointError, match=r"language model without vision.*--format hub"):
        export(tmp_path / "llama", form, tmp_path / "out")


def test_missing_unused_tensors_are_named(tmp_path: Path) -> None:
    small_model("aaaa").save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"lacks .*unused.class_embedding"):
        export(tmp_path / "model", "hovle", tmp_path / "out")


def test_an_unknown_format_names_the_known(golden_case: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="known are: hub, mmmamba-hf, hovle"):
        export(golden_case, "onnx", tmp_path / "out")


def test_configs_that_disagree_are_refused(golden_case: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mmmamba("seed", golden_case, "--run", run, "--no-report")
    file = run / "products/seed/source_config.json"
    raw = json.loads(file.read_text())
    raw["llm_config"]["rope_theta"] = 7.0
    file.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="disagree on language"):
        export(run / "products/seed", "mmmamba-hf", tmp_path / "out")


# Sidecar files.


@pytest.mark.parametrize("kept_config", [True, False])
@pytest.mark.parametrize("form", ["mmmamba-hf", "hovle"])
def test_the_tokenizer_reads_back_the_same(tmp_path: Path, form: str, kept_config: bool) -> None:
    """With the teacher's config and without it, from the native one."""
    folder, run = write_teacher(tmp_path / "teacher"), tmp_path / "run"
    mmmamba("seed", folder / "hovle.ckpt", "--run", run, "--no-report")
    mmmamba("hybridize", "--attn-layers", "8" if form == "hovle" else "2", "--run", run)
    product = next((run / "products").glob("hybrid-*"))
    if not kept_config:
        (product / "source_config.json").unlink()
    export(product, form, tmp_path / "out")
    before, after = (open_processor(open_checkpoint(path)) for path in (product, tmp_path / "out"))
    assert before is not None and after is not None
    talk = "Is there a dog? <img>\n<|im_end|> 图片 <box>"
    assert after.chat(talk)["input_ids"].tolist() == before.chat(talk)["input_ids"].tolist()
    assert after.tokenizer(talk).input_ids == before.tokenizer(talk).input_ids
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    assert after.to_dict() | {"tokenizer": 0} == before.to_dict() | {"tokenizer": 0}
    one, two = (open_checkpoint(path) for path in (product, tmp_path / "out"))
    own = ("dtype", "transformers_version", "mixer")
    assert one.config.to_dict() == two.config.to_dict() | {
        key: one.config.to_dict()[key] for key in own
    }
    assert one.config.mixer_config == two.config.mixer_config
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "InternLM2Tokenizer"
    listed = {token["content"]: int(i) for i, token in settings["added_tokens_decoder"].items()}
    assert listed == before.tokenizer.get_added_vocab()


def test_a_teachers_tokenizer_files_are_copied(tmp_path: Path) -> None:
    folder = write_teacher(tmp_path / "teacher")
    export_checkpoint(open_checkpoint(folder / "hovle.ckpt"), "hovle", tmp_path / "out")
    for name in ("tokenizer.model", "added_tokens.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("form", FORMATS)
def test_shards_and_index(golden_case: Path, tmp_path: Path, form: str) -> None:
    found = export_checkpoint(
        open_checkpoint(golden_case), form, tmp_path / "out", max_shard_bytes=200_000
    )
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    again = open_checkpoint(tmp_path / "out")
    assert again.source.content_hash() == found.content_hash
    assert len(again.source.names) == found.tensors


def test_code_references_of_the_teacher_are_dropped(golden_case: Path, tmp_path: Path) -> None:
    """Code references of a teacher's config are replaced by the published repository's."""
    source = tmp_path / "teacher"
    source.mkdir()
    raw = json.loads((golden_case / "config.json").read_text())
    raw["auto_map"] = {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}
    raw["llm_config"]["auto_map"] = {"AutoModel": "modeling_internlm2.InternLM2ForCausalLM"}
    raw["_name_or_path"] = "/home/someone/secret"
    (source / "config.json").write_text(json.dumps(raw))
    shutil.copy(golden_case / "model.safetensors", source)
    export(source, "hovle", tmp_path / "out")
    text = (tmp_path / "out/config.json").read_text()
    assert "secret" not in text and "modeling_internlm2" not in text
    assert all("--" in value for value in json.loads(text)["auto_map"].values())


def test_a_native_export_keeps_the_dtype_of_each_tensor(tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(LINEAR, source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mixer.o_proj.weight"
    tensors[name] = tensors[name].float() + 1e-5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    kept = export(source, "hub", tmp_path / "kept")
    assert kept[name].dtype == torch.float32 and torch.equal(kept[name], tensors[name])
    told = export(source, "hub", tmp_path / "told", dtype=torch.bfloat16)
    assert told[name].dtype == torch.bfloat16
