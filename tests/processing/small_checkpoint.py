"""Small checkpoints without weights, and a reference encoder that uses only sentencepiece."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import sentencepiece

SMALL_MODEL = Path(__file__).with_name("small.model")
PIECES = 520

# In InternVL's order, after the pieces of the small model.
SPECIAL = {
    "<|plugin|>": 520,
    "<|interpreter|>": 521,
    "<|action_end|>": 522,
    "<|action_start|>": 523,
    "<|im_end|>": 524,
    "<|im_start|>": 525,
    "<img>": 526,
    "</img>": 527,
    "<IMG_CONTEXT>": 528,
    "<quad>": 529,
    "</quad>": 530,
    "<ref>": 531,
    "</ref>": 532,
    "<box>": 533,
    "</box>": 534,
}
NAMED = {"<unk>": 0, "<s>": 1, "</s>": 2}

CONFIG: dict[str, Any] = {
    "model_type": "internvl_chat",
    "template": "internlm2-chat",
    "downsample_ratio": 0.5,
    "force_image_size": 56,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
    "embedding_config": {"image_size": 56, "patch_size": 14, "img_context_token_id": 528},
    "llm_config": {"vocab_size": 535},
}
TOKENS_PER_TILE = 4


def oracle_ids(text: str, model: Path = SMALL_MODEL) -> list[int]:
    """Reference ids of a text: special tokens parsed, pieces between them encoded separately."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    special = {**SPECIAL, **NAMED}
    ids: list[int] = []
    for piece in re.split("(" + "|".join(map(re.escape, special)) + ")", text):
        ids += [special[piece]] if piece in special else processor.encode(piece)
    return ids


def write_hovle(folder: Path, model: Path = SMALL_MODEL) -> Path:
    """A HoVLE folder with the files that the processor reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "added_tokens.json").write_text(json.dumps(SPECIAL))
    return folder
