"""Files beside the weights of an export: config, tokenizer, processor, bundled code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from mmmamba_cli.checkpoint import NATIVE_MODEL_TYPE, SOURCE_CONFIG, Checkpoint, generation_config
from mmmamba_cli.export.layouts import (
    HOVLE,
    HOVLE_CODE,
    HUB,
    MMMAMBA_HF_CODE,
    Layout,
    drop_local_fields,
)
from mmmamba_cli.export.remote_code import CONFIGURATION, MODELING, PROCESSING, bundle_files
from mmmamba_cli.processing import HolisticTextProcessor, HolisticVLMProcessor, HolisticVLMTokenizer
from mmmamba_cli.runs import open_processor, write_model_files
from mmmamba_cli.runs.provenance import PROVENANCE_FIELD, Provenance, provenance_field, redact_value

GENERATION_CONFIG = "generation_config.json"
CONFIG_FILE, PROCESSOR_FILE, TOKENIZER_FILE = (
    "config.json",
    "processor_config.json",
    "tokenizer_config.json",
)
# Files of a teacher's tokenizer.
TOKENIZER_FILES = (
    "tokenizer.model",
    TOKENIZER_FILE,
    "added_tokens.json",
    "special_tokens_map.json",
)
TOKENIZER_CLASS = "tokenization_internlm2.InternLM2Tokenizer"


def write_sidecar_files(
    folder: Path,
    checkpoint: Checkpoint,
    layout: Layout,
    dtype: torch.dtype,
    provenance: Provenance,
) -> None:
    """Write all files of an export except weights, manifest and card."""
    if layout.name == HUB:
        _write_hub_files(folder, checkpoint, dtype)
    else:
        assert layout.config is not None
        _write_json(folder / CONFIG_FILE, layout.config)
        generation_config(checkpoint).save_pretrained(folder)
        _write_foreign_tokenizer(
            folder, checkpoint, HOVLE_CODE if layout.name == HOVLE else MMMAMBA_HF_CODE
        )
    for name in (CONFIG_FILE, SOURCE_CONFIG, PROCESSOR_FILE, TOKENIZER_FILE):
        if (folder / name).is_file():
            value = json.loads((folder / name).read_text(encoding="utf-8-sig"))
            _write_json(folder / name, redact_value(value))
    _add_field(folder / CONFIG_FILE, PROVENANCE_FIELD, provenance_field(provenance))


def _write_hub_files(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Write the native layout with the code that loads it without this package."""
    write_model_files(folder, checkpoint.config, checkpoint, dtype)
    _write_json(folder / SOURCE_CONFIG, drop_local_fields(checkpoint.raw_config))
    own = checkpoint.path / GENERATION_CONFIG
    if checkpoint.model_type == NATIVE_MODEL_TYPE and own.is_file():
        shutil.copyfile(own, folder / GENERATION_CONFIG)
    for name, text in bundle_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    model = f"{MODELING}.HolisticVLM"
    maps: dict[str, Any] = {
        "AutoConfig": f"{CONFIGURATION}.HolisticVLMConfig",
        "AutoModel": f"{MODELING}.HolisticDecoder",
        "AutoModelForImageTextToText": model,
        "AutoModelForCausalLM": model,
    }
    processor = open_processor(checkpoint)
    if processor is not None:
        is_text = isinstance(processor, HolisticTextProcessor)
        kind = "HolisticTextProcessor" if is_text else "HolisticVLMProcessor"
        name = f"{PROCESSING}.{kind}"
        maps["AutoProcessor"] = name
        _add_auto_map(folder / PROCESSOR_FILE, {"AutoProcessor": name})
        if isinstance(processor.tokenizer, HolisticVLMTokenizer):
            tokenizer = [f"{PROCESSING}.HolisticVLMTokenizer", None]
            _add_auto_map(folder / TOKENIZER_FILE, {"AutoTokenizer": tokenizer})
    _add_auto_map(folder / CONFIG_FILE, maps)


def _add_auto_map(file: Path, entries: dict[str, Any]) -> None:
    _add_field(file, "auto_map", entries)


def _add_field(file: Path, name: str, content: dict[str, Any]) -> None:
    value = json.loads(file.read_text(encoding="utf-8-sig"))
    _write_json(file, {**value, name: content})


def _write_foreign_tokenizer(folder: Path, checkpoint: Checkpoint, code: str) -> None:
    """Write InternLM2's tokenizer files, a teacher's or converted from the native ones."""
    file = checkpoint.tokenizer_file
    if file is None:
        return
    if checkpoint.model_type == NATIVE_MODEL_TYPE:
        _convert_tokenizer(folder, checkpoint)
    else:
        for name in TOKENIZER_FILES:
            if file.with_name(name).is_file():
                shutil.copyfile(file.with_name(name), folder / name)
    if (folder / TOKENIZER_FILE).is_file():
        _add_auto_map(
            folder / TOKENIZER_FILE, {"AutoTokenizer": [f"{code}--{TOKENIZER_CLASS}", None]}
        )


def _convert_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    processor = open_processor(checkpoint)
    assert isinstance(processor, HolisticVLMProcessor)
    tokenizer = processor.tokenizer
    tokenizer.save_vocabulary(str(folder))
    named = {
        key: str(getattr(tokenizer, key))
        for key in ("unk_token", "bos_token", "eos_token", "pad_token")
    }
    added = tokenizer.added_tokens_decoder
    special = [str(token) for token in added.values() if str(token) not in named.values()]
    _write_json(folder / "added_tokens.json", {str(t): index for index, t in added.items()})
    _write_json(folder / "special_tokens_map.json", {**named, "additional_special_tokens": special})
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    _write_json(
        folder / TOKENIZER_FILE,
        {
            "tokenizer_class": TOKENIZER_CLASS.rpartition(".")[2],
            **named,
            "additional_special_tokens": special,
            "added_tokens_decoder": {
                str(index): {flag: getattr(token, flag) for flag in flags}
                for index, token in sorted(added.items())
            },
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": checkpoint.config.max_position_embeddings,
        },
    )


def _write_json(file: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
