"""Token embeddings: replacing, resizing, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_model
from torch import nn
from transformers import AutoModelForCausalLM

import mmmamba_cli
from mmmamba_cli.model import HolisticVLM

IDS = torch.arange(2, 22)[None]


def tied_model() -> Any:
    config = small_model().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return HolisticVLM(config).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [101, 91])
@torch.no_grad()
def test_resized_tables_survive_saving(tmp_path: Path, tied: bool, size: int) -> None:
    model = tied_model() if tied else small_model()
    before = model(IDS).logits
    table = model.resize_token_embeddings(size)
    assert table is model.model.text_embedding is model.get_input_embeddings()
    assert model.config.vocab_size == size == model.get_output_embeddings().weight.shape[0]
    assert (model.lm_head.weight is table.weight) == tied
    logits, kept = model(IDS).logits, min(size, 96)
    assert torch.allclose(logits[..., :kept], before[..., :kept], atol=1e-6)
    if size > 96:
        assert model(torch.full((1, 3), size - 1)).logits.isfinite().all()
    model.save_pretrained(tmp_path)
    for again in (
        HolisticVLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
        mmmamba_cli.load(str(tmp_path)),
    ):
        assert again.config.vocab_size == size
        assert torch.equal(again(IDS).logits, logits)
        assert (again.lm_head.weight is again.model.text_embedding.weight) == tied


def test_tables_can_be_set() -> None:
    model = small_model()
    table, head = nn.Embedding(96, 32), nn.Linear(32, 96, bias=False)
    model.set_input_embeddings(table)
    model.set_output_embeddings(head)
    assert model.model.get_input_embeddings() is model.get_input_embeddings() is table
    assert model.get_output_embeddings() is model.lm_head is head
    model.model.set_input_embeddings(nn.Embedding(96, 32))
    assert model.get_input_embeddings() is not table
