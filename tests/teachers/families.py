"""Tiny random teachers of the families that can be converted, with real inputs for each.

A family is a config of transformers (four text layers, a small tower), weights from a fixed seed,
and the family's own processor (`teacher_processors`). `FAMILIES` lists them by the name of their
`model_type`. `prompts` gives the inputs of a model for rows of words and pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from teacher_processors import LLAVA_GRID_PINPOINTS, PATCH, TILE, processor_of
from teacher_tokenizers import tokenizer_of
from transformers import PreTrainedConfig, PreTrainedModel

LAYERS = 4
HIDDEN = 32
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
VISION_HIDDEN = 16


@dataclass(frozen=True)
class Family:
    """One kind of teacher.

    Attributes:
        name: its name here, the `model_type` of transformers unless text configs vary.
        make_config: the tiny config for a tokenizer.
        pictures: whether it takes pictures.
        video: whether it takes video, as `pixel_values_videos` or as frames.
        padding_invariant: whether transformers' own class gives a row the same logits with padding
            on its left. The queries of Ministral 3 are scaled by their column, padding counted.
    """

    name: str
    make_config: Callable[[Any], PreTrainedConfig]
    pictures: bool = True
    video: bool = False
    padding_invariant: bool = True

    @property
    def processor(self) -> Any:
        """The family's processor; the tokenizer where it takes no pictures."""
        return processor_of(self.name) if self.pictures else self.tokenizer

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.name)

    @property
    def special_ids(self) -> list[int]:
        """The ids of all special tokens, placeholders of pictures included."""
        added = self.tokenizer.added_tokens_decoder
        return [token for token, entry in added.items() if entry.special]

    def generation(self, new_tokens: int) -> dict[str, Any]:
        """Options of `generate`: greedy, always `new_tokens` long, no placeholder of a picture.

        A random model could write such a placeholder, which no pixels belong to.
        """
        return {
            "do_sample": False,
            "min_new_tokens": new_tokens,
            "max_new_tokens": new_tokens,
            "suppress_tokens": self.special_ids,
        }

    def config(self) -> PreTrainedConfig:
        return self.make_config(self.tokenizer)

    def model(self, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
        """The stock model in float32 and eval mode, with weights that depend on `seed` alone."""
        auto = (
            transformers.AutoModelForImageTextToText
            if self.pictures
            else transformers.AutoModelForCausalLM
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = auto.from_config(self.config(), attn_implementation=attention)
        return randomize(model, seed).eval()


def save_teacher(family: Family, folder: Path, seed: int = 0) -> None:
    """Write the checkpoint as a release has it: weights, config, processor and chat template.

    Without torchvision `AutoProcessor` refuses the folders of families with a video processor, and
    that of Mistral 3 has a tokenizer only.
    """
    family.model(seed=seed).save_pretrained(folder)
    family.processor.save_pretrained(folder)


def randomize(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Give every parameter a random value, so that no bias is 0 and no norm is the identity.

    Matrices get the standard deviation of one over the square root of their inputs: logits then
    differ enough for greedy tokens to depend on the prompt. A vector keeps its value plus noise.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.add_(0.1 * noise)
    return model


def text_sizes(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def head_sizes(tokenizer: Any) -> dict[str, Any]:
    """The text sizes of a family whose heads have a size of their own."""
    return text_sizes(tokenizer) | {"head_dim": HEAD_DIM}


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def siglip_sizes() -> dict[str, Any]:
    return {
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": PATCH,
    }


def qwen_vl_ids(tokenizer: Any) -> dict[str, Any]:
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()}


def qwen_tower() -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
    }


def qwen2(tokenizer: Any) -> PreTrainedConfig:
    return transformers.Qwen2Config(**text_sizes(tokenizer))


def qwen3(tokenizer: Any) -> PreTrainedConfig:
    return transformers.Qwen3Config(**head_sizes(tokenizer))


def llama(tokenizer: Any) -> PreTrainedConfig:
    return transformers.LlamaConfig(**head_sizes(tokenizer))


def qwen2_5_vl(tokenizer: Any) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    return transformers.Qwen2_5_VLConfig(
        text_config={**text_sizes(tokenizer), "rope_parameters": rope},
        vision_config=qwen_tower() | {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]},
        **qwen_vl_ids(tokenizer),
        **special_ids(tokenizer),
    )


def qwen3_vl(tokenizer: Any) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    return transformers.Qwen3VLConfig(
        text_config={**head_sizes(tokenizer), "rope_parameters": rope},
        vision_config=qwen_tower()
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **qwen_vl_ids(tokenizer),
        **special_ids(tokenizer),
    )


def internvl(tokenizer: Any) -> PreTrainedConfig:
    return transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **text_sizes(tokenizer)},
        vision_config=siglip_sizes() | {"image_size": [TILE, TILE], "patch_size": [PATCH, PATCH]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(TILE // PATCH // 2) ** 2,
        tie_word_embeddings=False,
        **special_ids(tokenizer),
    )


def llava_onevision(tokenizer: Any) -> PreTrainedConfig:
    return transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text_sizes(tokenizer)},
        vision_config={"model_type": "siglip_vision_model", **siglip_sizes()},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=LLAVA_GRID_PINPOINTS,
        **special_ids(tokenizer),
    )


def _smolvlm(config: type[PreTrainedConfig], tokenizer: Any) -> PreTrainedConfig:
    return config(
        text_config={"model_type": "llama", **head_sizes(tokenizer)},
        vision_config=siglip_sizes(),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **special_ids(tokenizer),
    )


def smolvlm(tokenizer: Any) -> PreTrainedConfig:
    return _smolvlm(transformers.SmolVLMConfig, tokenizer)


def idefics3(tokenizer: Any) -> PreTrainedConfig:
    return _smolvlm(transformers.Idefics3Config, tokenizer)


def _mistral3(text: dict[str, Any], tokenizer: Any) -> PreTrainedConfig:
    tower = siglip_sizes() | {"image_size": 2 * TILE}
    return transformers.Mistral3Config(
        text_config={**head_sizes(tokenizer), **text},
        vision_config={"model_type": "pixtral", **tower, "head_dim": VISION_HIDDEN // 2},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
        **special_ids(tokenizer),
    )


def mistral3(tokenizer: Any) -> PreTrainedConfig:
    return _mistral3({"model_type": "mistral"}, tokenizer)


def ministral3(tokenizer: Any) -> PreTrainedConfig:
    """Mistral 3 with the newer text model: YaRN, and queries scaled by their position."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    return _mistral3({"model_type": "ministral3", "rope_parameters": rope}, tokenizer)


def gemma3(tokenizer: Any) -> PreTrainedConfig:
    text = {
        **head_sizes(tokenizer),
        "query_pre_attn_scalar": HEAD_DIM,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    }
    ids = {
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
        "image_token_index": "<image_soft_token>",
    }
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=siglip_sizes(),
        mm_tokens_per_image=4,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
        **special_ids(tokenizer),
    )


FAMILIES = {
    family.name: family
    for family in (
        Family("qwen2_5_vl", qwen2_5_vl, video=True),
        Family("qwen3_vl", qwen3_vl, video=True),
        Family("internvl", internvl, video=True),
        Family("llava_onevision", llava_onevision, video=True),
        Family("smolvlm", smolvlm, video=True),
        Family("idefics3", idefics3),
        Family("mistral3", mistral3),
        Family("ministral3", ministral3, padding_invariant=False),
        Family("gemma3", gemma3),
        Family("qwen3", qwen3, pictures=False),
        Family("qwen2", qwen2, pictures=False),
        Family("llama", llama, pictures=False),
    )
}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random colours in squares of four pixels."""
    random = np.random.default_rng(seed)
    squares = random.integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    pixels = squares.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]
    return Image.fromarray(pixels)


def conversation(words: str, pictures: Sequence[Image.Image] = ()) -> list[dict[str, Any]]:
    """One message of a user, pictures first."""
    items = [{"type": "image", "image": each} for each in pictures]
    return [{"role": "user", "content": [*items, {"type": "text", "text": words}]}]


def rendered(family: Family, words: str, pictures: Sequence[Image.Image] = ()) -> str:
    """The prompt of one message, up to the start of the answer."""
    messages = conversation(words, pictures)
    return family.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def prompts(
    family: Family, rows: Sequence[tuple[str, Sequence[Image.Image]]]
) -> dict[str, torch.Tensor]:
    """The inputs of a model for rows of words and pictures, padded on the left.

    The templates write the token before a text themselves, so the tokenizer adds none.
    """
    text = [rendered(family, words, pictures) for words, pictures in rows]
    # A row of text is an empty list of pictures; text alone is no list at all.
    pictures = [list(each) for _, each in rows] if any(each for _, each in rows) else None
    options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
    if not family.pictures:
        return dict(family.processor(text, add_special_tokens=False, **options))
    return dict(family.processor(text=text, images=pictures, **options))


# Inputs with a value for each token, (batch, columns).
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def right_padded(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A left-padded batch with each row's padding moved behind its tokens."""
    padding = [int(row.argmax()) for row in inputs["attention_mask"]]
    return {
        name: torch.stack([row.roll(-n) for row, n in zip(value, padding, strict=True)])
        if name in PER_TOKEN
        else value
        for name, value in inputs.items()
    }


def left_padded(
    family: Family, inputs: dict[str, torch.Tensor], columns: int
) -> dict[str, torch.Tensor]:
    """The same row behind `columns` more columns of padding."""
    padding = {"input_ids": family.tokenizer.pad_token_id}
    return {
        name: torch.nn.functional.pad(value, (columns, 0), value=padding.get(name, 0))
        if name in PER_TOKEN
        else value
        for name, value in inputs.items()
    }
