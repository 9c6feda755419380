"""Control tokens of a plain language model, and texts in which their characters are only text.

A chat template makes one string of a conversation, so that the token `<|im_start|>` and the ten
characters that a message may contain look the same in it. Here the typed ones are replaced by marks
before the template is applied, and become text again where ids are made of the result.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase

from mmmamba_cli.errors import DataError
from mmmamba_cli.processing.tokenizer import HolisticVLMTokenizer


class ControlTokens:
    """The special tokens of a tokenizer.

    Added tokens that the tokenizer does not mark as special, such as `<think>` in many families,
    are part of the model's language and keep their meaning.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.by_id = {index: str(token) for index, token in added.items() if token.special}
        self._ids = {token: index for index, token in self.by_id.items() if token}
        # Drawn at random, so that a message cannot contain a mark.
        self._nonce = secrets.token_hex(8)
        longest_first = sorted(self._ids, key=len, reverse=True)
        # An empty alternative would match everywhere.
        self._token = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._mark = re.compile(f"\ufdd0{self._nonce}:(\\d+)\ufdd1")

    def escape(self, text: str) -> str:
        """The text of a message, its control tokens replaced by marks."""
        return self._token.sub(lambda found: self._placeholder("\ufdd0", found[0]), text)

    def has_tokens(self, text: str) -> bool:
        """Whether control tokens stand in a text."""
        return self._token.search(text) is not None

    def unescape(self, text: str) -> str:
        """The text with the typed characters in place of marks."""
        return self._mark.sub(lambda found: self.by_id[int(found[1])], text)

    def encode(self, rendered: str) -> list[int]:
        """Ids of a rendered conversation: marks as text, control tokens as tokens.

        Nothing is put around it. Raises `DataError` if the tokenizer has a typed token as an
        ordinary piece of its vocabulary, so that it cannot be written as text.
        """
        if self._mark.search(rendered) is None:
            return list(self._tokenizer(rendered, add_special_tokens=False).input_ids)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        ids = self._encode_pieces(rendered) if backend is None else self._encode_with_copy(rendered)
        wanted = [self._ids[token] for token in self._token.findall(rendered)]
        if [index for index in ids if index in self.by_id] != wanted:
            typed = self.by_id[int(self._mark.findall(rendered)[0])]
            raise DataError(
                f"a message says {typed}, which the model's tokenizer cannot write as text",
                "leave it out",
            )
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Ids of a plain text in which control tokens are text, with what the tokenizer puts around
        it, such as a begin token.
        """
        if not self.has_tokens(text):
            return list(self._tokenizer(text, add_special_tokens=True).input_ids)
        around, alone = (
            list(self._tokenizer("a", add_special_tokens=added).input_ids)
            for added in (True, False)
        )
        length = len(alone)
        start = next(i for i in range(len(around)) if around[i : i + length] == alone)
        return [*around[:start], *self.encode(self.escape(text)), *around[start + length :]]

    def _placeholder(self, kind: str, token: str) -> str:
        return f"{kind}{self._nonce}:{self._ids[token]}\ufdd1"

    def _encode_pieces(self, rendered: str) -> list[int]:
        """Of a tokenizer in Python: each text between control tokens on its own."""
        ids: list[int] = []
        end = 0
        for found in self._token.finditer(rendered):
            ids += [*self._plain(rendered[end : found.start()]), self._ids[found[0]]]
            end = found.end()
        return ids + self._plain(rendered[end:])

    def _plain(self, piece: str) -> list[int]:
        text, tokenizer = self.unescape(piece), self._tokenizer
        if not text:
            return []
        if isinstance(tokenizer, HolisticVLMTokenizer):
            return tokenizer.encode_plain(text)
        tokens = tokenizer.tokenize(text, split_special_tokens=True)
        return list(tokenizer.convert_tokens_to_ids(tokens))

    def _encode_with_copy(self, rendered: str) -> list[int]:
        """Of a tokenizer in Rust: by a copy that knows the control tokens under other names."""
        copy, ids = self._copy
        text = self._token.sub(lambda found: self._placeholder("\ufdd2", found[0]), rendered)
        found = copy.encode(self.unescape(text), add_special_tokens=False).ids
        return [ids.get(index, index) for index in found]

    @cached_property
    def _copy(self) -> tuple[Any, Mapping[int, int]]:
        """The tokenizer with control tokens of other names, and its ids of added tokens as ours."""
        backend = self._tokenizer.backend_tokenizer
        state = json.loads(backend.to_str())
        described: Sequence[dict[str, Any]] = state["added_tokens"]
        without = dict.fromkeys(("post_processor", "truncation", "padding"))
        copy = type(backend).from_str(json.dumps({**state, **without, "added_tokens": []}))
        ids = {}
        flags = ("lstrip", "rstrip", "single_word")
        for token in described:
            name, index = token["content"], token["id"]
            chosen = {flag: token[flag] for flag in flags}
            if name in self._ids:
                name = self._placeholder("\ufdd2", name)
                copy.add_special_tokens([AddedToken(name, normalized=False, **chosen)])
            else:
                copy.add_tokens([AddedToken(name, normalized=token["normalized"], **chosen)])
            ids[copy.token_to_id(name)] = index
        return copy, ids
