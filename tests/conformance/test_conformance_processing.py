"""transformers' common processor and tokenizer tests against those of a shipped model."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.test_processing_common import ProcessorTesterMixin
from tests.test_sentencepiece_backend_mixin import SentencePieceBackendTesterMixin
from tests.test_tokenization_common import TokenizerTesterMixin

import mmmamba_cli.model  # noqa: F401 - registers the processor with transformers
import mmmamba_evals
from mmmamba_cli.processing import HolisticVLMProcessor, HolisticVLMTokenizer

FOLDER = str(Path(mmmamba_evals.__file__).parent / "scenes" / "models" / "hybrid")
SETTINGS = (
    "image_size",
    "patch_size",
    "downsample_ratio",
    "min_tiles",
    "max_tiles",
    "use_thumbnail",
    "template",
)


@pytest.fixture(autouse=True, scope="module")
def _at_the_upstream_tests() -> Iterator[None]:
    """Run in the folder that holds `tests`, since the mixins use relative paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(os.environ["MMMAMBA_UPSTREAM_TESTS"])
        yield


class Processor(ProcessorTesterMixin, unittest.TestCase):
    processor_class = HolisticVLMProcessor
    model_id = FOLDER

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        """Arguments of a processor beside its tokenizer."""
        saved = json.loads(Path(FOLDER, "processor_config.json").read_text())
        return {name: saved[name] for name in SETTINGS}


class Tokenizer(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = HolisticVLMTokenizer
    from_pretrained_id = FOLDER
    test_tokenizer_from_extractor = False

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        shutil.copy(Path(FOLDER, "config.json"), cls.tmpdirname)


class SentencePiece(SentencePieceBackendTesterMixin, unittest.TestCase):
    tokenizer_class = HolisticVLMTokenizer
    from_pretrained_id = FOLDER
    from_pretrained_kwargs = None

    @classmethod
    def setUpClass(cls) -> None:
        cls.tmpdirname = tempfile.mkdtemp()


# Removed, so that pytest does not collect the mixins.
del ProcessorTesterMixin, TokenizerTesterMixin, SentencePieceBackendTesterMixin
