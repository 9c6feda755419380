"""GGUF files: model and tokenizer equal those of the source safetensors."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_language_models import distance, write, write_tokenizer
from typer.testing import CliRunner

import mmmamba_cli
from mmmamba_cli.checkpoint import gguf_file, open_checkpoint
from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.runs import open_processor

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k in llama.cpp's order: RoPE pairs are adjacent."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def llama_names(state: dict[str, torch.Tensor], heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """A Llama's tensors under llama.cpp's names."""
    renamed = {}
    for name, tensor in state.items():
        stem, suffix = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            layer, part = stem.removeprefix("model.layers.").split(".", 1)
            if part in heads:
                tensor = interleaved(tensor, heads[part])
            renamed[f"blk.{layer}.{PARTS[part]}.{suffix}"] = tensor
        else:
            renamed[f"{ENDS[stem]}.{suffix}"] = tensor
    return renamed


def write_gguf(
    file: Path,
    folder: Path,
    tensors: dict[str, torch.Tensor],
    extra: dict[str, Any] | None = None,
    adds_begin: bool = False,
) -> Path:
    """Write `tensors`, the config and tokenizer of `folder` and `extra` fields as a GGUF file."""
    raw = json.loads((folder / "config.json").read_text())
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    ids = {**vocabulary["model"]["vocab"]} | {
        token["content"]: token["id"] for token in vocabulary["added_tokens"]
    }
    special = {token["content"] for token in vocabulary["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    unused = [f"<unused{i}>" for i in range(raw["vocab_size"] - len(tokens))]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(raw["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(raw["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens + unused)
    writer.add_token_types([3 if token in special else 1 for token in tokens] + [5] * len(unused))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["model"]["merges"]])
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_bos_token_id(ids["<|im_start|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(adds_begin)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    for key, value in (extra or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"llama.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module", params=["tied", "untied"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write(folder, "Llama", {"tie_word_embeddings": request.param == "tied", "rms_norm_eps": 1e-5})
    write_tokenizer(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    source = open_checkpoint(folder).source
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
    return llama_names({name: source.read(name) for name in source.names}, heads)


def test_gguf_and_safetensors_agree(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", llama, tensors_of(llama))
    one, two = open_checkpoint(file), open_checkpoint(llama)
    assert one.shapes == two.shapes and one.source.kind == "gguf"
    assert all(torch.equal(one.read(name), two.read(name)) for name in two.shapes)
    assert one.source.content_hash() == two.source.content_hash()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        logits = mmmamba_cli.load(file)(ids).logits
        assert distance(logits, mmmamba_cli.load(llama)(ids).logits) < 1e-6
    ours, theirs = open_processor(one), open_processor(two)
    assert ours is not None and theirs is not None
    question = [{"role": "user", "content": "the cat sat on <|im_end|> 2024 图"}]
    assert ours.chat(question).input_ids.tolist() == theirs.chat(question).input_ids.tolist()
    assert ours.text_ids("the mat\n\n too") == theirs.text_ids("the mat\n\n too")
    assert ours.stop_token_ids == theirs.stop_token_ids


def test_what_lies_beside_the_file_is_not_read(llama: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", llama, tensors_of(llama))
    alone = open_checkpoint(tmp_path / "m.gguf")
    one = open_processor(alone)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        # The file's vocabulary is padded with unused tokens.
        shutil.copy(llama / name, tmp_path)
    for name in ("generation_config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{")
    beside = open_checkpoint(tmp_path / "m.gguf")
    assert beside.config.to_dict() == alone.config.to_dict()
    two = open_processor(beside)
    assert one is not None and two is not None
    assert one.tokenizer.get_vocab() == two.tokenizer.get_vocab()
    assert one.stop_token_ids == two.stop_token_ids == [2]
    assert (two.tokenizer.eos_token_id, two.pad_token_id) == (2, 0)


def test_a_begin_token_that_the_file_asks_for(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", llama, tensors_of(llama), adds_begin=True)
    processor = open_processor(open_checkpoint(file))
    assert processor is not None
    assert processor.text_ids("the cat")[:2] == [1, processor.tokenizer("the")["input_ids"][-1]]


def test_seeded_and_hybridized(llama: Path, tmp_path: Path) -> None:
    """hybridize reads and verifies the GGUF teacher again."""
    file = write_gguf(tmp_path / "m.gguf", llama, tensors_of(llama))
    run = tmp_path / "run"
    for words in (["seed", str(file), "--dtype", "fp32"], ["hybridize", "--attn-layers", "4"]):
        done = CliRunner().invoke(app, [*words, "--run", str(run)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    product = run / "products/hybrid-4"
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        logits = mmmamba_cli.load(product)(ids).logits
        assert distance(logits, mmmamba_cli.load(llama)(ids).logits) < 1e-6
    ours, theirs = open_processor(open_checkpoint(product)), open_processor(open_checkpoint(llama))
    assert ours is not None and theirs is not None
    assert ours.chat("the cat").input_ids.tolist() == theirs.chat("the cat").input_ids.tolist()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"expert_count": 8}, "expert_count is 8"),
        ({"attention.sliding_window": 64}, "attention.sliding_window is 64"),
        ({"attention.key_length": 16}, "attention.key_length is 16"),
    ],
)
def test_fields_that_transformers_leaves_out_are_refused(
    llama: Path, tmp_path: Path, extra: dict[str, Any], message: str
) -> None:
    file = write_gguf(tmp_path / "m.gguf", llama, tensors_of(llama), extra)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(file)


def test_tensors_that_are_missing_or_left_out_are_refused(llama: Path, tmp_path: Path) -> None:
    whole = tensors_of(llama)
    victim = "blk.1.attn_k.weight"
    for tensors, message in (
        ({n: t for n, t in whole.items() if n != victim}, "layers.1.self_attn.k_proj.weight"),
        ({**whole, "blk.1.attn_q.bias": torch.ones(32)}, f"holds {len(whole) + 1} tensors"),
        ({**whole, "rope_freqs.weight": torch.ones(4)}, "rope_freqs.weight"),
    ):
        file = write_gguf(tmp_path / "m.gguf", llama, tensors)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(file)


def test_files_that_are_no_gguf(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(file)
    file.write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match="does not begin with GGUF"):
        open_checkpoint(file)
    write_gguf(file, llama, tensors_of(llama))
    whole = file.read_bytes()
    for length in (8, 200, len(whole) // 2, len(whole) - 100):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
            open_checkpoint(file)
    file.write_bytes(whole)
    with pytest.raises(CheckpointError, match="carries its own config"):
        open_checkpoint(file, arch="hovle-2.6b")


def test_a_missing_package_is_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "m.gguf", llama, tensors_of(llama))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        gguf_file, "find_spec", lambda name: None if name == "accelerate" else find(name)
    )
    with pytest.raises(CheckpointError, match=r"accelerate.*pip install 'mmmamba\[gguf\]'"):
        open_checkpoint(file)
