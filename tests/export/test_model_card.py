"""The sentence of a model card on the layers."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import small_model

from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.export import export_checkpoint


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ("ammm", "A hybrid: attention in layer 0 of 4, Mamba-2 in the others."),
        ("aamk", "A hybrid: attention in layers 0, 1 of 4, Mamba-2 and Kimi delta attention in"),
        ("aaaa", "A model with attention in all 4 layers."),
        ("kdmd", "model: Gated DeltaNet, Kimi delta attention and Mamba-2 in all 4 layers."),
    ],
)
def test_layers_are_described(tmp_path: Path, plan: str, sentence: str) -> None:
    small_model(plan).save_pretrained(tmp_path / "in")
    found = export_checkpoint(open_checkpoint(tmp_path / "in"), "hub", tmp_path / "out")
    assert sentence in (found.folder / "README.md").read_text()
