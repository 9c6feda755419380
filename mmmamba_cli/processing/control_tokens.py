"""Escaping of control tokens typed in messages to a plain language model.

A chat template renders a conversation as one string, in which the token `<|im_start|>` and the same
characters typed in a message are equal. Typed ones are replaced by placeholders before the template
is applied, and are encoded as text afterwards.
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

    Added tokens that are not special, for example `<think>` in many families, are not escaped.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.by_id = {index: str(token) for index, token in added.items() if token.special}
        self._ids = {token: index for index, token in self.by_id.items() if token}
        # Random, so that a message cannot contain a placeholder.
        self._nonce = secrets.token_hex(8)
        longest_first = sorted(self._ids, key=len, reverse=True)
        # `(?!)` matches nothing; an empty pattern would match everywhere.
        self._token = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._mark = re.compile(f"\ufdd0{self._nonce}:(\\d+)\ufdd1")

    def escape(self, text: str) -> str:
        """Replace the control tokens in a message by placeholders."""
        return self._token.sub(lambda found: self._placeholder("\ufdd0", found[0]), text)

    def has_tokens(self, text: str) -> bool:
        """Whether a text contains control tokens."""
        return self._token.search(text) is not None

    def unescape(self, text: str) -> str:
        """Replace placeholders by the typed characters."""
        return self._mark.sub(lambda found: self.by_id[int(found[1])], text)

    def encode(self, rendered: str) -> list[int]:
        """Encode a rendered conversation: placeholders as text, control tokens as tokens.

        No begin or end token is added.

        Raises:
            DataError: the tokenizer cannot encode a typed token as text, since it is an ordinary
                piece of its vocabulary.
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
        """Encode plain text with the tokenizer's begin and end tokens; control tokens are text."""
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
        """Encode the texts between control tokens one by one (tokenizers in Python)."""
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
        """Encode with a copy of a Rust tokenizer, in which control tokens have other names."""
        copy, ids = self._copy
        text = self._token.sub(lambda found: self._placeholder("\ufdd2", found[0]), rendered)
        found = copy.encode(self.unescape(text), add_special_tokens=False).ids
        return [ids.get(index, index) for index in found]

    @cached_property
    def _copy(self) -> tuple[Any, Mapping[int, int]]:
        """The copy with renamed control tokens, and the original id of each of its added tokens."""
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
