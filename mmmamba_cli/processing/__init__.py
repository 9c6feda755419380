"""Preprocessing of text and images: tokenizer, tiling, chat template and processor."""

from typing import Any

from transformers import AutoProcessor, AutoTokenizer

from mmmamba_cli.processing.chat_template import content_with_images
from mmmamba_cli.processing.detokenizer import TextStream
from mmmamba_cli.processing.family_prompts import place_inputs
from mmmamba_cli.processing.image_processor import ImageProcessor
from mmmamba_cli.processing.images import ImageSource, image_size, open_image
from mmmamba_cli.processing.picture_limit import takes_max_tiles, with_max_tiles
from mmmamba_cli.processing.processor import (
    HolisticVLMProcessor,
    TrainingProcessor,
    count_tokens_per_tile,
)
from mmmamba_cli.processing.processor_digest import processor_digest
from mmmamba_cli.processing.processor_loader import (
    as_id_set,
    build_tokenizer,
    isolated,
    processor_from_folder,
    processor_from_hovle,
    processor_from_language_model,
)
from mmmamba_cli.processing.teacher_processor import (
    RenderedPrompt,
    TeacherProcessor,
)
from mmmamba_cli.processing.teacher_processor_loader import open_teacher_processor
from mmmamba_cli.processing.text_processor import HolisticTextProcessor, TextOnlyMarker
from mmmamba_cli.processing.tiling import Tiling, choose_grid, count_tiles, normalize
from mmmamba_cli.processing.tokenizer import HolisticVLMTokenizer
from mmmamba_cli.processing.video_frames import VideoFrames


def register_processing(config_class: type[Any]) -> None:
    """Register tokenizer and processors with transformers' Auto classes for `config_class`."""
    AutoTokenizer.register(config_class, HolisticVLMTokenizer, exist_ok=True)
    AutoProcessor.register(config_class, HolisticVLMProcessor, exist_ok=True)
    AutoProcessor.register(TextOnlyMarker, HolisticTextProcessor, exist_ok=True)


__all__ = [
    "HolisticTextProcessor",
    "HolisticVLMProcessor",
    "HolisticVLMTokenizer",
    "ImageProcessor",
    "ImageSource",
    "RenderedPrompt",
    "TeacherProcessor",
    "TextStream",
    "Tiling",
    "TrainingProcessor",
    "VideoFrames",
    "as_id_set",
    "build_tokenizer",
    "choose_grid",
    "content_with_images",
    "count_tiles",
    "count_tokens_per_tile",
    "image_size",
    "isolated",
    "normalize",
    "open_image",
    "open_teacher_processor",
    "place_inputs",
    "processor_digest",
    "processor_from_folder",
    "processor_from_hovle",
    "processor_from_language_model",
    "register_processing",
    "takes_max_tiles",
    "with_max_tiles",
]
