"""Llama, Qwen2, Qwen3 and InternLM2 as teachers, against transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import mmmamba_cli
from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.checkpoint.rules import foreign_tensors
from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.processing import HolisticTextProcessor
from mmmamba_cli.runs import Run, open_processor

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
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
    "llama 3 positions": ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(folder: Path, kind: str, options: dict[str, Any]) -> Any:
    """A random model of transformers' own, saved with its config; returned as it is."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat too"] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


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
def test_the_table_gives_every_tensor_back(case: str, tmp_path: Path) -> None:
    write(tmp_path, *CASES[case])
    checkpoint = open_checkpoint(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    written = dict(foreign_tensors(checkpoint.rules, checkpoint.read))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_internlm2_is_a_hovles_language_model_alone(tmp_path: Path) -> None:
    """Its names and its packed q, k and v, written from a Llama's weights."""
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
def test_what_would_change_the_computation_is_refused(
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
    """The whole path for a language model, and what a product of it is in transformers."""
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
    with pytest.raises(DataError, match="special token"):
        processor.conversation_ids([messages[0], {"role": "assistant", "content": "<|im_end|>"}])
    with pytest.raises(DataError, match="reads text only"):
        processor.conversation_ids(messages, [1])
    assert processor.tokenizer.decode(processor.text_ids("the mat")) == "the mat"
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") in processor.stop_token_ids
