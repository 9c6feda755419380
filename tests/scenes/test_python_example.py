"""Shipped models from Python by name: a question and its answer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

import mmmamba_cli
from mmmamba_cli.checkpoint import shipped_models
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.processing import HolisticVLMProcessor


def test_a_question_by_name(tmp_path: Path) -> None:
    model = mmmamba_cli.load("scenes-linear", dtype="fp32")
    processor = mmmamba_cli.load_processor("scenes-linear")
    assert model.name_or_path == "scenes-linear"
    inputs = processor.chat("What is shown?", images=[Image.new("RGB", (90, 60), "red")])
    tokens = model.generate(**inputs, max_new_tokens=3)
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(answer, skip_special_tokens=True).strip()
    # The path it was loaded from is not saved.
    model.config.save_pretrained(tmp_path)
    assert "scenes-linear" not in (tmp_path / "config.json").read_text()


def test_a_processor_by_its_folder(tmp_path: Path) -> None:
    """Processors of a product and of a teacher; an error message without a tokenizer."""
    for name in ("scenes-hybrid", "scenes-teacher"):
        folder = shutil.copytree(shipped_models()[name], tmp_path / name)
        found = mmmamba_cli.load_processor(str(folder))
        assert isinstance(found, HolisticVLMProcessor)
        expected = mmmamba_cli.load_processor(name).chat("What is shown?").input_ids
        assert found.chat("What is shown?").input_ids.tolist() == expected.tolist()
        (folder / "tokenizer.model").unlink()
        with pytest.raises(CheckpointError, match=f"{name} has no tokenizer"):
            mmmamba_cli.load_processor(str(folder))
    with pytest.raises(CheckpointError, match="nowhere"):
        mmmamba_cli.load_processor(str(tmp_path / "nowhere"))
