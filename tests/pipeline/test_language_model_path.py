"""Students of language models whose attention has biases or norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_language_models import distance, write, write_tokenizer
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import mmmamba_cli
from mmmamba_cli.architecture import parameter_shapes
from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.cli.app import app
from mmmamba_cli.distill.trainable import trainable_names
from mmmamba_cli.recipe import load_recipe
from mmmamba_cli.runs import Run

BIASES = {f"{name}_proj.bias" for name in "qkv"}
NORMS = {"q_norm.weight", "k_norm.weight"}
CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "qwen2": ("Qwen2", {}, BIASES),
    "qwen3": ("Qwen3", {"head_dim": 16}, NORMS),
    "llama": ("Llama", {"attention_bias": True}, {*BIASES, "o_proj.bias"}),
}


@pytest.fixture(params=CASES)
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, set[str]]:
    kind, options, extra = CASES[request.param]
    write(tmp_path / "teacher", kind, options)
    return tmp_path / "teacher", extra


def mmmamba(*words: object) -> str:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False).output


def mixers(product: Path) -> dict[str, torch.Tensor]:
    """Mixer parameters of layer 1 by local name."""
    state, prefix = load_file(product / "model.safetensors"), "model.layers.1.mixer."
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


@pytest.mark.parametrize("init", ["inherit+mimic", "scratch"])
def test_biases_and_norms_are_inherited_with_their_matrices(
    teacher: tuple[Path, set[str]], tmp_path: Path, init: str
) -> None:
    folder, extra = teacher
    run = tmp_path / "run"
    mmmamba("seed", folder, "--run", run, "--dtype", "fp32", "--init", init)
    found, checkpoint = mixers(run / "products/seed"), open_checkpoint(folder)
    assert extra <= set(found)
    for name in extra | {"q_proj.weight", "o_proj.weight"}:
        same = torch.equal(found[name], checkpoint.read(f"model.layers.1.mixer.{name}"))
        assert same == (init != "scratch"), name
    if init == "scratch":
        assert all(not found[n].any() for n in extra if n.endswith("bias"))
        assert all(bool((found[n] == 1).all()) for n in extra & NORMS)
        assert found["q_proj.weight"].abs().max() <= 32**-0.5


@torch.no_grad()
def test_the_seeded_mixer_uses_the_teachers_biases_and_norms(
    teacher: tuple[Path, set[str]], tmp_path: Path
) -> None:
    """The seeded convolution is the identity, up to its SiLU before the norms."""
    folder, _ = teacher
    mmmamba("seed", folder, "--run", tmp_path / "run", "--dtype", "fp32", "--no-report")
    student, theirs = mmmamba_cli.load(tmp_path / "run/products/seed"), mmmamba_cli.load(folder)
    prompt = theirs.model.prepare(torch.arange(3, 30)[None])
    one, two = student.model.blocks[0].mixer, theirs.model.blocks[0].mixer
    normed = theirs.model.blocks[0].mixer_norm(theirs.model.embed(prompt))
    v, k, q, _ = one.values_keys_queries(normed, prompt.language_layout)
    for found, name in ((q, "q"), (k, "k"), (v, "v")):
        expected = silu(two.get_submodule(f"{name}_proj")(normed)).view(found.shape)
        norm = getattr(two, f"{name}_norm", None)
        assert distance(found, expected if norm is None else norm(expected)) < 1e-6
    mixed = one.mix(normed, prompt.language_layout)
    bias = 0 if two.o_proj.bias is None else two.o_proj.bias
    assert distance(one(normed, prompt.language_layout), mixed @ two.o_proj.weight.T + bias) < 1e-6


def test_all_attention_again_is_the_teacher(teacher: tuple[Path, set[str]], tmp_path: Path) -> None:
    folder, _ = teacher
    run = tmp_path / "run"
    mmmamba("seed", folder, "--run", run, "--dtype", "fp32", "--no-report")
    mmmamba("hybridize", "--attn-layers", 4, "--run", run)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = mmmamba_cli.load(folder)(ids).logits
        again = mmmamba_cli.load(run / "products/hybrid-4")(ids).logits
    assert torch.equal(again, expected)


@torch.no_grad()
def test_decoding_of_a_hybrid_equals_one_forward_pass(
    teacher: tuple[Path, set[str]], tmp_path: Path
) -> None:
    """Prefill and single steps in a left-padded batch match one full forward pass."""
    folder, _ = teacher
    run = tmp_path / "run"
    mmmamba("seed", folder, "--run", run, "--dtype", "fp32", "--no-report")
    mmmamba("hybridize", "--attn-layers", 2, "--run", run)
    product = run / "products/hybrid-2"
    model = AutoModelForCausalLM.from_pretrained(product).eval()
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 319}
    result = model.generate(
        ids, attention_mask=mask, **settings, output_logits=True, return_dict_in_generate=True
    )
    whole = torch.cat((mask, torch.ones(2, 6, dtype=mask.dtype)), dim=1)
    full = model(result.sequences, attention_mask=whole).logits
    assert distance(torch.stack(result.logits, 1), full[:, 19:-1]) < 1e-5
    alone = model(result.sequences[:1, 6:]).logits
    assert distance(alone[0, -1], full[0, -1]) < 1e-5


def test_inherited_norms_are_trainable_with_their_matrices(tmp_path: Path) -> None:
    stage = load_recipe("mmmamba-linear").stages
    first, second = (next(s for s in stage if s.learns == word) for word in ("new", "new+qkv"))
    for kind, options, sets, inherited in (
        ("Qwen3", {"head_dim": 16}, (), True),
        ("Llama", {}, ("--set", "mixer.qk_norm=true"), False),
    ):
        folder, run = tmp_path / kind, tmp_path / f"run-{kind}"
        write(folder, kind, options)
        mmmamba("seed", folder, "--run", run, "--no-report", *sets)
        config = Run(run).open_product("seed").config
        names = list(parameter_shapes(config))
        norm = "model.layers.0.mixer.q_norm.weight"
        assert norm in names
        assert (norm in trainable_names(first, config, names)) == (not inherited)
        assert norm in trainable_names(second, config, names)


def test_biases_are_trainable_with_their_matrices(tmp_path: Path) -> None:
    write(tmp_path / "teacher", "Qwen2", {})
    run = tmp_path / "run"
    mmmamba("seed", tmp_path / "teacher", "--run", run, "--no-report")
    config = Run(run).open_product("seed").config
    stages, names = load_recipe("mmmamba-linear").stages, list(parameter_shapes(config))
    bias = "model.layers.0.mixer.q_proj.bias"
    learning = {s.learns: bias in trainable_names(s, config, names) for s in stages}
    assert learning["new"] is False and learning["new+qkv"] is True


def test_a_tied_student_in_bf16_is_loaded_in_bf16(tmp_path: Path) -> None:
    """Its norms are fp32, and it has no separate head that tells the dtype."""
    write(tmp_path / "teacher", "Llama", {"tie_word_embeddings": True})
    mmmamba("seed", tmp_path / "teacher", "--run", tmp_path / "run")
    model = mmmamba_cli.load(tmp_path / "run/products/seed")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model.config.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.float32


def test_rope_tables_in_old_files_are_ignored(tmp_path: Path) -> None:
    folder, run = tmp_path / "teacher", tmp_path / "run"
    write(folder, "Llama", {})
    state = load_file(folder / "model.safetensors")
    for layer in range(4):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, folder / "model.safetensors")
    mmmamba("seed", folder, "--run", run, "--no-report")
    assert not any(
        "inv_freq" in name for name in load_file(run / "products/seed/model.safetensors")
    )
    Run(run).verify_teacher(Run(run).open_teacher())


def test_teachers_without_template_or_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    write(folder, "Llama", {})
    said = CliRunner().invoke(app, ["seed", str(folder), "--run", str(tmp_path / "a")])
    assert said.exit_code == 0 and "has no tokenizer beside it" in said.stderr
    write_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    said = CliRunner().invoke(app, ["seed", str(folder), "--run", str(tmp_path / "b")])
    assert said.exit_code == 0 and "tokenizer" not in said.stderr
    assert (tmp_path / "b/products/seed/tokenizer.json").is_file()
