"""The processor class of each family over a tokenizer of `teacher_tokenizers`.

Image processors work on PIL images where torchvision is absent. Three things need more, and have a
stand-in without it: a video processor (`NoVideoProcessor`), `PixtralProcessor`
(`PixtralProcessorOnPil`) and `SmolVLMProcessor`, which needs num2words too (the older
`Idefics3Processor`, which the first SmolVLM was released with).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import transformers
from PIL import Image
from teacher_tokenizers import tokenizer_of
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor

HAS_TORCHVISION = find_spec("torchvision") is not None
HAS_SMOLVLM_PROCESSOR = HAS_TORCHVISION and find_spec("num2words") is not None
# Pixels.
PATCH = 4
TILE = 16
TILE_SIZE = {"height": TILE, "width": TILE}
LLAVA_GRID_PINPOINTS = [[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE]]
PIXTRAL_SIZES = {
    "patch_size": {"height": PATCH, "width": PATCH},
    "size": {"longest_edge": 2 * TILE},
}


class NoVideoProcessor(BaseVideoProcessor):
    """Takes the place of a video processor in a processor that only sees pictures."""

    def __init__(self) -> None:
        """Every video processor of transformers needs torchvision to be constructed."""

    def __call__(self, *videos: object, **options: object) -> None:
        raise NotImplementedError("videos need torchvision")


def family_class(name: str) -> Callable[..., Any]:
    """A class of transformers; an image processor's PIL form where torchvision is absent."""
    if name.endswith("ImageProcessor") and not HAS_TORCHVISION:
        name += "Pil"
    return getattr(transformers, name)


def video_processor(name: str, **options: Any) -> BaseVideoProcessor:
    return family_class(name)(**options) if HAS_TORCHVISION else NoVideoProcessor()


def processor_class(name: str) -> Callable[..., ProcessorMixin]:
    """A processor class; without torchvision one that does not check its parts' classes.

    The check looks a video processor's class up in a table that needs torchvision to be imported.
    """
    stock = getattr(transformers, name)
    if HAS_TORCHVISION:
        return stock
    return type(name, (stock,), {"check_argument_for_proper_class": lambda self, name, part: None})


def _qwen_vl(processor: str, video: str, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    # Areas in pixels: a picture becomes 4 to 16 merged patches.
    size = {"shortest_edge": 16 * PATCH**2, "longest_edge": 64 * PATCH**2}
    patches = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
    # A video's areas count all of its frames.
    video_size = {"shortest_edge": 16 * PATCH**2, "longest_edge": 256 * PATCH**2}
    return processor_class(processor)(
        image_processor=family_class("Qwen2VLImageProcessor")(size=size, **patches),
        tokenizer=tokenizer,
        video_processor=video_processor(video, size=video_size, **patches),
        chat_template=tokenizer.chat_template,
    )


def qwen2_5_vl(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    return _qwen_vl("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", tokenizer)


def qwen3_vl(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    return _qwen_vl("Qwen3VLProcessor", "Qwen3VLVideoProcessor", tokenizer)


def internvl(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    return processor_class("InternVLProcessor")(
        image_processor=family_class("GotOcr2ImageProcessor")(
            size=TILE_SIZE, crop_to_patches=True, min_patches=1, max_patches=3
        ),
        tokenizer=tokenizer,
        video_processor=video_processor("InternVLVideoProcessor", size=TILE_SIZE),
        image_seq_length=(TILE // PATCH // 2) ** 2,
        chat_template=tokenizer.chat_template,
    )


def llava_onevision(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    return processor_class("LlavaOnevisionProcessor")(
        image_processor=family_class("LlavaOnevisionImageProcessor")(
            size=TILE_SIZE, image_grid_pinpoints=LLAVA_GRID_PINPOINTS
        ),
        tokenizer=tokenizer,
        video_processor=video_processor("LlavaOnevisionVideoProcessor", size=TILE_SIZE),
        num_image_tokens=(TILE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )


def _smolvlm_parts(image_processor: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    try:
        images = family_class(image_processor)(
            size={"longest_edge": 2 * TILE}, max_image_size={"longest_edge": TILE}
        )
    except ImportError:
        pytest.skip(f"{image_processor}: transformers {transformers.__version__} needs torchvision")
    return {
        "image_processor": images,
        "tokenizer": tokenizer,
        "image_seq_len": (TILE // PATCH // 2) ** 2,
        "chat_template": tokenizer.chat_template,
    }


def smolvlm(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    parts = _smolvlm_parts("SmolVLMImageProcessor", tokenizer)
    if not HAS_SMOLVLM_PROCESSOR:
        return transformers.Idefics3Processor(**parts)
    longest = {"longest_edge": TILE}
    video = video_processor(
        "SmolVLMVideoProcessor", size=longest, max_image_size=longest, num_frames=4, fps=1
    )
    return transformers.SmolVLMProcessor(video_processor=video, **parts)


def idefics3(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    return transformers.Idefics3Processor(**_smolvlm_parts("Idefics3ImageProcessor", tokenizer))


class PixtralProcessorOnPil:
    """What `PixtralProcessor` does with pictures and text, without torchvision.

    A picture of H x W merged patches becomes H rows of W `[IMG]`; `[IMG_BREAK]` ends a row,
    `[IMG_END]` the last one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.patch = 2 * PATCH
        self.apply_chat_template = tokenizer.apply_chat_template
        self.save_pretrained = tokenizer.save_pretrained
        self.image_processor = transformers.PixtralImageProcessorPil(**PIXTRAL_SIZES)

    def __call__(
        self,
        text: list[str],
        images: list[list[Image.Image]] | None = None,
        padding: bool = False,
        return_tensors: str = "pt",
        padding_side: str = "left",
        add_special_tokens: bool = False,
    ) -> transformers.BatchFeature:
        pictures = {}
        if images is not None:
            flat = [picture for row in images for picture in row]
            pictures = dict(
                self.image_processor(flat, patch_size=self.patch, return_tensors=return_tensors)
            )
            runs = iter([self._tokens(*size) for size in pictures["image_sizes"].tolist()])
            text = ["".join(self._expanded(row, runs)) for row in text]
        tokens = self.tokenizer(
            text,
            padding=padding,
            padding_side=padding_side,
            return_tensors=return_tensors,
            add_special_tokens=add_special_tokens,
        )
        return transformers.BatchFeature({**tokens, **pictures})

    def _expanded(self, text: str, runs: Iterator[str]) -> list[str]:
        first, *others = text.split("[IMG]")
        return [first, *(part for other in others for part in (next(runs), other))]

    def _tokens(self, height: int, width: int) -> str:
        row = "[IMG]" * (width // self.patch) + "[IMG_BREAK]"
        return (row * (height // self.patch)).removesuffix("[IMG_BREAK]") + "[IMG_END]"


def mistral3(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin | PixtralProcessorOnPil:
    if not HAS_TORCHVISION:
        return PixtralProcessorOnPil(tokenizer)
    return transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(**PIXTRAL_SIZES),
        tokenizer=tokenizer,
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=tokenizer.chat_template,
    )


def gemma3(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    return transformers.Gemma3Processor(
        image_processor=family_class("Gemma3ImageProcessor")(size=TILE_SIZE),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )


@cache
def processor_of(family: str) -> Any:
    """The processor of a family of `families.FAMILIES` that takes pictures."""
    makers = {
        "qwen2_5_vl": qwen2_5_vl,
        "qwen3_vl": qwen3_vl,
        "internvl": internvl,
        "llava_onevision": llava_onevision,
        "smolvlm": smolvlm,
        "idefics3": idefics3,
        "mistral3": mistral3,
        "ministral3": mistral3,
        "gemma3": gemma3,
    }
    return makers[family](tokenizer_of(family))
