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


@pytest.fixture
def written(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers logs, whose logger has a handler of its own."""
    root = logging.getLogger("transformers")
    root.addHandler(caplog.handler)
    yield caplog
    root.removeHandler(caplog.handler)


def test_warnings_and_bars_are_off_inside_only(written: pytest.LogCaptureFixture) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with pytest.raises(ValueError, match="failed"), quiet_loading():
        LOGGER.warning("inside")
        assert not transformers_logging.is_progress_bar_enabled()
        raise ValueError("failed")
    LOGGER.warning("after")
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert after == before
    assert written.messages == ["after"]


def test_a_processor_is_opened_quietly(
    written: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(folder: Path, trust_remote_code: bool) -> NoReturn:
        LOGGER.warning("You are using a model of type `mmmamba_qwen3_vl`")
        raise ValueError("no such file")

    monkeypatch.setattr(teacher_processor_loader.AutoProcessor, "from_pretrained", load)
    with pytest.raises(CheckpointError, match="no such file"):
        open_teacher_processor(Path("teacher"))
    assert not written.messages
