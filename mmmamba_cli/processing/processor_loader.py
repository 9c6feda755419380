"""Processors from the files of a checkpoint: saved by mmmamba, HoVLE's, or a language model's."""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.processing.chat_template import IMAGE_CONTEXT, REQUIRED_TOKENS
from mmmamba_cli.processing.processor import HolisticVLMProcessor, require_tokenizer
from mmmamba_cli.processing.text_processor import HolisticTextProcessor
from mmmamba_cli.processing.tokenizer import (
    VOCABULARY_FILE,
    HolisticVLMTokenizer,
    load_sentencepiece,
    read_vocabulary,
)

GGUF_SUFFIX = ".gguf"
FAST_TOKENIZER_FILE = "tokenizer.json"
# Its ids are SentencePiece's, which transformers' tokenizer classes do not reproduce.
INTERNLM2 = "internlm2"
# Text files of a tokenizer: settings, vocabulary, merges, chat template.
TEXT_SUFFIXES = frozenset({".json", ".txt", ".jinja"})
PROCESSOR_FILE = "processor_config.json"
Saved = TypeVar("Saved", HolisticVLMProcessor, HolisticTextProcessor)
# Exceptions of transformers for settings of wrong types.
LOAD_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)
# Ids of InternVL's special tokens in InternLM2's vocabulary of 92553 tokens. The first six replace
# unused pieces of the SentencePiece model.
INTERNVL_VOCABULARY = 92553
INTERNVL_TOKENS = {
    "<|plugin|>": 92538,
    "<|interpreter|>": 92539,
    "<|action_end|>": 92540,
    "<|action_start|>": 92541,
    "<|im_end|>": 92542,
    "<|im_start|>": 92543,
    "<img>": 92544,
    "</img>": 92545,
    "<IMG_CONTEXT>": 92546,
    "<quad>": 92547,
    "</quad>": 92548,
    "<ref>": 92549,
    "</ref>": 92550,
    "<box>": 92551,
    "</box>": 92552,
}


def processor_from_folder(folder: str | Path) -> HolisticVLMProcessor | HolisticTextProcessor:
    """Load the processor of a model folder: mmmamba's, HoVLE's or a published mmMamba's.

    Raises:
        CheckpointError: the folder has no tokenizer, or its files do not match.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if (folder / PROCESSOR_FILE).is_file() and config.get("vision") is None:
        return _saved(HolisticTextProcessor, folder)
    if (folder / PROCESSOR_FILE).is_file():
        processor = _saved(HolisticVLMProcessor, folder)
        image_token_id = (config.get("vision") or {}).get("image_token_id")
        _check_image_token(processor.tokenizer, image_token_id, "vision.image_token_id")
        return processor
    return processor_from_hovle(config, folder / VOCABULARY_FILE)


def _saved(kind: type[Saved], folder: Path) -> Saved:
    """Load a saved processor; `CheckpointError` for damaged files."""
    try:
        return kind.from_pretrained(folder)
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"the tokenizer or {PROCESSOR_FILE} of {folder} cannot be read: it is not as it was "
            "saved",
            "take these files from where the model came from",
        ) from error


def processor_from_hovle(
    config: Mapping[str, Any], tokenizer_file: Path | None
) -> HolisticVLMProcessor:
    """Load the processor described by HoVLE's `config.json` and `tokenizer.model`.

    Special tokens come from `tokenizer_config.json` and `added_tokens.json` beside
    `tokenizer_file`, others from `INTERNVL_TOKENS` if the vocabulary is InternVL's.

    Raises:
        CheckpointError: a file or field is missing or does not match.
    """
    file = require_tokenizer(tokenizer_file)
    vocab_size = _get(config, "llm_config.vocab_size", int)
    tokenizer = build_tokenizer(file, vocab_size)
    context_id = _get(config, "embedding_config.img_context_token_id", int)
    _check_image_token(tokenizer, context_id, "embedding_config.img_context_token_id")
    dynamic = config.get("dynamic_image_size", True)
    own_size = _get(config, "embedding_config.image_size", int)
    return HolisticVLMProcessor(
        tokenizer,
        image_size=_get(config, "force_image_size", int, own_size),
        patch_size=_get(config, "embedding_config.patch_size", int),
        downsample_ratio=_get(config, "downsample_ratio", float),
        # Without dynamic sizes an image is one tile.
        min_tiles=_get(config, "min_dynamic_patch", int, 1) if dynamic else 1,
        max_tiles=_get(config, "max_dynamic_patch", int, 12) if dynamic else 1,
        use_thumbnail=config.get("use_thumbnail", True),
        template=_get(config, "template", str),
    )


def processor_from_language_model(
    config: Mapping[str, Any], tokenizer_file: Path
) -> HolisticTextProcessor:
    """Load the processor of a language model from its `config.json` and `tokenizer_file`.

    The file is a `tokenizer.json` or `tokenizer.model` with its settings beside it, or a GGUF file.

    Raises:
        CheckpointError: the tokenizer cannot be read or does not fit the config.
    """
    tokenizer = _tokenizer(config, tokenizer_file)
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float):
        raise CheckpointError(
            f"tokenizer {tokenizer_file}: model_max_length is {longest!r:.60}, expected a number"
        )
    largest = max(tokenizer.get_vocab().values())
    if largest >= config["vocab_size"]:
        raise CheckpointError(
            f"tokenizer {tokenizer_file} has ids up to {largest}, the model's vocabulary has "
            f"{config['vocab_size']}"
        )
    processor = HolisticTextProcessor(tokenizer)
    ends = {*processor.stop_token_ids, *as_id_set(config.get("eos_token_id"))}
    settings = tokenizer_file.with_name("generation_config.json")
    if settings.is_file() and tokenizer_file.suffix != GGUF_SUFFIX:
        ends |= _ids_in(read_json(settings).get("eos_token_id"), settings)
    processor.stop_token_ids = sorted(ends)
    return processor


def build_tokenizer(
    file: Path, vocab_size: int, required: Collection[str] = REQUIRED_TOKENS
) -> HolisticVLMTokenizer:
    """Load the tokenizer of a SentencePiece model and the special-token files beside it.

    `vocab_size` is the number of rows of the token embedding, which bounds the ids; `required` are
    special tokens that must have an id.
    """
    settings = read_json(file.with_name("tokenizer_config.json"), required=False)
    added = _read_added_tokens(file, settings, vocab_size, required)
    names = ("unk_token", "bos_token", "eos_token", "pad_token")
    named = {key: _content(settings[key]) for key in names if settings.get(key) is not None}
    for key, token in named.items():
        if not isinstance(token, str):
            raise CheckpointError(
                f"{file.with_name('tokenizer_config.json')}: {key} is {token!r:.60}, expected text"
            )
    tokenizer = HolisticVLMTokenizer(
        vocab_file=str(file),
        added_tokens_decoder=added,
        clean_up_tokenization_spaces=False,
        **named,
    )
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise CheckpointError(
            f"tokenizer {file} has ids up to {largest}, the model's vocabulary has {vocab_size}"
        )
    return tokenizer


def _read_added_tokens(
    file: Path, settings: Mapping[str, Any], vocab_size: int, required: Collection[str]
) -> dict[int, AddedToken]:
    """Special tokens by id, from the files beside `file` or `INTERNVL_TOKENS`."""
    described = settings.get("added_tokens_decoder", {})
    if not isinstance(described, dict) or not all(map(_is_described, described.items())):
        raise CheckpointError(
            f"{file.with_name('tokenizer_config.json')}: added_tokens_decoder is not a table of "
            "tokens with their content"
        )
    ids = {token["content"]: int(index) for index, token in described.items()}
    listed = read_json(file.with_name("added_tokens.json"), required=False)
    usual = INTERNVL_TOKENS if vocab_size == INTERNVL_VOCABULARY else {}
    if not all(type(index) is int and index >= 0 for index in listed.values()):
        raise CheckpointError(
            f"{file.with_name('added_tokens.json')} is not a table of tokens and their ids"
        )
    # Later sources take precedence.
    ids = {**usual, **_special_pieces(file), **listed, **ids}
    for content, index in listed.items():
        if ids[content] != index:
            raise CheckpointError(
                f"special token {content} is {ids[content]} in tokenizer_config.json but {index} "
                f"in added_tokens.json beside {file}"
            )
    missing = [content for content in required if content not in ids]
    if missing:
        raise CheckpointError(
            f"no ids are known for special tokens {', '.join(missing)} of {file}",
            "put the teacher's added_tokens.json or tokenizer_config.json beside it",
        )
    if len(set(ids.values())) < len(ids):
        raise CheckpointError(f"two special tokens of {file} have the same id: {ids}")
    added = {
        index: AddedToken(token, special=True, normalized=False) for token, index in ids.items()
    }
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    for index, token in described.items():
        chosen = {flag: bool(token[flag]) for flag in flags if flag in token}
        added[int(index)] = AddedToken(token["content"], **chosen)
    return added


def _is_described(entry: tuple[str, Any]) -> bool:
    index, token = entry
    return index.isdecimal() and isinstance(token, dict) and type(token.get("content")) is str


def _special_pieces(file: Path) -> dict[str, int]:
    """Ids of the special tokens that are pieces of the SentencePiece model."""
    model = load_sentencepiece(read_vocabulary(file), file)
    ids = {content: model.piece_to_id(content) for content in INTERNVL_TOKENS}
    return {content: index for content, index in ids.items() if index != model.unk_id()}


def _check_image_token(tokenizer: HolisticVLMTokenizer, expected: Any, field: str) -> None:
    index = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
    if index != expected:
        raise CheckpointError(
            f"config.json: {field} is {expected}, but the tokenizer has {IMAGE_CONTEXT} at {index}",
            "take config.json and tokenizer from the same checkpoint",
        )


def _content(token: Any) -> Any:
    """Text of a token in `tokenizer_config.json`: a string, or a dict with its content."""
    return token.get("content") if isinstance(token, dict) else token


def _get(config: Mapping[str, Any], field: str, kind: type, default: Any = None) -> Any:
    """Value of `a.b` in the config; `CheckpointError` if its type is not `kind`."""
    value: Any = config
    for key in field.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    value = default if value is None else value
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CheckpointError(f"config.json: {field} is {value!r:.60}, expected {kind.__name__}")
    return value


def _tokenizer(config: Mapping[str, Any], file: Path) -> PreTrainedTokenizerBase:
    if file.suffix == ".model" and config.get("model_type") == INTERNLM2:
        tokenizer = build_tokenizer(file, config["vocab_size"], required=())
        settings = read_json(file.with_name("tokenizer_config.json"), required=False)
        tokenizer.chat_template = settings.get("chat_template")
        return tokenizer
    try:
        if file.suffix == GGUF_SUFFIX:
            return _from_gguf(config, file)
        with without_byte_order_marks(file.parent) as folder:
            if file.name == FAST_TOKENIZER_FILE:
                # Loaded as is; model-specific tokenizer classes rebuild it from its parts.
                return PreTrainedTokenizerFast.from_pretrained(folder)
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # The tokenizers library raises plain `Exception` for an unreadable file.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        known = isinstance(error, OSError | ValueError) or type(error) is Exception
        raise CheckpointError(
            f"the tokenizer {file} cannot be read{f': {first}' if known else ''}",
            "give another with --tokenizer FILE",
        ) from error


def _from_gguf(config: Mapping[str, Any], file: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a GGUF file; `config` gives the begin, end and padding ids."""
    from gguf import GGUFReader

    with isolated(file) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    # Some versions of transformers use the begin token as the end token, and prepend none.
    for name in ("bos_token", "eos_token", "pad_token"):
        index = config.get(f"{name}_id")
        if index is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))
    begins = GGUFReader(file).fields.get("tokenizer.ggml.add_bos_token")
    if begins is not None:
        tokenizer.add_bos_token = bool(begins.contents())
    return tokenizer


def _ids_in(ids: Any, file: Path) -> set[int]:
    listed = ids if isinstance(ids, list) else [ids]
    if ids is not None and not all(type(one) is int for one in listed):
        raise CheckpointError(f"{file}: eos_token_id is {ids!r:.60}, expected ids of tokens")
    return as_id_set(ids)


def as_id_set(ids: int | list[int] | None) -> set[int]:
    """Set of the token ids of a config field: an id, a list or None."""
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


@contextmanager
def isolated(file: Path) -> Iterator[Path]:
    """A folder with only this file: transformers also reads the files beside a GGUF file."""
    with TemporaryDirectory(prefix="mmmamba-") as folder:
        Path(folder, file.name).symlink_to(file.resolve())
        yield Path(folder)


@contextmanager
def without_byte_order_marks(folder: Path) -> Iterator[Path]:
    """The folder, or a copy without byte order marks, which transformers cannot read."""
    marked = {
        file.name: content.removeprefix(codecs.BOM_UTF8)
        for file in folder.iterdir()
        if file.suffix in TEXT_SUFFIXES and file.is_file()
        for content in [file.read_bytes()]
        if content.startswith(codecs.BOM_UTF8)
    }
    if not marked:
        yield folder
        return
    with TemporaryDirectory(prefix="mmmamba-") as made:
        for file in folder.iterdir():
            copy = Path(made, file.name)
            if file.name in marked:
                copy.write_bytes(marked[file.name])
            elif file.is_file():
                copy.symlink_to(file.resolve())
        yield Path(made)


def read_json(file: Path, *, required: bool = True) -> dict[str, Any]:
    """Read a JSON object; {} for a missing file that is not `required`."""
    if not required and not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return value
