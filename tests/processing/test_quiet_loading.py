"""Loading without transformers' own lines on stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from transformers.utils import logging as transformers_logging

from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.processing import open_teacher_processor, teacher_processor_loader
from mmmamba_cli.processing.quiet_loading import quiet_loading

LOGGER = transformers_logging.get_logger("transformers.configuration_utils")


class Records(logging.Handler):
    """The messages of a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def written() -> Iterator[list[str]]:
    """What transformers logs.

    Its logger passes records on to the root logger, and so to `caplog`, only where the environment
    variable CI is set.
    """
    records = Records()
    logger = logging.getLogger("transformers")
    logger.addHandler(records)
    yield records.messages
    logger.removeHandler(records)


def test_warnings_and_bars_are_off_inside_only(written: list[str]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with pytest.raises(ValueError, match="failed"), quiet_loading():
        LOGGER.warning("inside")
        assert not transformers_logging.is_progress_bar_enabled()
        raise ValueError("failed")
    LOGGER.warning("after")
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert after == before
    assert written == ["after"]


def test_a_processor_is_opened_quietly(written: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(folder: Path, trust_remote_code: bool) -> NoReturn:
        LOGGER.warning("You are using a model of type `mmmamba_qwen3_vl`")
        raise ValueError("no such file")

    monkeypatch.setattr(teacher_processor_loader.AutoProcessor, "from_pretrained", load)
    with pytest.raises(CheckpointError, match="no such file"):
        open_teacher_processor(Path("teacher"))
    assert not written
