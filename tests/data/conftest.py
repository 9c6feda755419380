"""A processor, and a folder of conversations with pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from conversations import write_conversations
from small_checkpoint import write_hovle

from mmmamba_cli.processing import HolisticVLMProcessor, processor_from_folder


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> HolisticVLMProcessor:
    return processor_from_folder(write_hovle(tmp_path_factory.mktemp("hovle")))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.jsonl` of 23 samples, every other with a picture of one or several tiles."""
    folder = tmp_path_factory.mktemp("data")
    write_conversations(folder, 23)
    return folder
