"""Processor of a vision-language model: text and images to model inputs.

Legend: B prompts of a batch, T tokens, N tiles of the whole batch, S side of a tile in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData, Unpack

from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.processing.chat_template import (
    CHAT_TEMPLATE,
    GROUNDING_TOKENS,
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_PLACEHOLDER,
    IMAGE_START,
    REQUIRED_TOKENS,
    TEMPLATES,
    TURN_END,
    TURN_START,
    ConversationInput,
    Message,
    PromptPart,
    SpecialToken,
    check_images,
    expand_images,
    mark_answers,
    render_chat,
    split_images,
    to_turns,
)
from mmmamba_cli.processing.image_processor import ImageProcessor, to_requested_type
from mmmamba_cli.processing.images import (
    ImagesInput,
    ImageSource,
    fill_slots,
    split_images_by_conversation,
    split_images_by_text,
)
from mmmamba_cli.processing.processor_kwargs import (
    HolisticVLMProcessorKwargs,
    merge_kwargs,
    pad_rows,
    truncate,
)
from mmmamba_cli.processing.tiling import count_tiles
from mmmamba_cli.processing.tokenizer import VOCABULARY_FILE, HolisticVLMTokenizer

ACCEPTED_INPUTS = "text and images"
# InternLM2's published stop ids include an ordinary piece of its vocabulary.
INTERNLM2_TURN_END, INTERNLM2_EXTRA_STOP = 92542, 1163


class TrainingProcessor(Protocol):
    """Methods of a processor that training data is prepared with."""

    @property
    def image_processor(self) -> ImageProcessor | None:
        """None for a model without vision."""
        ...

    @property
    def pad_token_id(self) -> int: ...

    def conversation_ids(
        self, messages: Sequence[Message], num_tiles: Sequence[int]
    ) -> tuple[list[int], list[bool]]: ...

    def text_ids(self, text: str) -> list[int]: ...


class HolisticVLMProcessor(ProcessorMixin):
    """Tokenizer, tiling and chat template of a model, saved and loaded with it.

    `processor(text=..., images=...)` takes finished prompts, `processor.chat(...)` questions and
    conversations. An image becomes `min_tiles` to `max_tiles` tiles, plus a thumbnail if there are
    several, of `tokens_per_tile` context tokens each.
    """

    image_token = IMAGE_PLACEHOLDER
    valid_processor_kwargs = HolisticVLMProcessorKwargs

    def __init__(
        self,
        tokenizer: HolisticVLMTokenizer,
        image_size: int | None = None,
        patch_size: int | None = None,
        downsample_ratio: float | None = None,
        min_tiles: int = 1,
        max_tiles: int = 12,
        use_thumbnail: bool = True,
        template: str = TEMPLATES[0],
        chat_template: str | None = None,
    ):
        if image_size is None or patch_size is None or downsample_ratio is None:
            raise CheckpointError(
                "the processor needs image_size, patch_size and downsample_ratio",
                "they belong in processor_config.json beside the tokenizer",
            )
        if template not in TEMPLATES:
            known = ", ".join(TEMPLATES)
            raise CheckpointError(f"chat template {template!r} is not known, allowed is {known}")
        missing = [token for token in REQUIRED_TOKENS if token not in tokenizer.get_added_vocab()]
        if missing:
            raise CheckpointError(f"the tokenizer has no special tokens {', '.join(missing)}")
        self.image_size = image_size
        self.patch_size = patch_size
        self.downsample_ratio = downsample_ratio
        self.min_tiles = min_tiles
        self.max_tiles = max_tiles
        self.use_thumbnail = use_thumbnail
        self.template = template
        try:
            self.image_processor  # noqa: B018
        except DataError as error:
            raise CheckpointError(error.message) from error
        self.tokens_per_tile = count_tokens_per_tile(image_size, patch_size, downsample_ratio)
        chat_template = chat_template or CHAT_TEMPLATE
        if tokenizer.chat_template is None:
            tokenizer.chat_template = chat_template
        super().__init__(tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> HolisticVLMProcessor:
        """Load as in transformers; `CheckpointError` for a folder without a tokenizer."""
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            require_tokenizer(folder / VOCABULARY_FILE)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def image_token_id(self) -> int:
        """Id of `<IMG_CONTEXT>`, which the model replaces by image tokens."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer."""
        turn = self.tokenizer.convert_tokens_to_ids([TURN_END, TURN_START])
        extra = [INTERNLM2_EXTRA_STOP] if turn[0] == INTERNLM2_TURN_END else []
        return [self.tokenizer.eos_token_id, *turn, *extra]

    @property
    def image_processor(self) -> ImageProcessor:
        """Image processor with this processor's settings."""
        return ImageProcessor(self.image_size, self.min_tiles, self.max_tiles, self.use_thumbnail)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, "pixel_values"]

    def __call__(
        self,
        images: ImagesInput | None = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Unpack[HolisticVLMProcessorKwargs],
    ) -> BatchFeature:
        """Encode a finished prompt, or a batch of prompts, with images.

        Every `<image>` in a text is a slot. `images` is one image, a list assigned to the slots of
        all texts in order, or a list for each text. Special tokens in a text are parsed. The begin
        token is prepended to a text that does not start with it, unless `add_special_tokens=False`.

        Keywords for text are transformers' (`padding`, `truncation`, `max_length`, `padding_side`,
        `return_tensors`, ...), passed directly or in `text_kwargs`. Keywords for images are
        `min_tiles`, `max_tiles` and `return_num_tiles`, passed directly or in `images_kwargs`.

        Returns `input_ids` and `attention_mask` (B, T), int64, padded on the left, or lists with
        `return_tensors=None`; with images `pixel_values` (N, 3, S, S), float32; with
        `return_num_tiles` also `num_tiles`, the number of tiles of each image, which `model(...)`
        does not take.

        Raises:
            DataError: the numbers of images and `<image>` differ, an image cannot be used, or
                truncation would cut one.
            TypeError: an unknown keyword.
            ValueError: a keyword passed twice.
        """
        options = merge_kwargs(self, kwargs, ACCEPTED_INPUTS)
        if text is None:
            raise DataError(
                f"the processor reads {ACCEPTED_INPUTS}", "pass text=... and images=..."
            )
        texts = [text] if isinstance(text, str) else list(text)
        return self._encode(
            [split_images(one) for one in texts],
            split_images_by_text(images, [one.count(IMAGE_PLACEHOLDER) for one in texts]),
            options,
            [one.startswith(self.tokenizer.bos_token) for one in texts],
            typed_tokens=True,
        )

    def chat(
        self,
        conversation: ConversationInput | Sequence[ConversationInput],
        images: ImagesInput | None = None,
        *,
        system: str | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Unpack[HolisticVLMProcessorKwargs],
    ) -> BatchFeature:
        """Encode a question or conversation, or a list of them, with the chat template.

        A conversation is a question or a list of messages, see `to_turns`; `system` replaces the
        default system text of conversations without one. Images without a slot go before the first
        user message. A list of conversations takes a list of lists of images. Special tokens typed
        in messages are text, except `GROUNDING_TOKENS`; `<image>` is text in a content part and in
        a conversation without images. Keywords, returns and errors are those of `__call__`.
        """
        options = merge_kwargs(self, kwargs, ACCEPTED_INPUTS)
        conversations, dealt = split_images_by_conversation(conversation, images)
        prompts = [
            render_chat(
                to_turns(one, len(pictures)),
                system=system,
                add_generation_prompt=add_generation_prompt,
            )
            for one, pictures in zip(conversations, dealt, strict=True)
        ]
        pictures = [fill_slots(parts, given) for parts, given in zip(prompts, dealt, strict=True)]
        return self._encode(prompts, pictures, options, [False] * len(prompts), typed_tokens=False)

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id

    def conversation_ids(
        self, messages: Sequence[Message], num_tiles: Sequence[int] = ()
    ) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, as `chat` encodes it, and whether each belongs to an answer.

        `num_tiles` holds the number of tiles of each image, in order; the images are not needed. As
        in training data, every `<image>` in the user's plain strings is a slot; in content parts it
        is text.

        Raises:
            DataError: invalid messages, or the numbers of images and slots differ.
        """
        marked = mark_answers(
            self._conversation_parts(messages, num_tiles),
            lambda text: list(self._ids([text], typed_tokens=False)),
            self.tokenizer.convert_tokens_to_ids,
        )
        ids, is_answer = zip(*marked, strict=True)
        return [self.tokenizer.bos_token_id, *ids], [False, *is_answer]

    def conversation_length(
        self, messages: Sequence[Message], num_tiles: Sequence[int] = ()
    ) -> tuple[int, int]:
        """Number of ids of `conversation_ids`, and of those up to the end of the last image (or 0).

        Several times as fast. Raises the errors of `conversation_ids`.
        """
        tokenizer, grounding = self.tokenizer, self._grounding_tokens()
        length, image_end = 1, 0
        for part in self._conversation_parts(messages, num_tiles):
            if isinstance(part, str):
                length += tokenizer.count_plain(part, keep=grounding)
                continue
            length += part.times
            if part.token == IMAGE_CONTEXT:
                image_end = length
        return length, image_end

    def _conversation_parts(
        self, messages: Sequence[Message], num_tiles: Sequence[int]
    ) -> Iterator[str | SpecialToken]:
        turns = to_turns(messages, len(num_tiles), placeholders=True)
        parts = render_chat(turns, add_generation_prompt=False)
        check_images(parts, len(num_tiles))
        return expand_images(parts, (count * self.tokens_per_tile for count in num_tiles))

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text, after the begin token."""
        return [self.tokenizer.bos_token_id, *self._ids([text], typed_tokens=False)]

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Context tokens of images of the given (height, width); called by serving engines."""
        tiling = self.image_processor.with_tile_limits(
            kwargs.get("min_tiles"), kwargs.get("max_tiles")
        ).tiling
        if image_sizes is None:
            return MultiModalData()
        tiles = [count_tiles(width, height, tiling) for height, width in image_sizes]
        tokens = [count * self.tokens_per_tile for count in tiles]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=tiles)

    def _encode(
        self,
        prompts: Sequence[Sequence[PromptPart]],
        images: list[list[ImageSource]],
        options: tuple[dict[str, Any], dict[str, Any]],
        begun: list[bool],
        *,
        typed_tokens: bool,
    ) -> BatchFeature:
        """Encode all prompts and images; `begun` marks prompts that start with the begin token.

        `typed_tokens`: parse special tokens in text.
        """
        text_kwargs, image_kwargs = options
        # Checked first, since opening images is slower.
        for parts, pictures in zip(prompts, images, strict=True):
            check_images(parts, len(pictures))
        tiler = self.image_processor.with_tile_limits(
            image_kwargs.get("min_tiles"), image_kwargs.get("max_tiles")
        )
        pixels, num_tiles = tiler.tile(list(chain.from_iterable(images)))
        context = iter([count * self.tokens_per_tile for count in num_tiles])
        of_pictures = self.tokenizer.convert_tokens_to_ids([IMAGE_START, IMAGE_CONTEXT, IMAGE_END])
        added = text_kwargs.get("add_special_tokens")
        rows = []
        for parts, has_begin, pictures in zip(prompts, begun, images, strict=True):
            begins = (added is None or added) and not has_begin
            begin = [self.tokenizer.bos_token_id] if begins else []
            row = list(self._ids(expand_images(parts, context), typed_tokens=typed_tokens))
            whole = of_pictures if pictures else ()
            rows.append(begin + truncate(self.tokenizer, row, text_kwargs, len(begin), whole))
        features = pad_rows(self.tokenizer, rows, text_kwargs, self.image_token_id)
        # Left out without images, instead of an empty tensor.
        if num_tiles:
            features["pixel_values"] = to_requested_type(pixels, image_kwargs.get("return_tensors"))
        if image_kwargs.get("return_num_tiles"):
            features["num_tiles"] = num_tiles
        return BatchFeature(features)

    def _ids(self, parts: Iterable[str | SpecialToken], *, typed_tokens: bool) -> Iterable[int]:
        tokenizer = self.tokenizer
        vocabulary, grounding = tokenizer.get_added_vocab(), self._grounding_tokens()
        for part in parts:
            if isinstance(part, SpecialToken):
                yield from [vocabulary[part.token]] * part.times
            elif typed_tokens:
                yield from tokenizer.convert_tokens_to_ids(tokenizer.tokenize(part))
            else:
                yield from tokenizer.encode_plain(part, keep=grounding)

    def _grounding_tokens(self) -> tuple[str, ...]:
        """The grounding tokens that the tokenizer has."""
        vocabulary = self.tokenizer.get_added_vocab()
        return tuple(token for token in GROUNDING_TOKENS if token in vocabulary)


def count_tokens_per_tile(image_size: int, patch_size: int, downsample_ratio: float) -> int:
    """(image_size / patch_size * downsample_ratio)^2: 256 for 448, 14 and 0.5.

    Raises `CheckpointError` if squares of patches, one per token, do not fill a tile.
    """
    grid, merge = image_size // patch_size, round(1 / downsample_ratio)
    if grid < 1 or grid % merge or abs(merge * downsample_ratio - 1) > 1e-6:
        raise CheckpointError(
            f"image_size {image_size}, patch_size {patch_size} and downsample_ratio "
            f"{downsample_ratio} give no whole number of tokens per tile"
        )
    return (grid // merge) ** 2


def require_tokenizer(file: Path | None) -> Path:
    """Return the tokenizer file; raise `CheckpointError` if it is missing."""
    if file is None or not file.is_file():
        where = "this model" if file is None else str(file.parent)
        raise CheckpointError(
            f"{where} has no tokenizer ({VOCABULARY_FILE}), so text cannot be read",
            f"copy the teacher's {VOCABULARY_FILE} and added_tokens.json there, or seed again "
            f"with --tokenizer FILE",
        )
    return file
