"""Tokenizer: ids equal SentencePiece's around special tokens; decoding restores the text."""

import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_checkpoint import NAMED, PIECES, SMALL_MODEL, SPECIAL, oracle_ids
from transformers import AddedToken, TextStreamer

from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.processing import HolisticVLMProcessor, HolisticVLMTokenizer, TextStream

TEXTS = [
    "",
    " ",
    "  two leading spaces",
    "trailing ",
    "\n",
    "\n\n  \t\r\n",
    "What is shown in the picture?",
    "图片中有一辆红色的汽车。",
    "mixed 中文 and English, １２３",
    "🐼 👩‍👩‍👧 🏽 é é ﷺ ﬁ",
    "a\x00b\x7f",
    "def f(x):\n    return x  # tab\there",
    "<0x0A> <unused> <|im_start> < img>",
    "<|im_start|>user\nHello<|im_end|><|im_start|>assistant\n",
    " <|im_end|> spaces around <|im_end|> ",
    "<img><IMG_CONTEXT><IMG_CONTEXT></img>\n",
    "<<img>>",
    "<s>a</s><unk>",
    "<ref>the dog</ref><box>[[0, 0, 10, 10]]</box>",
    "<|im_start|><|im_start|>",
    "x" * 3000,
]

plain_text = st.text().filter(lambda text: "▁" not in text)
marked_text = st.lists(plain_text | st.sampled_from([*SPECIAL, *NAMED])).map("".join)


@pytest.fixture(scope="session")
def tokenizer(
    model_file: Path, tokenizer_of: Callable[[Path], HolisticVLMTokenizer]
) -> HolisticVLMTokenizer:
    return tokenizer_of(model_file)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_sentencepiece_ids(
    text: str, tokenizer: HolisticVLMTokenizer, model_file: Path
) -> None:
    expected = oracle_ids(text, model_file)
    assert tokenizer(text, add_special_tokens=False).input_ids == expected
    assert tokenizer(text).input_ids == [1, *expected]
    assert tokenizer.encode(text) == [1, *expected]
    assert tokenizer.decode(expected) == text


@pytest.mark.parametrize("text", TEXTS)
def test_plain_ids_equal_sentencepiece_ids_even_of_special_tokens(
    text: str, tokenizer: HolisticVLMTokenizer, model_file: Path
) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    assert tokenizer.encode_plain(text) == model.encode(text)


@given(marked_text)
def test_round_trip(tokenizer: HolisticVLMTokenizer, model_file: Path, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == oracle_ids(text, model_file)
    assert tokenizer.decode(ids) == text


@given(st.lists(st.integers(0, PIECES + len(SPECIAL) - 1), max_size=12))
def test_decoding_a_growing_list_never_changes_complete_characters(
    tokenizer: HolisticVLMTokenizer, ids: list[int]
) -> None:
    texts = [tokenizer.decode(ids[:length]) for length in range(len(ids) + 1)]
    for shorter, longer in pairwise(texts):
        assert longer.startswith(shorter.rstrip("\N{REPLACEMENT CHARACTER}"))


def stream(tokenizer: HolisticVLMTokenizer, ids: list[int]) -> list[str]:
    chunks: list[str] = []
    streamer = TextStream(tokenizer, chunks.append, skip_special_tokens=False)
    streamer.put(torch.tensor([[1, 525]]))
    for index in ids:
        streamer.put(torch.tensor([index]))
    streamer.end()
    return chunks


@pytest.mark.parametrize("text", [*TEXTS[:-1], "Hello  world 🐼 and\n 图片中有🐼一辆 汽车。\n x"])
def test_streaming_equals_decoding(text: str, tokenizer: HolisticVLMTokenizer) -> None:
    chunks = stream(tokenizer, tokenizer(text, add_special_tokens=False).input_ids)
    assert "".join(chunks) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in chunk for chunk in chunks)


def test_streaming_is_immediate_and_flushes_at_the_end(
    tokenizer: HolisticVLMTokenizer,
) -> None:
    ids = tokenizer.encode_plain("a🐼b🐼")
    chunks = stream(tokenizer, ids[:-1])
    assert (chunks[0], chunks[1], chunks[2][0]) == ("a", "🐼", "b")
    assert "".join(chunks) == tokenizer.decode(ids[:-1])


def test_a_stream_skips_the_prompt_and_is_reusable(
    tokenizer: HolisticVLMTokenizer,
) -> None:
    chunks: list[str] = []
    streamer = TextStream(tokenizer, chunks.append)
    for _ in range(2):
        streamer.put(torch.tensor([tokenizer("what?").input_ids]))
        streamer.put(torch.tensor(tokenizer.encode_plain("hi there")))
        streamer.end()
    assert chunks == ["hi there", "hi there"]
    streamer = TextStream(tokenizer, chunks.append, skip_prompt=False)
    streamer.put(torch.tensor([tokenizer("what?").input_ids]))
    assert chunks[-1] == "what?"


def test_transformers_streamer(
    tokenizer: HolisticVLMTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Hello  world 🐼 and\n图片中有🐼一辆 汽车。 x"
    streamer = TextStreamer(tokenizer)
    for index in tokenizer(text, add_special_tokens=False).input_ids:
        streamer.put(torch.tensor([index]))
    streamer.end()
    assert capsys.readouterr().out == f"{text}\n"


def test_unfinished_characters_are_replacement_characters(tokenizer: HolisticVLMTokenizer) -> None:
    ids = tokenizer.encode_plain("a🐼")
    assert tokenizer.decode(ids[:-1]).startswith("a\N{REPLACEMENT CHARACTER}")
    assert tokenizer.decode(ids) == "a🐼"


def test_kept_tokens_of_plain_text(tokenizer: HolisticVLMTokenizer, model_file: Path) -> None:
    text = "see <ref>the <|im_end|> dog</ref>"
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    assert tokenizer.encode_plain(text, keep=("<ref>", "</ref>")) == [
        *model.encode("see "),
        SPECIAL["<ref>"],
        *model.encode("the <|im_end|> dog"),
        SPECIAL["</ref>"],
    ]


def test_special_tokens_can_be_skipped_and_spaced(tokenizer: HolisticVLMTokenizer) -> None:
    ids = tokenizer("<|im_start|>user<|im_end|></s> ok<box>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user ok"
    assert tokenizer.decode([520, 521], spaces_between_special_tokens=True) == (
        "<|plugin|> <|interpreter|>"
    )
    assert tokenizer.batch_decode([ids, [525]], skip_special_tokens=True) == ["user ok", ""]
    assert tokenizer.decode(525) == "<|im_start|>"
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize("a <img> 你🐼")) == "a <img> 你🐼"


def test_ids_without_a_token_decode_visibly(tokenizer: HolisticVLMTokenizer) -> None:
    assert tokenizer.decode([259, 5000, 525]).endswith("a\N{REPLACEMENT CHARACTER}<|im_start|>")


def test_numbers_and_masks(tokenizer: HolisticVLMTokenizer) -> None:
    assert (tokenizer.vocab_size, len(tokenizer)) == (520, 535)
    assert sorted(tokenizer.get_vocab().values()) == list(range(535))
    assert tokenizer("a", "b").input_ids == [1, *oracle(tokenizer, "a"), *oracle(tokenizer, "b")]
    ids = tokenizer("ab", return_special_tokens_mask=True)
    assert ids.special_tokens_mask == [1] + [0] * (len(ids.input_ids) - 1)
    done = tokenizer.get_special_tokens_mask([1, 400, 528], already_has_special_tokens=True)
    assert done == [1, 0, 1]


def oracle(tokenizer: HolisticVLMTokenizer, text: str) -> list[int]:
    return tokenizer.sp_model.encode(text)


def test_batches_are_padded_on_the_left(tokenizer: HolisticVLMTokenizer) -> None:
    short, long = tokenizer("a").input_ids, tokenizer("a long text").input_ids
    batch = tokenizer(["a", "a long text"], padding=True, return_tensors="pt")
    fill = len(long) - len(short)
    assert batch.input_ids.tolist() == [[2] * fill + short, long]
    assert batch.attention_mask.tolist() == [[0] * fill + [1] * len(short), [1] * len(long)]


def test_a_special_token_may_replace_a_piece(hovle: Path) -> None:
    """As the first six of InternLM2."""
    token = AddedToken("<|im_end|>", special=True, normalized=False)
    tokenizer = HolisticVLMTokenizer(str(SMALL_MODEL), added_tokens_decoder={519: token})
    assert len(tokenizer) == 520
    assert tokenizer("<|im_end|>", add_special_tokens=False).input_ids == [519]
    assert tokenizer.convert_ids_to_tokens(519) == tokenizer.decode([519]) == "<|im_end|>"


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_tokens_with_stripping_flags_are_refused(flag: str) -> None:
    token = AddedToken("<img>", **{flag: True})
    with pytest.raises(CheckpointError, match=r"<img> \(520\) is marked"):
        HolisticVLMTokenizer(str(SMALL_MODEL), added_tokens_decoder={520: token})


def test_saving_keeps_the_model_byte_for_byte(
    tokenizer: HolisticVLMTokenizer, model_file: Path, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == model_file.read_bytes()
    again = HolisticVLMTokenizer.from_pretrained(tmp_path)
    for one in (again, pickle.loads(pickle.dumps(tokenizer))):
        assert one.get_vocab() == tokenizer.get_vocab()
        assert one.all_special_ids == tokenizer.all_special_ids
        for text in TEXTS:
            assert one(text).input_ids == tokenizer(text).input_ids


def test_lone_surrogates(processor: HolisticVLMProcessor) -> None:
    with pytest.raises(DataError, match=r"lone surrogate \(U\+D83D\) at character 2"):
        processor.tokenizer("ab\ud83d")
    with pytest.raises(DataError, match="lone surrogate"):
        processor.chat("ab\ud83d")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.example/spec/v1\n"])
def test_files_that_are_not_a_sentencepiece_model(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"tokenizer {file} is not a SentencePiece model"):
        HolisticVLMTokenizer(str(file))
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        HolisticVLMTokenizer(str(tmp_path / "other.model"))
