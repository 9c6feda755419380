"""Small random teachers of transformers' own classes, and inputs with pictures."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mmmamba_cli.teachers import StudentPlan, convert, mixers_of

VOCABULARY, IMAGE_ID = 96, 90
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
QWEN_IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": 91,
    "vision_start_token_id": 88,
    "vision_end_token_id": 89,
}


@dataclass(frozen=True)
class Picture:
    """Inputs of one picture: tokens in the prompt, and pixels with what describes them."""

    tokens: int
    inputs: dict[str, Tensor]


def qwen_picture(patch: int, height: int, width: int) -> Picture:
    """A picture of height x width patches for Qwen-VL models, which merge 2 x 2 of them."""
    pixels = torch.randn(height * width, 3 * 2 * patch**2)
    grid = torch.tensor([[1, height, width]])
    return Picture(height * width // 4, {"pixel_values": pixels, "image_grid_thw": grid})


def qwen2_5_vl() -> tuple[Any, Picture]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    text = {**TEXT, "rope_parameters": rope}
    # Its heads have hidden_size / num_heads channels.
    text.pop("head_dim")
    config = AutoConfig.for_model("qwen2_5_vl", text_config=text, vision_config=vision, **QWEN_IDS)
    return config, qwen_picture(4, 4, 6)


def qwen3_vl() -> tuple[Any, Picture]:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    text = {**TEXT, "rope_parameters": {**rope, "mrope_interleaved": True}}
    config = AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision, **QWEN_IDS)
    return config, qwen_picture(4, 4, 6)


def internvl() -> tuple[Any, Picture]:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [16, 16],
        "patch_size": [4, 4],
    }
    config = AutoConfig.for_model(
        "internvl",
        text_config={**TEXT, "model_type": "qwen3"},
        vision_config=vision,
        image_token_id=IMAGE_ID,
    )
    return config, Picture(4, {"pixel_values": torch.randn(1, 3, 16, 16)})


def smolvlm() -> tuple[Any, Picture]:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = AutoConfig.for_model(
        "smolvlm",
        text_config={**TEXT, "model_type": "llama"},
        vision_config=vision,
        image_token_id=IMAGE_ID,
        scale_factor=2,
        pad_token_id=0,
    )
    return config, Picture(4, {"pixel_values": torch.randn(1, 1, 3, 16, 16)})


def language_model(model_type: str) -> tuple[Any, None]:
    return AutoConfig.for_model(model_type, **TEXT), None


WITH_PICTURES = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "smolvlm": smolvlm,
}
LANGUAGE_MODELS = ("llama", "qwen3")
FAMILIES = (*WITH_PICTURES, *LANGUAGE_MODELS)


def teacher_config(family: str) -> Any:
    return WITH_PICTURES[family]()[0] if family in WITH_PICTURES else language_model(family)[0]


def teacher(family: str, attention: str = "sdpa") -> Any:
    """A random teacher in eval mode, whose biases and norms matter."""
    config = teacher_config(family)
    auto = AutoModelForImageTextToText if family in WITH_PICTURES else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=attention).eval()
    return randomized(model)


def randomized(model: Any, seed: int = 0) -> Any:
    """The model with random parameters, all of which affect the output."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.6 / parameter.shape[-1] ** 0.5
            noise = torch.randn(parameter.shape, generator=rng) * scale
            parameter.copy_(noise + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def student(family: str, layers: Any = None, mixer: str = "mamba2", **options: Any) -> Any:
    """The student of a random teacher, with random values in the mixers' parameters too."""
    source = teacher(family, options.pop("attention", "sdpa"))
    num_layers = source.config.get_text_config().num_hidden_layers
    plan = StudentPlan.of_layers(num_layers, layers, mixer, options.pop("options", None))
    model = convert(source, plan, **options)
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in mixers_of(model):
            for _, _, parameter in module.new_parameters():
                noise = torch.randn(parameter.shape, generator=rng)
                parameter.add_(0.2 * noise.to(parameter))
    return model


def prompt(family: str, rows: int = 1, length: int = 9) -> dict[str, Tensor]:
    """Random text, in families with pictures one picture in each row."""
    torch.manual_seed(1)
    ids = torch.randint(3, 80, (rows, length))
    if family not in WITH_PICTURES:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(2)
    picture = WITH_PICTURES[family]()[1]
    image = torch.full((rows, picture.tokens), IMAGE_ID)
    start, end = torch.full((rows, 1), 88), torch.full((rows, 1), 89)
    ids = torch.cat((ids[:, :2], start, image, end, ids[:, 2:]), dim=1)
    pixels = {name: torch.cat([value] * rows) for name, value in picture.inputs.items()}
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if "image_grid_thw" in pixels:
        found["mm_token_type_ids"] = (ids == IMAGE_ID).long()
    return found


def copied(model: Any) -> Any:
    return copy.deepcopy(model)
