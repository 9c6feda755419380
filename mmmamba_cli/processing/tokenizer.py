"""Tokenizer of InternLM2 models: SentencePiece with special tokens.

A text is split at special tokens, and each piece between them is encoded separately. If the
SentencePiece model adds a dummy prefix, each piece has one; decoding removes it piece by piece, so
that `decode(encode(text))` is `text`.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, PreTrainedTokenizer

from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.processing.word_lengths import WordLengths

VOCABULARY_FILE = "tokenizer.model"

# Text of an id without a token; only an untrained model generates one.
REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class HolisticVLMTokenizer(PreTrainedTokenizer):
    """SentencePiece with special tokens.

    `tokenizer(text)` parses special tokens in the text and prepends the begin token, unless
    `add_special_tokens=False`; `encode_plain` encodes them as ordinary text. Batches are padded on
    the left.

    Raises:
        CheckpointError: `vocab_file` is not a SentencePiece model.
        DataError: text that is not valid Unicode.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": VOCABULARY_FILE}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    padding_side = "left"

    # `kwargs` holds the settings that transformers saves with a tokenizer.
    def __init__(
        self,
        vocab_file: str,
        unk_token: str | AddedToken = "<unk>",  # noqa: S107
        bos_token: str | AddedToken = "<s>",  # noqa: S107
        eos_token: str | AddedToken = "</s>",  # noqa: S107
        pad_token: str | AddedToken = "</s>",  # noqa: S107
        added_tokens_decoder: dict[int, AddedToken] | None = None,
        **kwargs: Any,
    ):
        self._model_bytes = read_vocabulary(Path(vocab_file))
        self.sp_model = load_sentencepiece(self._model_bytes, vocab_file)
        added = dict(added_tokens_decoder or {})
        _check_added(added)
        named = {str(token) for token in (unk_token, bos_token, eos_token, pad_token)}
        # `skip_special_tokens` skips the tokens listed here.
        kwargs["extra_special_tokens"] = [
            token for _, token in sorted(added.items()) if token.special and str(token) not in named
        ]
        super().__init__(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            added_tokens_decoder=added,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """Number of SentencePiece pieces; `len(tokenizer)` also counts special tokens."""
        return self.sp_model.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Token to id. A special token may replace an unused piece."""
        taken = self._added_tokens_decoder
        pieces = (index for index in range(self.vocab_size) if index not in taken)
        vocab = {self.sp_model.id_to_piece(index): index for index in pieces}
        return {**vocab, **self._added_tokens_encoder}

    def encode_plain(self, text: str, keep: tuple[str, ...] = ()) -> list[int]:
        """Encode `text` without a begin token; special tokens are text, except those in `keep`."""
        if not any(token in text for token in keep):
            return self._encode_piece(text)
        ids = []
        for index, piece in enumerate(re.split(f"({'|'.join(map(re.escape, keep))})", text)):
            # `re.split` with a group alternates text and separators.
            if index % 2:
                ids.append(self._added_tokens_encoder[piece])
            else:
                ids.extend(self._encode_piece(piece))
        return ids

    def count_plain(self, text: str, keep: tuple[str, ...] = ()) -> int:
        """Number of ids of `encode_plain`, which is faster for many texts. Raises its errors."""
        check_unicode(text)
        if any(token in text for token in keep):
            return len(self.encode_plain(text, keep))
        return self._word_lengths.count(text)

    @cached_property
    def _word_lengths(self) -> WordLengths:
        return WordLengths(self.sp_model, self._encode_piece)

    def _encode_piece(self, text: str) -> list[int]:
        check_unicode(text)
        ids = self.sp_model.encode(text)
        if self._replaced_pieces.isdisjoint(ids):
            return ids
        spelled = ((self._spell(i) if i in self._replaced_pieces else [i]) for i in ids)
        return [index for letters in spelled for index in letters]

    @cached_property
    def _replaced_pieces(self) -> frozenset[int]:
        """SentencePiece pieces whose ids special tokens use.

        In InternLM2 they are texts like `[UNUSED_TOKEN_145]`, which must not encode to the token.
        """
        added = (index for index in self._added_tokens_decoder if index < self.vocab_size)
        return frozenset(index for index in added if index != self.sp_model.unk_id())

    def _spell(self, index: int) -> list[int]:
        """Ids of the characters of a piece; of the bytes of a character that is no piece."""
        found: list[int] = []
        for letter in self.sp_model.id_to_piece(index):
            piece = self.sp_model.piece_to_id(letter)
            if piece != self.sp_model.unk_id():
                found.append(piece)
                continue
            found += [self.sp_model.piece_to_id(f"<0x{byte:02X}>") for byte in letter.encode()]
        return found

    def _tokenize(self, text: str) -> list[str]:
        return [self.sp_model.id_to_piece(index) for index in self._encode_piece(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return (
            self.sp_model.id_to_piece(index)
            if 0 <= index < self.vocab_size
            else REPLACEMENT_CHARACTER
        )

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Prepend the begin token; a second sequence follows without a separator."""
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 at special tokens, 0 at text, for ids with the begin token."""
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(index in special) for index in token_ids_0]
        return [1] + [0] * (len(token_ids_0) + len(token_ids_1 or []))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of SentencePiece pieces and special tokens."""
        return self._decode(self.convert_tokens_to_ids(tokens))

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
    ) -> str:
        """Decode ids. On a growing list, complete characters do not change.

        Bytes of an incomplete character become U+FFFD. Spaces are not cleaned up.
        """
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        text, run = [], []
        for index in ids:
            added = self._added_tokens_decoder.get(index)
            if added is None and 0 <= index < self.vocab_size:
                run.append(index)
                continue
            text.append(self.sp_model.decode(run))
            run = []
            if index not in skipped:
                text.append(REPLACEMENT_CHARACTER if added is None else added.content)
        text.append(self.sp_model.decode(run))
        return (" " if spaces_between_special_tokens else "").join(filter(None, text))

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write the bytes of the SentencePiece model as read."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        file = Path(save_directory, prefix + VOCABULARY_FILE)
        file.write_bytes(self._model_bytes)
        return (str(file),)


def check_unicode(text: str) -> None:
    """Raise `DataError` for a lone surrogate, which cannot be encoded as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}, which is not valid Unicode"
        ) from error


def read_vocabulary(file: Path) -> bytes:
    """Read the bytes of a `tokenizer.model`; `CheckpointError` if that fails."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"tokenizer {file} cannot be read: {error.strerror}") from error


def load_sentencepiece(model: bytes, file: str | Path) -> SentencePieceProcessor:
    """Load a SentencePiece model from its bytes; `CheckpointError` names `file`."""
    processor = SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except RuntimeError as error:
        raise CheckpointError(
            f"tokenizer {file} is not a SentencePiece model",
            f"a HoVLE folder has it as {VOCABULARY_FILE}",
        ) from error
    return processor


def _check_added(added: dict[int, AddedToken]) -> None:
    """Refuse flags by which ids would depend on the neighbours of a special token."""
    for index, token in added.items():
        if token.lstrip or token.rstrip or token.single_word:
            raise CheckpointError(
                f"special token {token.content} ({index}) is marked lstrip, rstrip or single_word, "
                "which is not supported",
            )
