"""The processor: texts and pictures in, the model's inputs out.

Legend: B prompts of a batch, T tokens, N tiles of the whole batch, S side of a tile in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.processing.image_processor import ImageProcessor
from mmmamba_cli.processing.images import ImageSource
from mmmamba_cli.processing.template import (
    CHAT_TEMPLATE,
    GROUNDING_TOKENS,
    IMAGE_CONTEXT,
    IMAGE_PLACEHOLDER,
    REQUIRED_TOKENS,
    TEMPLATES,
    TURN_END,
    TURN_START,
    Message,
    Part,
    Special,
    as_messages,
    check_images,
    expand_images,
    render_chat,
    split_images,
)
from mmmamba_cli.processing.tiling import Tiling
from mmmamba_cli.processing.tokenizer import VOCABULARY_FILE, HolisticVLMTokenizer
from mmmamba_cli.processing.training import mark_answers

Conversation = str | Sequence[Message]
Images = ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource] | None]

# InternLM2's published stop ids have one more: an ordinary piece of its vocabulary.
INTERNLM2_TURN_END, INTERNLM2_EXTRA_STOP = 92542, 1163


class HolisticVLMProcessor(ProcessorMixin):
    """Tokenizer, tiling and chat template of one model, saved and loaded with it.

    `processor(text=..., images=...)` takes finished prompts, `processor.chat(...)` questions and
    conversations. Each picture becomes `min_tiles` to `max_tiles` tiles, with a thumbnail if there
    are several, of `tokens_per_tile` context tokens each.
    """

    image_token = IMAGE_PLACEHOLDER

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
            self._image_processor(None, None)
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
        """As transformers' own; a folder without a tokenizer is a `CheckpointError`."""
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            require_tokenizer(folder / VOCABULARY_FILE)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def image_token_id(self) -> int:
        """Id of `<IMG_CONTEXT>`, whose places the model fills with the tiles' tokens."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids at which an answer ends."""
        turn = self.tokenizer.convert_tokens_to_ids([TURN_END, TURN_START])
        extra = [INTERNLM2_EXTRA_STOP] if turn[0] == INTERNLM2_TURN_END else []
        return [self.tokenizer.eos_token_id, *turn, *extra]

    @property
    def image_processor(self) -> ImageProcessor:
        """What opens and cuts pictures, with this processor's settings."""
        return self._image_processor(None, None)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, "pixel_values"]

    def __call__(
        self,
        images: Images | None = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
        add_special_tokens: bool = True,
        min_tiles: int | None = None,
        max_tiles: int | None = None,
        return_num_tiles: bool = False,
    ) -> BatchFeature:
        """Encode one finished prompt, or a batch of them, with its pictures.

        Every `<image>` in a text stands for a picture. `images` is one picture, a list of them
        dealt out to the texts in order, or a list for each text. Special tokens in a text are
        taken for what they are, and the begin token is put in front unless
        `add_special_tokens=False`.

        Returns `input_ids` and `attention_mask` (B, T), int64, padded on the left, or lists with
        `return_tensors=None`; `pixel_values` (N, 3, S, S), float32, unless there are no pictures;
        with `return_num_tiles` also `num_tiles`, a list of the tiles of each picture, which
        `model(...)` does not take. `min_tiles` and `max_tiles` replace the processor's own for
        this call.

        Raises `DataError` if pictures and `<image>` do not match in number, or a picture cannot be
        used.
        """
        if text is None or videos is not None or audio is not None:
            raise DataError("the processor reads text and images", "pass text=... and images=...")
        texts = [text] if isinstance(text, str) else list(text)
        begin = [self.tokenizer.bos_token_id] if add_special_tokens else []
        ids, pixels, num_tiles = self._encode(
            [split_images(one) for one in texts],
            _deal_images(images, [one.count(IMAGE_PLACEHOLDER) for one in texts]),
            self._image_processor(min_tiles, max_tiles),
            typed_tokens=True,
        )
        batch = self._pad([begin + row for row in ids], padding, return_tensors)
        return _features(batch, pixels, num_tiles, return_num_tiles)

    def chat(
        self,
        conversation: Conversation | Sequence[Conversation],
        images: Images | None = None,
        *,
        system: str | None = None,
        add_generation_prompt: bool = True,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
        min_tiles: int | None = None,
        max_tiles: int | None = None,
        return_num_tiles: bool = False,
    ) -> BatchFeature:
        """Encode a question or conversation, or a list of them, with the chat template.

        A conversation is a question or a list of messages, see `as_messages`; `system` replaces
        the default system text of those without their own. Pictures that no `<image>` places come
        before the first user message. A list of conversations takes a list of lists of pictures.
        What messages say is text: special tokens typed in them have no power, except
        `GROUNDING_TOKENS`. All else, what is returned and what is raised, is as for calling the
        processor.
        """
        conversations, dealt = _deal_conversations(conversation, images)
        prompts = [
            render_chat(
                as_messages(one, len(pictures)),
                system=system,
                add_generation_prompt=add_generation_prompt,
            )
            for one, pictures in zip(conversations, dealt, strict=True)
        ]
        ids, pixels, num_tiles = self._encode(
            prompts, dealt, self._image_processor(min_tiles, max_tiles), typed_tokens=False
        )
        begin = [self.tokenizer.bos_token_id]
        batch = self._pad([begin + row for row in ids], padding, return_tensors)
        return _features(batch, pixels, num_tiles, return_num_tiles)

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id

    def conversation_ids(
        self, messages: Sequence[Message], num_tiles: Sequence[int] = ()
    ) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, as `chat` gives them, and which belong to an answer.

        `num_tiles` are the tiles of each picture, in order; pictures themselves are not needed.
        Raises `DataError` for messages that are none, or if pictures and `<image>` do not match.
        """
        parts = render_chat(as_messages(messages, len(num_tiles)), add_generation_prompt=False)
        check_images(parts, len(num_tiles))
        context = (count * self.tokens_per_tile for count in num_tiles)
        marked = mark_answers(
            expand_images(parts, context),
            lambda text: list(self._ids([text], typed_tokens=False)),
            self.tokenizer.convert_tokens_to_ids,
        )
        ids, is_answer = zip(*marked, strict=True)
        return [self.tokenizer.bos_token_id, *ids], [False, *is_answer]

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text behind the begin token."""
        return [self.tokenizer.bos_token_id, *self._ids([text], typed_tokens=False)]

    def _image_processor(self, min_tiles: int | None, max_tiles: int | None) -> ImageProcessor:
        return ImageProcessor(
            Tiling(
                image_size=self.image_size,
                min_tiles=self.min_tiles if min_tiles is None else min_tiles,
                max_tiles=self.max_tiles if max_tiles is None else max_tiles,
                use_thumbnail=self.use_thumbnail,
            )
        )

    def _encode(
        self,
        prompts: list[list[Part]],
        images: list[list[ImageSource]],
        image_processor: ImageProcessor,
        *,
        typed_tokens: bool,
    ) -> tuple[list[list[int]], Tensor, list[int]]:
        """Ids of each prompt, the tiles of all pictures, and how many each picture has.

        `typed_tokens`: special tokens that stand in a text are meant.
        """
        # Before any picture is opened, which takes longer.
        for parts, pictures in zip(prompts, images, strict=True):
            check_images(parts, len(pictures))
        pixels, num_tiles = image_processor(list(chain.from_iterable(images)))
        context = iter([count * self.tokens_per_tile for count in num_tiles])
        ids = [
            list(self._ids(expand_images(parts, context), typed_tokens=typed_tokens))
            for parts in prompts
        ]
        return ids, pixels, num_tiles

    def _ids(self, parts: Iterable[str | Special], *, typed_tokens: bool) -> Iterable[int]:
        tokenizer = self.tokenizer
        vocabulary = tokenizer.get_added_vocab()
        grounding = tuple(token for token in GROUNDING_TOKENS if token in vocabulary)
        for part in parts:
            if isinstance(part, Special):
                yield from [vocabulary[part.token]] * part.times
            elif typed_tokens:
                yield from tokenizer.convert_tokens_to_ids(tokenizer.tokenize(part))
            else:
                yield from tokenizer.encode_plain(part, keep=grounding)

    def _pad(
        self, ids: list[list[int]], padding: bool | str, return_tensors: str | None
    ) -> Mapping[str, Any]:
        return self.tokenizer.pad(
            {"input_ids": ids},
            padding=padding,
            return_attention_mask=True,
            return_tensors=return_tensors,
        )


def count_tokens_per_tile(image_size: int, patch_size: int, downsample_ratio: float) -> int:
    """(image_size / patch_size * downsample_ratio)^2: 256 for 448, 14 and 0.5.

    Raises `CheckpointError` if the squares of patches that become one token do not fill a tile.
    """
    grid, merge = image_size // patch_size, round(1 / downsample_ratio)
    if grid < 1 or grid % merge or abs(merge * downsample_ratio - 1) > 1e-6:
        raise CheckpointError(
            f"image_size {image_size}, patch_size {patch_size} and downsample_ratio "
            f"{downsample_ratio} give no whole number of tokens per tile"
        )
    return (grid // merge) ** 2


def require_tokenizer(file: Path | None) -> Path:
    """The tokenizer's file, if it is there; else `CheckpointError`."""
    if file is None or not file.is_file():
        where = "this model" if file is None else str(file.parent)
        raise CheckpointError(
            f"{where} has no tokenizer ({VOCABULARY_FILE}), so text cannot be read",
            f"copy the teacher's {VOCABULARY_FILE} and added_tokens.json there, or seed again "
            f"with --tokenizer FILE",
        )
    return file


def _features(
    batch: Mapping[str, Any], pixels: Tensor, num_tiles: list[int], return_num_tiles: bool
) -> BatchFeature:
    features = dict(batch)
    # The model refuses an empty tensor: without pictures there is none.
    if num_tiles:
        features["pixel_values"] = pixels
    if return_num_tiles:
        features["num_tiles"] = num_tiles
    return BatchFeature(features)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _as_list(images: Any) -> list[ImageSource]:
    """None, one picture or a list of them, as a list."""
    if images is None:
        return []
    return list(images) if _is_list(images) else [images]


def _deal_images(images: Any, wanted: list[int]) -> list[list[ImageSource]]:
    """A list of pictures for each text, of which text i has `wanted[i]` places."""
    listed = _as_list(images)
    if listed and any(_is_list(one) for one in listed):
        if len(listed) != len(wanted):
            raise DataError(f"there are {len(wanted)} texts and {len(listed)} lists of images")
        return [_as_list(one) for one in listed]
    if sum(wanted) != len(listed):
        raise DataError(
            f"the text has {sum(wanted)} {IMAGE_PLACEHOLDER} but {len(listed)} images are given",
            f"write {IMAGE_PLACEHOLDER} once for each image",
        )
    rest = iter(listed)
    return [[next(rest) for _ in range(count)] for count in wanted]


def _deal_conversations(
    conversation: Any, images: Any
) -> tuple[list[Conversation], list[list[ImageSource]]]:
    """Conversations and the pictures of each, from one of them or several."""
    if not isinstance(conversation, str) and not conversation:
        raise DataError("there is no conversation", "pass a question or at least one message")
    if isinstance(conversation, str) or isinstance(conversation[0], Mapping):
        pictures = _as_list(images)
        # `[[picture]]` for a single conversation, as transformers nests them.
        nested = len(pictures) == 1 and _is_list(pictures[0])
        return [conversation], [_as_list(pictures[0]) if nested else pictures]
    if images is None:
        return list(conversation), [[] for _ in conversation]
    if not _is_list(images) or len(images) != len(conversation):
        raise DataError(
            f"there are {len(conversation)} conversations, but images is not a list of as many "
            "lists of images"
        )
    return list(conversation), [_as_list(one) for one in images]
