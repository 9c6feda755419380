"""Counting ids word by word gives the number of ids of the whole text."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_tokenizer import TEXT
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from small_checkpoint import SMALL_MODEL

from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import HolisticVLMTokenizer, word_lengths
from mmmamba_cli.processing.tokenizer import load_sentencepiece
from mmmamba_cli.processing.word_lengths import WordLengths

WORDS = (
    *(
        "the",
        "picture,",
        "图中显示了什么？",
        "Please",
        "\n\t",
        "[UNUSED_TOKEN_1]",
        "<ref>",
        "▁",
        "é",
    ),
    *("", "", "a\u00a0b"),
)
spaced_text = st.lists(st.sampled_from(WORDS) | st.text(max_size=4)).map(" ".join)
# From which pieces of several spaces are learned.
SPACED = ("a    b", "if x:", "    return  y", "        pass") * 3
IDENTITY: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
}
# How a model is trained, and whether its words are encoded independently.
MODELS: dict[str, tuple[dict[str, Any], bool]] = {
    "InternLM2's way": (IDENTITY, True),
    "unigram": ({**IDENTITY, "model_type": "unigram"}, True),
    "normalised": ({"normalization_rule_name": "nfkc"}, False),
    "spaces removed": ({**IDENTITY, "remove_extra_whitespaces": True}, False),
    "pieces of several words": ({**IDENTITY, "split_by_whitespace": False}, False),
    "no dummy prefix": ({**IDENTITY, "add_dummy_prefix": False}, False),
    "spaces behind words": ({**IDENTITY, "treat_whitespace_as_suffix": True}, False),
}


def train(options: dict[str, Any]) -> SentencePieceProcessor:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXT, *SPACED]),
        model_writer=model,
        **{"model_type": "bpe", "vocab_size": 440, "byte_fallback": True, **options},
        minloglevel=2,
    )
    return load_sentencepiece(model.getvalue(), "test")


@pytest.fixture(scope="module")
def tokenizer() -> HolisticVLMTokenizer:
    return HolisticVLMTokenizer(str(SMALL_MODEL))


@given(spaced_text)
def test_numbers_of_ids(tokenizer: HolisticVLMTokenizer, text: str) -> None:
    assert tokenizer._word_lengths._is_additive
    assert tokenizer.count_plain(text) == len(tokenizer.encode_plain(text))


@pytest.mark.parametrize("name", MODELS)
def test_models_whose_words_depend_on_one_another(name: str) -> None:
    options, is_additive = MODELS[name]
    model = train(options)
    lengths = WordLengths(model, model.encode)
    assert lengths._is_additive == is_additive
    texts = (
        *TEXT,
        "",
        " ",
        "a",
        " the  two   cars ",
        "  the cars",
        "the\ncars ﬁne a",
        "x▁the a",
        "x▁ a",
        "▁ ▁ ▁ a",
    )
    for text in texts * 2:
        assert lengths.count(text) == len(model.encode(text)), text


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_lengths, "MAX_CACHED_WORDS", 3)
    model = SentencePieceProcessor(model_file=str(SMALL_MODEL))
    lengths = WordLengths(model, model.encode)
    for text in TEXT:
        assert lengths.count(text) == len(model.encode(text))
        assert len(lengths._lengths) <= 3


def test_special_tokens_and_surrogates(tokenizer: HolisticVLMTokenizer) -> None:
    token = tokenizer.eos_token
    text = f"a {token} b {token}"
    for keep in ((), (token,)):
        assert tokenizer.count_plain(text, keep) == len(tokenizer.encode_plain(text, keep))
    with pytest.raises(DataError, match="at character 2"):
        tokenizer.count_plain("a \ud800 b")
