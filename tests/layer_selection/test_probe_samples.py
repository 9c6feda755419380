"""Samples for scores: halves of the data are alike."""

from __future__ import annotations

from pathlib import Path

from conversations import write_conversations
from small_checkpoint import write_hovle

from mmmamba_cli.layer_selection.probe_samples import build_loader
from mmmamba_cli.processing import processor_from_folder
from mmmamba_cli.recipe import Data


def test_long_samples_are_in_both_halves(tmp_path: Path) -> None:
    """Sorted by length, a batch would have its longest sample in the even half every time."""
    write_conversations(tmp_path, 24)
    processor = processor_from_folder(write_hovle(tmp_path / "hovle"))
    loader = build_loader(
        str(tmp_path / "train.jsonl"),
        Data(image_root=str(tmp_path)),
        processor,
        stream="held out",
        batch_size=2,
        max_length=400,
        seed=0,
        single_pass=True,
    )
    longer = []
    for step in loader.steps(0, 12):
        (batch,) = step.micro_batches
        mask = batch.attention_mask
        if mask is not None:
            longer.append(int(mask.sum(1).argmax()))
    assert len(longer) >= 8
    assert 0 < sum(longer) < len(longer)
