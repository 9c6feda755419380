"""A teacher's own processor for training: prompts with answers marked, and inputs of its model.

Chat template, tiling, resolution and video frames are the processor's (`AutoProcessor` of
transformers, or a tokenizer where the model reads text only). Legend: B prompts, T columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerBase

from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.processing.answer_tokens import (
    Messages,
    answer_spans,
    find_answers,
    marks_answers,
    tokens_in,
)
from mmmamba_cli.processing.chat_template import (
    ImageSlot,
    Message,
    Turn,
    check_images,
    to_turns,
)
from mmmamba_cli.processing.picture_tokens import SIZE_ERRORS, PictureTokens, Size, first_line

# Packages that processors of transformers need and transformers does not.
OPTIONAL_PACKAGES = ("torchvision", "num2words", "mistral-common")
# Inputs that a model's forward does not take.
NOT_INPUTS = ("offset_mapping", "text_replacement_offsets", "video_metadata")


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as text, with one placeholder for each picture.

    ids, is_answer: its tokens before pictures replace the placeholders, and which are answers.
    tail: number of tokens after the last placeholder.
    """

    text: str
    ids: list[int]
    is_answer: list[bool]
    tail: int


class TeacherProcessor:
    """A processor or tokenizer of transformers, as training data needs it.

    Raises:
        CheckpointError: it has no tokenizer, or no padding and no end token.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        tokenizer = getattr(processor, "tokenizer", processor)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise CheckpointError(
                f"a {type(processor).__name__} has no tokenizer", "take the teacher's processor"
            )
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise CheckpointError(
                    "the tokenizer has neither an end token nor a padding token",
                    "name one in its tokenizer_config.json",
                )
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self.takes_images = getattr(processor, "image_processor", None) is not None
        self.picture_tokens = PictureTokens(self._measure, processor)

    @cached_property
    def chat_template(self) -> str:
        """The template of conversations. Raises `CheckpointError` if there is none."""
        template = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        if not isinstance(template, str):
            raise CheckpointError(
                "the teacher has no chat template, so it cannot read conversations",
                "add chat_template.jinja to its folder, or give data of plain texts",
            )
        return template

    def render(self, messages: Sequence[Message], num_images: int) -> RenderedPrompt:
        """Render a conversation, its answers marked.

        `messages` are those of a `Sample`: `<image>` in a user's plain text is a picture. Pictures
        without a place come before the first question.

        Raises:
            DataError: more or fewer places than pictures, a control token in a text, or a
                conversation that the template does not take.
        """
        turns = place_slots(messages, num_images)
        check_images([part for turn in turns for part in turn.content], num_images)
        if num_images and not self.takes_images:
            raise DataError("the sample has an image, and the model reads text only")
        self._refuse_control_tokens(turns)
        listed = [self._message(turn) for turn in turns]
        text = self._with_begin_token(self._rendered(listed, False))
        if marks_answers(self.chat_template):
            ids, is_answer = self._marked(listed)
            # The token that a tokenizer adds before a text.
            begun = self._ids(text)
            is_answer = [False] * (len(begun) - len(ids)) + is_answer
            return self._prompt(text, begun, is_answer)
        shift = len(text) - len(self._rendered(listed, False))
        spans = answer_spans(
            listed,
            text[shift:],
            self._rendered,
            self._special_tokens.values(),
        )
        ids, offsets = self._ids_and_offsets(text)
        moved = [(start + shift, end + shift) for start, end in spans]
        return self._prompt(text, ids, tokens_in(moved, offsets))

    def render_text(self, text: str) -> RenderedPrompt:
        """A plain text, of which every token after the first is learned.

        Raises:
            DataError: it has no tokens.
        """
        begun = self._with_begin_token(text)
        ids = self._ids(begun)
        if not ids:
            raise DataError("the text has no tokens")
        return self._prompt(begun, ids, [False] + [True] * (len(ids) - 1))

    def length(self, prompt: RenderedPrompt, sizes: Sequence[Size]) -> int:
        """Tokens of a prompt with pictures of these sizes. Raises `DataError` for a size."""
        return len(prompt.ids) + (self.picture_tokens.count(sizes) if sizes else 0)

    def inputs(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, Tensor]:
        """The inputs of the model's forward for prompts and their pictures, padded on the right.

        Returns:
            `input_ids` and `attention_mask` (B, T), and what else the processor makes.

        Raises:
            DataError: the processor does not take a prompt or a picture.
        """
        options: dict[str, Any] = {
            "padding": True,
            "padding_side": "right",
            "return_tensors": "pt",
            "add_special_tokens": False,
        }
        try:
            if not any(images):
                made = self.processor(text=list(texts), **options)
            else:
                nested = [list(pictures) for pictures in images]
                made = self.processor(text=list(texts), images=nested, **options)
        except SIZE_ERRORS as error:
            raise DataError(f"the processor does not take it: {first_line(error)}") from error
        return {
            name: torch.as_tensor(value) for name, value in made.items() if name not in NOT_INPUTS
        }

    def answers(self, prompt: RenderedPrompt, ids: Sequence[int]) -> list[bool]:
        """Answer tokens among the processor's `ids` of a prompt. Raises `DataError`."""
        if list(ids) == prompt.ids:
            return prompt.is_answer
        found = find_answers(prompt.ids, prompt.is_answer, ids)
        if found is None:
            raise DataError(
                "its answers are not found among the tokens of the teacher's processor, which "
                "changes more than the places of its pictures"
            )
        return found

    def _prompt(self, text: str, ids: list[int], is_answer: list[bool]) -> RenderedPrompt:
        places = [i for i, token in enumerate(ids) if token in self._picture_ids]
        return RenderedPrompt(text, ids, is_answer, len(ids) - places[-1] - 1 if places else 0)

    def _message(self, turn: Turn) -> dict[str, Any]:
        """A turn for the template: parts for a processor with pictures, else a string."""
        if not self.takes_images:
            return {"role": turn.role, "content": "".join(map(str, turn.content))}
        parts = [
            {"type": "image"} if isinstance(part, ImageSlot) else {"type": "text", "text": part}
            for part in turn.content
        ]
        return {"role": turn.role, "content": parts}

    def _rendered(self, messages: Messages, opens_answer: bool) -> str:
        if not messages:
            return ""
        try:
            return self.processor.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=opens_answer,
            )
        except TemplateError as error:
            raise DataError(f"the chat template does not take the conversation: {error}") from error

    def _marked(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Ids, and the answer tokens that the template marks."""
        try:
            made = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except TemplateError as error:
            raise DataError(f"the chat template does not take the conversation: {error}") from error
        return list(made["input_ids"]), [bool(value) for value in made["assistant_masks"]]

    def _with_begin_token(self, text: str) -> str:
        begin = self._begin_token
        return text if not begin or text.startswith(begin) else begin + text

    @cached_property
    def _begin_token(self) -> str:
        """The token that the tokenizer adds before a text; empty if it adds none."""
        added, plain = (
            self.tokenizer("a", add_special_tokens=value)["input_ids"] for value in (True, False)
        )
        begin = self.tokenizer.bos_token
        has_begin = begin and added[:1] == [self.tokenizer.bos_token_id] != plain[:1]
        return begin if has_begin else ""

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids_and_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if not self.tokenizer.is_fast:
            raise CheckpointError(
                "the tokenizer cannot tell where its tokens are in a text, so that answers are not "
                "found",
                "use its fast class (tokenizer.json), or a chat template that has {% generation %}",
            )
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(made["input_ids"]), [(start, end) for start, end in made["offset_mapping"]]

    @cached_property
    def _special_tokens(self) -> dict[int, str]:
        added = self.tokenizer.added_tokens_decoder
        return {index: str(token) for index, token in added.items() if token.special}

    @cached_property
    def _picture_ids(self) -> frozenset[int]:
        """Special tokens that only pictures bring into a prompt: placeholders and their marks."""
        if not self.takes_images:
            return frozenset()
        without, placed = (set(self._ids(self._probe(count))) for count in (0, 1))
        blank = Image.new("RGB", (56, 56))
        expanded = self.inputs([self._probe(1)], [[blank]])["input_ids"][0].tolist()
        return frozenset(((placed | set(expanded)) - without) & set(self._special_tokens))

    @cached_property
    def _control_tokens(self) -> dict[str, str]:
        """Tokens that a text must not write, with what they stand for."""
        if not self.tokenizer.chat_template and not getattr(self.processor, "chat_template", None):
            return {}
        probe = self._ids(self._probe(0))
        found = dict.fromkeys(
            (text for index, text in self._special_tokens.items() if index in probe),
            "the chat template writes",
        )
        pictures = (self._special_tokens[index] for index in self._picture_ids)
        return found | dict.fromkeys(pictures, "stands for a picture")

    def _probe(self, num_images: int) -> str:
        """A short rendered conversation with pictures."""
        content: tuple[str | ImageSlot, ...] = (*[ImageSlot()] * num_images, "a")
        turns = [Turn("user", content), Turn("assistant", ("b",))]
        return self._with_begin_token(
            self._rendered([self._message(turn) for turn in turns], False)
        )

    def _measure(self, sizes: Sequence[Size]) -> int:
        """Tokens that blank pictures of these sizes add to a prompt."""
        text = self._probe(len(sizes))
        blanks = [Image.new("RGB", size) for size in sizes]
        return int(self.inputs([text], [blanks])["input_ids"].shape[1]) - len(self._ids(text))

    def _refuse_control_tokens(self, turns: Sequence[Turn]) -> None:
        for number, turn in enumerate(turns, start=1):
            for part in turn.content:
                for token, what in self._control_tokens.items():
                    if isinstance(part, str) and token in part:
                        raise DataError(
                            f"turn {number} writes {token}, a token that {what}; leave it out"
                        )


def place_slots(messages: Sequence[Message], num_images: int) -> list[Turn]:
    """Turns with a slot for each picture, as a chat template of another model wants them.

    The line breaks that LLaVA's format writes between leading or trailing `<image>` and the text
    are left out: a chat template writes its own. Pictures without a place come first.
    """
    turns = to_turns(messages, 0, placeholders=True)
    turns = [Turn(turn.role, tuple(_without_breaks(turn.content))) for turn in turns]
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is not None and num_images and not any(turn.slots for turn in turns):
        turns[first] = Turn("user", (*[ImageSlot()] * num_images, *turns[first].content))
    return turns


def _without_breaks(content: Sequence[str | ImageSlot]) -> list[str | ImageSlot]:
    if not any(isinstance(part, ImageSlot) for part in content):
        return list(content)
    parts = list(content)
    for order, strip in ((1, str.removeprefix), (-1, str.removesuffix)):
        parts = parts[::order]
        seen_slot = False
        for i, part in enumerate(parts):
            if isinstance(part, ImageSlot):
                seen_slot = True
            elif seen_slot:
                parts[i] = strip(part, "\n")
            if not isinstance(parts[i], ImageSlot) and parts[i]:
                break
        parts = parts[::order]
    return [part for part in parts if part != ""]


def open_teacher_processor(folder: Path) -> TeacherProcessor:
    """The processor in the folder of a teacher or its student; a tokenizer where it has no other.

    Raises:
        CheckpointError: there is none, it cannot be read, or it needs a package that is missing.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # The tokenizers library raises plain `Exception` for an unreadable file.
        packages = [name for name in OPTIONAL_PACKAGES if name in str(error).lower()]
        if packages and isinstance(error, ImportError | ValueError):
            raise CheckpointError(
                f"the processor of {folder} needs {' and '.join(packages)}",
                f"pip install {' '.join(packages)}",
            ) from error
        raise CheckpointError(
            f"the processor of {folder} cannot be read: {first_line(error)}",
            "take preprocessor_config.json, processor_config.json and the tokenizer's files from "
            "where the model came from",
        ) from error
    return TeacherProcessor(processor)
