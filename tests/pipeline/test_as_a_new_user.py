"""Three commands from a bare state dict with config and tokenizer, and a question."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ended import Command
from isolated_process import ROOT, run_isolated
from PIL import Image
from small_checkpoint import CONFIG, write_hovle

from mmmamba_cli.checkpoint import hovle

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

ASK = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
import mmmamba_cli.model
folder, picture = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
batch = processor.chat(["<image>\\nWhat is this?", "Hello"], [[picture], []])
tokens = model.generate(**batch, max_new_tokens=5, do_sample=False)
assert tokens.shape[0] == 2
print(processor.batch_decode(tokens, skip_special_tokens=True)[1])
"""


def write_teacher(folder: Path, embedding_layers: int = 2, language_layers: int = 6) -> Path:
    """Write a random HoVLE with a matching tokenizer as a bare `hovle.ckpt`."""
    write_hovle(folder)
    embedding = {**CONFIG["embedding_config"], **SIZES, "num_hidden_layers": embedding_layers}
    embedding |= {"llm_vocab_size": 535, "model_type": "holistic_embedding"}
    language = {**CONFIG["llm_config"], **SIZES, "num_hidden_layers": language_layers}
    language["eos_token_id"] = 2
    raw = {**CONFIG, "embedding_config": embedding, "llm_config": language}
    (folder / "config.json").write_text(json.dumps(raw))
    rng = torch.Generator().manual_seed(0)
    state = {
        f"module.{name}": torch.randn(shape, generator=rng) / 6
        for mapping in hovle.name_map(raw, hovle.to_config(raw))
        for name, shape in mapping.foreign.items()
    }
    torch.save({"state_dict": state}, folder / "hovle.ckpt")
    return folder


def test_three_commands_and_a_question(
    tmp_path: Path, mmmamba: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_teacher(tmp_path / "work")
    monkeypatch.chdir(folder)
    seeded = subprocess.run(
        [sys.executable, "-m", "mmmamba_cli", "seed", "hovle.ckpt"], capture_output=True, text=True
    )
    outputs, errors = [seeded.stdout], [seeded.stderr]
    # In this process: the seed shows what the start of another one would.
    for words in (["hybridize", "--attn-layers", "4"], ["status"]):
        done = mmmamba(*words)
        assert done.code == 0, done
        outputs.append(done.out)
        errors.append(done.err)
    # Warnings of mmmamba only: libraries may warn about the machine.
    assert not [x for x in "".join(errors).splitlines() if x.startswith("warning:")], errors
    assert "8 layers seeded" in outputs[0]
    assert "attention in layers 0, 2, 4, 6 of 8" in outputs[1]
    assert "hybrid-4" in outputs[2]
    product = folder / "runs/default/products/hybrid-4"
    settings = json.loads((product / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [2, 524, 525]
    picture = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((90, 60)).save(picture)
    assert "Hello" in run_isolated(ASK, product, picture, package=ROOT)
