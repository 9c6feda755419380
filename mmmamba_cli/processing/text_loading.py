"""The processor of a plain language model, from what its makers put beside its weights."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.processing.loading import build_tokenizer, read_json
from mmmamba_cli.processing.text_processor import HolisticTextProcessor

GGUF_SUFFIX = ".gguf"
FAST_FILE = "tokenizer.json"
# Its own tokenizer's ids are SentencePiece's, which transformers' classes do not give.
INTERNLM2 = "internlm2"
# Of a tokenizer: settings, vocabulary, merges, chat template.
TEXTS = frozenset({".json", ".txt", ".jinja"})


def processor_from_language_model(
    config: Mapping[str, Any], tokenizer_file: Path
) -> HolisticTextProcessor:
    """The processor of a model with that `config.json`; its tokenizer is `tokenizer_file`.

    That is a `tokenizer.json` or `tokenizer.model` with its settings beside it, or a GGUF file,
    which holds all. Raises `CheckpointError` if it cannot be read or does not fit the config.
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
    ends = {*processor.stop_token_ids, *as_ids(config.get("eos_token_id"))}
    settings = tokenizer_file.with_name("generation_config.json")
    if settings.is_file() and tokenizer_file.suffix != GGUF_SUFFIX:
        ends |= _ids_in(read_json(settings).get("eos_token_id"), settings)
    processor.stop_token_ids = sorted(ends)
    return processor


def _ids_in(ids: Any, file: Path) -> set[int]:
    listed = ids if isinstance(ids, list) else [ids]
    if ids is not None and not all(type(one) is int for one in listed):
        raise CheckpointError(f"{file}: eos_token_id is {ids!r:.60}, expected ids of tokens")
    return as_ids(ids)


def _tokenizer(config: Mapping[str, Any], file: Path) -> PreTrainedTokenizerBase:
    if file.suffix == ".model" and config.get("model_type") == INTERNLM2:
        tokenizer = build_tokenizer(file, config["vocab_size"], required=())
        settings = read_json(file.with_name("tokenizer_config.json"), required=False)
        tokenizer.chat_template = settings.get("chat_template")
        return tokenizer
    try:
        if file.suffix == GGUF_SUFFIX:
            return _from_gguf(config, file)
        with unmarked(file.parent) as folder:
            if file.name == FAST_FILE:
                # Read as it is; the classes named for a model rebuild it from its parts.
                return PreTrainedTokenizerFast.from_pretrained(folder)
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # The tokenizers library raises nothing more special for a file that it cannot read.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        known = isinstance(error, OSError | ValueError) or type(error) is Exception
        raise CheckpointError(
            f"the tokenizer {file} cannot be read{f': {first}' if known else ''}",
            "give another with --tokenizer FILE",
        ) from error


def _from_gguf(config: Mapping[str, Any], file: Path) -> PreTrainedTokenizerBase:
    """The file's tokenizer; which tokens begin, end and pad is said by the ids of its config."""
    from gguf import GGUFReader

    with alone(file) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    # Some versions of transformers take the begin token for the end token, and put none in front.
    for name in ("bos_token", "eos_token", "pad_token"):
        index = config.get(f"{name}_id")
        if index is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))
    begins = GGUFReader(file).fields.get("tokenizer.ggml.add_bos_token")
    if begins is not None:
        tokenizer.add_bos_token = bool(begins.contents())
    return tokenizer


@contextmanager
def alone(file: Path) -> Iterator[Path]:
    """A folder with nothing but this file in it: transformers reads what lies beside a GGUF too."""
    with TemporaryDirectory(prefix="mmmamba-") as folder:
        Path(folder, file.name).symlink_to(file.resolve())
        yield Path(folder)


@contextmanager
def unmarked(folder: Path) -> Iterator[Path]:
    """The folder, or one like it without byte order marks, which transformers does not read."""
    marked = {
        file.name: content.removeprefix(codecs.BOM_UTF8)
        for file in folder.iterdir()
        if file.suffix in TEXTS and file.is_file()
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


def as_ids(ids: int | list[int] | None) -> set[int]:
    """Token ids as configs write them: one, several or none."""
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
