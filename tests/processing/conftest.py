"""Fixtures of the processing tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2
from small_checkpoint import SMALL_MODEL, write_hovle

from mmmamba_cli.processing import HolisticVLMProcessor, HolisticVLMTokenizer, processor_from_folder


@pytest.fixture(scope="session")
def no_prefix_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model without the dummy prefix."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(SMALL_MODEL.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    file = tmp_path_factory.mktemp("no_prefix") / "tokenizer.model"
    file.write_bytes(proto.SerializeToString())
    return file


@pytest.fixture(scope="session", params=["prefix", "no_prefix"])
def model_file(request: pytest.FixtureRequest, no_prefix_model: Path) -> Path:
    """SentencePiece models with and without a dummy prefix."""
    return SMALL_MODEL if request.param == "prefix" else no_prefix_model


@pytest.fixture(scope="session")
def hovle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hovle(tmp_path_factory.mktemp("hovle"))


@pytest.fixture(scope="session")
def processor(hovle: Path) -> HolisticVLMProcessor:
    return processor_from_folder(hovle)


@pytest.fixture(scope="session")
def tokenizer_of(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Path], HolisticVLMTokenizer]:
    """The tokenizer of a HoVLE folder with the given SentencePiece model."""

    def build(model: Path) -> HolisticVLMTokenizer:
        folder = write_hovle(tmp_path_factory.mktemp("tokenizer"), model)
        return processor_from_folder(folder).tokenizer

    return build
