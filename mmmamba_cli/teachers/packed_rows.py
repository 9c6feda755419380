"""Families whose rows may hold several conversations (`data.batching: packed`). No torch.

`masking_utils` of transformers separates the sequences of a row by positions that begin again,
where a call has neither a mask nor a cache. Whether packed rows are exact depends on the masks and
the positions of a class, so families are listed: tests compare each with single conversations.
"""

from __future__ import annotations

from typing import Any

from mmmamba_cli.teachers.mixer_plan import teacher_type
from mmmamba_cli.teachers.refusals import bidirectional_warning, text_config

# Vision-language models, by model_type.
PACKED_VISION_FAMILIES = frozenset(
    {
        "idefics3",
        "internvl",
        "llava_onevision",
        "mistral3",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
    }
)
# Text decoders that come with a vision-language model only.
PACKED_DECODERS = frozenset(
    {"qwen2_5_vl_text", "qwen2_vl_text", "qwen3_vl_moe_text", "qwen3_vl_text"}
)
# Language models, also as the text decoder of one of the vision-language models.
PACKED_LANGUAGE_MODELS = frozenset(
    {
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "cwm",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "granite",
        "granitemoe",
        "helium",
        "hyperclovax",
        "jais2",
        "llama",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "nanochat",
        "nemotron",
        "olmo",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
        "vaultgemma",
    }
)


def packing_problem(config: Any) -> str | None:
    """Why rows of a teacher or its student hold one conversation each; None if rows may be packed.

    The reason is a sentence without a full stop. `config` is that of transformers.
    """
    name, text = (teacher_type(one.model_type) for one in (config, text_config(config)))
    if bidirectional_warning(config) is not None:
        return (
            f"rows of {name} hold one conversation each: where tokens of a picture see later ones, "
            "the masks that transformers makes for packed rows are others"
        )
    is_known = (
        text in PACKED_LANGUAGE_MODELS
        if name == text
        else name in PACKED_VISION_FAMILIES and text in PACKED_LANGUAGE_MODELS | PACKED_DECODERS
    )
    if is_known:
        return None
    part = name if name == text else f"{name} with a text decoder {text}"
    return (
        f"rows of {part} hold one conversation each: its attention over packed rows is not known "
        "to be that of single conversations"
    )
