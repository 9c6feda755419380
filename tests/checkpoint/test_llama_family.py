"""Llama, Qwen2, Qwen3 and InternLM2 as teachers, against transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_language_models import SIZES, distance, write, write_tokenizer
from typer.testing import CliRunner

import mmmamba_cli
from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.checkpoint.name_map import foreign_tensors
from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.processing import HolisticTextProcessor
from mmmamba_cli.runs import Run, open_processor

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama, biases": ("Llama", {"attention_bias": True, "head_dim": 16}),
    "llama 3 positions": ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 50.0}}),
    "linear positions": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_and_tokens_are_transformers_own(case: str, tmp_path: Path) -> None:
    theirs = write(tmp_path, *CASES[case])
    ours = mmmamba_cli.load(tmp_path)
    assert ours.config.vision is None
    assert ours.config.attention_layers == (0, 1, 2, 3)
    ids = torch.randint(3, 300, (2, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    expected = theirs(ids, attention_mask=mask).logits[mask.bool()]
    assert distance(ours(ids, attention_mask=mask).logits[mask.bool()], expected) < 1e-5
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 319}
    answers = [m.generate(ids, attention_mask=mask, **settings) for m in (ours, theirs)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("case", CASES)
def test_name_map_round_trip(case: str, tmp_path: Path) -> None:
    write(tmp_path, *CASES[case])
    checkpoint = open_checkpoint(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    written = dict(foreign_tensors(checkpoint.name_map, checkpoint.read))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


@torch.no_grad()
def test_dynamic_positions_beyond_the_trained_length(tmp_path: Path) -> None:
    """Single rows: transformers uses the longest row of a batch for all rows."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    theirs = write(tmp_path, "Llama", {"rope_parameters": scaling})
    ids = torch.randint(3, 300, (1, 200), generator=torch.Generator().manual_seed(1))
    assert distance(mmmamba_cli.load(tmp_path)(ids).logits, theirs(ids).logits) < 1e-5


def test_older_rope_fields(tmp_path: Path) -> None:
    write(tmp_path, "Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    new = open_checkpoint(tmp_path).config
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"]
    for name in ("rope_type", "type"):
        scaling = {**LLAMA3, name: "llama3"}
        older = {**raw, "rope_theta": 5e5, "rope_scaling": scaling}
        (tmp_path / "config.json").write_text(json.dumps(older))
        assert open_checkpoint(tmp_path).config.to_dict() == new.to_dict()
    del older["rope_scaling"]["low_freq_factor"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    with pytest.raises(CheckpointError, match=r"rope_scaling\.low_freq_factor is None"):
        open_checkpoint(tmp_path)


def test_defaults_of_missing_config_fields(tmp_path: Path) -> None:
    for kind, expected in (("Llama", 2048), ("Qwen2", 32768)):
        write(tmp_path / kind, kind, {})
        file = tmp_path / kind / "config.json"
        raw = json.loads(file.read_text())
        for key in ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "head_dim"):
            raw.pop(key, None)
        file.write_text(json.dumps(raw))
        stack = open_checkpoint(tmp_path / kind).config.language
        assert (stack.max_position_embeddings, stack.rms_norm_eps) == (expected, 1e-6)
        assert (stack.rope_theta, stack.rope_scaling, stack.head_dim) == (1e4, None, 8)


def test_a_stored_tied_head(tmp_path: Path) -> None:
    write(tmp_path, "Llama", {"tie_word_embeddings": True})
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert set(dict(foreign_tensors(checkpoint.name_map, checkpoint.read))) == set(state)
    assert mmmamba_cli.load(tmp_path).config.tie_word_embeddings
    state["lm_head.weight"][5, 5] += 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="ties the head to the token embedding"):
        mmmamba_cli.load(tmp_path)


def test_stop_tokens(tmp_path: Path) -> None:
    """Stop tokens, also for a vocabulary of InternLM2's size, where its stop ids do not apply."""
    write(tmp_path, "Llama", {"eos_token_id": 2, "vocab_size": 92600, "hidden_size": 32})
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [7, 2], "do_sample": True}))
    settings = mmmamba_cli.load(tmp_path).generation_config
    assert settings.eos_token_id == [2, 7] and settings.do_sample
    file.unlink()
    assert mmmamba_cli.load(tmp_path).generation_config.eos_token_id == [2]


RECOMMENDED = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05}


def test_recommended_settings_reach_every_product(tmp_path: Path) -> None:
    """The seed and later products inherit the settings; settings that do not apply are named."""
    from small_language_models import write_tokenizer
    from typer.testing import CliRunner

    from mmmamba_cli.cli.app import app

    write(tmp_path / "teacher", "Qwen2", {"eos_token_id": 2})
    write_tokenizer(tmp_path / "teacher")
    settings = {**RECOMMENDED, "cache_implementation": "offloaded", "suppress_tokens": [7]}
    file = tmp_path / "teacher/generation_config.json"
    file.write_text(json.dumps({**settings, "eos_token_id": [2, 0]}))
    run = tmp_path / "run"
    words = [str(tmp_path / "teacher"), "--run", str(run), "--no-report"]
    done = CliRunner().invoke(app, ["seed", *words], catch_exceptions=False)
    assert "do_sample True, " in done.stderr and "temperature 0.6" in done.stderr
    assert "has no use for: cache_implementation" in done.stderr
    words = ["hybridize", "--attn-layers", "1", "--run", str(run)]
    CliRunner().invoke(app, words, catch_exceptions=False)
    words = ["export", "--run", str(run), "--format", "hub", "--out", str(tmp_path / "hub")]
    CliRunner().invoke(app, words, catch_exceptions=False)
    for folder in (run / "products/seed", run / "products/hybrid-1", tmp_path / "hub"):
        found = json.loads((folder / "generation_config.json").read_text())
        assert {key: found.get(key) for key in RECOMMENDED} == RECOMMENDED, folder
        assert found["suppress_tokens"] == [7] and "cache_implementation" not in found
        assert {0, 2} <= set(found["eos_token_id"])
        kept = mmmamba_cli.load(str(folder)).generation_config
        assert kept.do_sample and kept.temperature == 0.6


def test_internlm2_names(tmp_path: Path) -> None:
    """InternLM2's names and packed q, k, v, written from a Llama's weights."""
    theirs = write(tmp_path / "llama", "Llama", {"rms_norm_eps": 1e-5})
    state = {k: v.detach() for k, v in theirs.state_dict().items()}
    names = {
        "model.embed_tokens.weight": "model.tok_embeddings.weight",
        "lm_head.weight": "output.weight",
        "model.norm.weight": "model.norm.weight",
    }
    packed = {new: state[old].clone() for old, new in names.items()}
    parts = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(4):
        name = f"model.layers.{layer}"
        for old, new in parts.items():
            packed[f"{name}.{new}.weight"] = state[f"{name}.{old}.weight"].clone()
        q, k, v = (state[f"{name}.self_attn.{x}_proj.weight"].view(-1, 8, 32) for x in "qkv")
        rows = [torch.cat((q[2 * g : 2 * g + 2], k[g : g + 1], v[g : g + 1])) for g in range(2)]
        packed[f"{name}.attention.wqkv.weight"] = torch.cat(rows).reshape(-1, 32)
    folder = tmp_path / "internlm2"
    folder.mkdir()
    save_file(packed, folder / "model.safetensors")
    raw = {**SIZES, "model_type": "internlm2", "bias": False, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(raw))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = mmmamba_cli.load(folder)(ids).logits
        assert distance(logits, theirs(ids).logits) < 1e-5


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("Llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("Llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("Llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("Llama", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ("Llama", {"model_type": "mistral"}, "model_type is 'mistral'"),
        (
            "Qwen2",
            {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
            "window",
        ),
    ],
)
def test_unsupported_options_are_refused(
    kind: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, kind, {})
    raw = json.loads((tmp_path / "config.json").read_text())
    if "rope_scaling" in change:
        raw.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_missing_extra_and_misshaped_tensors(tmp_path: Path) -> None:
    write(tmp_path, "Llama", {})
    state = load_file(tmp_path / "model.safetensors")
    victim = "model.layers.1.self_attn.k_proj.weight"
    for broken, word in (
        ({n: t for n, t in state.items() if n != victim}, "missing"),
        ({**state, "model.layers.9.extra": torch.ones(2)}, r"model\.layers\.9\.extra"),
        ({**state, victim: torch.ones(2, 2)}, "k_proj"),
    ):
        save_file(broken, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=word):
            open_checkpoint(tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    write(folder, "Llama", {"tie_word_embeddings": True})
    write_tokenizer(folder)
    return folder


def test_seeded_hybridized_distilled_and_loaded(llama: Path, tmp_path: Path) -> None:
    """The whole pipeline for a language model; its product loads in transformers."""
    run = tmp_path / "run"

    def mmmamba(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    report = mmmamba("seed", llama, "--run", run, "--recipe", "smoke", "--dtype", "fp32")
    assert "4 layers seeded" in report
    data = tmp_path / "text.jsonl"
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    lines = [{"text": "the dog sat on the mat"}, {"messages": chat}, {"text": "and the cat too"}]
    data.write_text("\n".join(map(json.dumps, lines)))
    mmmamba("distill", "--run", run, "--data", data, "--held-out", data)
    assert "4 layers" not in mmmamba("status", "--run", run)
    product = Run(run).product_folder("hybrid-1-stage3")
    model = mmmamba_cli.load(product)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.text_embedding.weight
    loaded = transformers.AutoModelForCausalLM.from_pretrained(product).eval()
    processor = transformers.AutoProcessor.from_pretrained(product)
    assert isinstance(processor, HolisticTextProcessor)
    batch = processor.chat(["the cat", "the dog sat"])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        tokens = loaded.generate(**batch, max_new_tokens=4, do_sample=False)
    assert tokens.shape[0] == 2


def test_answers_of_a_conversation_are_marked(llama: Path) -> None:
    processor = open_processor(open_checkpoint(llama))
    assert isinstance(processor, HolisticTextProcessor)
    messages = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat on"},
        {"role": "user", "content": "the dog"},
        {"role": "assistant", "content": "too"},
    ]
    ids, is_answer = processor.conversation_ids(messages)
    assert ids == processor.chat(messages, add_generation_prompt=False)["input_ids"][0].tolist()
    said = [token for token, answer in zip(ids, is_answer, strict=True) if answer]
    assert processor.tokenizer.decode(said) == "sat on<|im_end|>too<|im_end|>"
    typed = [messages[0], {"role": "assistant", "content": "<|im_end|>"}]
    ids, is_answer = processor.conversation_ids(typed)
    said = [token for token, answer in zip(ids, is_answer, strict=True) if answer]
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    # Special-token characters in the text stay text; only the end of turn is a token.
    assert said.count(end) == 1
    assert processor.tokenizer.decode(said) == "<|im_end|><|im_end|>"
    with pytest.raises(DataError, match="reads text only"):
        processor.conversation_ids(messages, [1])
    assert processor.tokenizer.decode(processor.text_ids("the mat")) == "the mat"
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") in processor.stop_token_ids
