"""A digest of what the token counts of a processor depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

# Fields that transformers writes, and on which no count depends: where a processor was read from,
# and the names of classes.
UNUSED_FIELDS = frozenset(
    {
        "_name_or_path",
        "_processor_class",
        "auto_map",
        "feature_extractor_type",
        "name_or_path",
        "processor_class",
        "transformers_version",
    }
)


def processor_digest(processor: Any) -> str:
    """SHA-256 of the vocabulary, chat template, tiling and other settings of a processor.

    `processor` is a processor or tokenizer of transformers, or one of this package. Two of them
    with the same files have the same digest, wherever the files lie.
    """
    digest = hashlib.sha256(type(processor).__name__.encode())
    tokenizer = getattr(processor, "tokenizer", processor)
    _add_tokenizer(digest, tokenizer)
    if processor is not tokenizer:
        _add(digest, _settings_of(processor))
        _add(digest, getattr(processor, "chat_template", None))
        _add(digest, _settings_of(getattr(processor, "image_processor", None)))
        _add(digest, _settings_of(getattr(processor, "video_processor", None)))
    return digest.hexdigest()


def _add_tokenizer(digest: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    _add(digest, type(tokenizer).__name__)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        model = getattr(tokenizer, "sp_model", None)
        digest.update(b"" if model is None else model.serialized_model_proto())
        _add(digest, sorted(tokenizer.get_vocab().items()))
    else:
        # Padding and truncation are those of the last call.
        state = json.loads(backend.to_str())
        _add(digest, {**state, "padding": None, "truncation": None})
    added = {
        index: [str(token), token.special, token.lstrip, token.rstrip, token.normalized]
        for index, token in tokenizer.added_tokens_decoder.items()
    }
    _add(digest, sorted(added.items()))
    _add(digest, tokenizer.chat_template)
    _add(digest, [str(tokenizer.bos_token), str(tokenizer.eos_token)])


def _settings_of(part: Any) -> Any:
    """What a processor saves of itself; empty for None."""
    return _settings(getattr(part, "to_dict", dict)())


def _settings(value: Any) -> Any:
    """Settings without the unused fields."""
    if isinstance(value, Mapping):
        return {
            str(key): _settings(each) for key, each in value.items() if key not in UNUSED_FIELDS
        }
    return [_settings(each) for each in value] if isinstance(value, list | tuple) else value


def _add(digest: Any, value: Any) -> None:
    digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
