"""A teacher's own processor for training: prompts with answers marked, and inputs of its model.

Chat template, tiling, resolution and video frames are the processor's (`AutoProcessor` of
transformers, or a tokenizer where the model reads text only). Legend: B prompts, T columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.processing.answer_tokens import (
    Messages,
    answer_spans,
    find_answers,
    marks_answers,
    tokens_in,
)
from mmmamba_cli.processing.chat_template import Message
from mmmamba_cli.processing.picture_tokens import SIZE_ERRORS, PictureTokens, Size, first_line
from mmmamba_cli.processing.prompt_turns import PromptTurn, Slot, place_slots
from mmmamba_cli.processing.tokenizer import check_unicode
from mmmamba_cli.processing.video_frames import VideoFrames, decode_clip, sampling_of

# Inputs that a model's forward does not take.
NOT_INPUTS = ("offset_mapping", "text_replacement_offsets", "video_metadata")
# Variables of chat templates; false leaves out the text that some models write before an answer.
THINKING = re.compile(r"\b(enable_thinking|thinking)\b")


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

    `packs_rows` says whether its model takes several conversations in a row.

    Raises:
        CheckpointError: it has no tokenizer, or no padding and no end token.
    """

    def __init__(self, processor: Any, packs_rows: bool = False):
        self.processor, self.packs_rows = processor, packs_rows
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
        self.takes_videos = getattr(processor, "video_processor", None) is not None
        self._video_counts: dict[tuple[Any, ...], int] = {}
        self.picture_tokens = PictureTokens(self._measure, processor)

    @cached_property
    def chat_template(self) -> str:
        """The template of conversations. Raises `CheckpointError` if there is none."""
        template = self.find_chat_template()
        if template is None:
            raise CheckpointError(
                "the teacher has no chat template, so it cannot read conversations",
                "add chat_template.jinja to its folder, or give data of plain texts",
            )
        return template

    def find_chat_template(self) -> str | None:
        """The template of conversations, or None."""
        owner = self.processor if self._has_template else self.tokenizer
        template = owner.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        return template if isinstance(template, str) else None

    def render(
        self, messages: Sequence[Message], num_images: int, num_videos: int = 0
    ) -> RenderedPrompt:
        """Render a conversation, its answers marked.

        `messages` are those of a `Sample`: `<image>` in a user's plain text is a picture. Pictures
        and videos without a place come before the first question.

        Raises:
            DataError: more or fewer places than pictures, a control token in a text, text that is
                not valid Unicode, or a conversation that the template does not take.
        """
        if num_images and not self.takes_images:
            raise DataError("the sample has an image, and the model reads text only")
        if num_videos and not self.takes_videos:
            raise DataError("the sample has a video, and the teacher's processor takes none")
        turns = place_slots(messages, num_images, num_videos)
        self._refuse_control_tokens(turns)
        listed = [turn.message(self.takes_images) for turn in turns]
        rendered = self._rendered(listed, False)
        text = self._with_begin_token(rendered)
        check_unicode(text)
        if marks_answers(self.chat_template):
            ids, is_answer = self._marked(listed)
            # The token that a tokenizer adds before a text.
            begun = self._ids(text)
            is_answer = [False] * (len(begun) - len(ids)) + is_answer
            return self._prompt(text, begun, is_answer, num_videos)
        shift = len(text) - len(rendered)
        spans = answer_spans(
            listed,
            text[shift:],
            self._rendered,
            self._special_tokens.values(),
        )
        ids, offsets = self._ids_and_offsets(text)
        moved = [(start + shift, end + shift) for start, end in spans]
        return self._prompt(text, ids, tokens_in(moved, offsets), num_videos)

    def question(self, turn: PromptTurn) -> RenderedPrompt:
        """Render a question up to the start of its answer, thinking off where the template has it.

        Raises:
            DataError: a picture for a model of text, or a control token in the question.
        """
        if Slot.IMAGE in turn.content and not self.takes_images:
            raise DataError("the question has a picture, and the model reads text only")
        self._refuse_control_tokens([turn])
        options = dict.fromkeys(THINKING.findall(self.chat_template), False)
        text = self._rendered([turn.message(self.takes_images)], True, options)
        text = self._with_begin_token(text)
        ids = self._ids(text)
        return self._prompt(text, ids, [False] * len(ids))

    def answer_tokens(self, turn: PromptTurn, question: RenderedPrompt, answer: str) -> list[int]:
        """The tokens of an answer to `question`, the rendered `turn`, without its end of turn.

        A template may write more before an answer than before it is opened, such as a space.
        """
        turns = [turn, PromptTurn("assistant", (answer,))]
        listed = [one.message(self.takes_images) for one in turns]
        rendered = self._with_begin_token(self._rendered(listed, False))
        before = ""
        if rendered.startswith(question.text):
            before = rendered[len(question.text) :].partition(answer)[0]
        ids = self._ids(question.text + before + answer)
        if ids[: len(question.ids)] == question.ids:
            return ids[len(question.ids) :]
        # A token would span the end of the prompt, which generation does not do.
        return self._ids(before + answer)

    @cached_property
    def end_of_answer_ids(self) -> frozenset[int]:
        """Special tokens that end an answer in the chat template; empty if they are not found."""
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            prompt = self.render(talk, 0)
        except (CheckpointError, DataError):
            return frozenset()
        return frozenset(self._special_tokens).intersection(compress(prompt.ids, prompt.is_answer))

    def render_text(self, text: str) -> RenderedPrompt:
        """A plain text, of which every token after the first is learned.

        Raises:
            DataError: it has no tokens, or is not valid Unicode.
        """
        begun = self._with_begin_token(text)
        check_unicode(begun)
        ids = self._ids(begun)
        if not ids:
            raise DataError("the text has no tokens")
        return self._prompt(begun, ids, [False] + [True] * (len(ids) - 1))

    def length(
        self,
        prompt: RenderedPrompt,
        sizes: Sequence[Size],
        videos: Sequence[VideoFrames] = (),
    ) -> int:
        """Tokens of a prompt with pictures of these sizes and videos like these.

        Raises:
            DataError: the processor does not take a size or a video.
        """
        pictures = self.picture_tokens.count(sizes) if sizes else 0
        return len(prompt.ids) + pictures + sum(map(self._video_tokens, videos))

    def decode_clip(self, path: str) -> VideoFrames:
        """Decode a clip, its frames sampled as the processor does. Raises `DataError`."""
        return decode_clip(path, sampling_of(self.processor.video_processor))

    def inputs(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        videos: Sequence[Sequence[VideoFrames]] = (),
        *,
        padding_side: Literal["left", "right"] = "right",
    ) -> dict[str, Tensor]:
        """The inputs of the model's forward for prompts and their pictures, padded.

        `images` and `videos` have a list for each prompt; no `videos` are none for any.

        Returns:
            `input_ids` and `attention_mask` (B, T), and what else the processor makes.

        Raises:
            DataError: the processor does not take a prompt or a picture.
        """
        options: dict[str, Any] = {
            "padding": True,
            "padding_side": padding_side,
            "return_tensors": "pt",
            "add_special_tokens": False,
        }
        if any(images):
            options["images"] = [list(pictures) for pictures in images]
        flat = [video for shown in videos for video in shown]
        if flat:
            options |= {
                "videos": [video.pixels for video in flat],
                "video_metadata": [video.metadata for video in flat],
                "do_sample_frames": False,
            }
        try:
            made = self.processor(text=list(texts), **options)
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

    def _prompt(
        self, text: str, ids: list[int], is_answer: list[bool], num_videos: int = 0
    ) -> RenderedPrompt:
        placed = self.picture_ids | (self._video_ids if num_videos else frozenset())
        places = [i for i, token in enumerate(ids) if token in placed]
        return RenderedPrompt(text, ids, is_answer, len(ids) - places[-1] - 1 if places else 0)

    def _rendered(
        self, messages: Messages, opens_answer: bool, options: Mapping[str, bool] | None = None
    ) -> str:
        if not messages:
            return ""
        # SmolVLM's processor has a template of its own for videos, unless one is given.
        given: dict[str, Any] = dict(options or {})
        if not self._has_template:
            given["chat_template"] = self.chat_template
        try:
            return self.processor.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=opens_answer, **given
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

    @property
    def _has_template(self) -> bool:
        """Whether the processor, and not only its tokenizer, has a chat template."""
        return bool(getattr(self.processor, "chat_template", None))

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
    def picture_ids(self) -> frozenset[int]:
        """Special tokens that only pictures bring into a prompt: placeholders and their marks."""
        if not self.takes_images:
            return frozenset()
        expanded = self.inputs([self._probe(Slot.IMAGE)], [[Image.new("RGB", (56, 56))]])
        return self._brought_by(Slot.IMAGE, expanded["input_ids"][0].tolist())

    @cached_property
    def _video_ids(self) -> frozenset[int]:
        """Special tokens that videos bring into a prompt before they are expanded."""
        return self._brought_by(Slot.VIDEO, [])

    def _brought_by(self, slot: Slot, expanded: Sequence[int]) -> frozenset[int]:
        without, placed = (set(self._ids(self._probe(*slots))) for slots in ((), (slot,)))
        return frozenset(((placed | set(expanded)) - without) & set(self._special_tokens))

    @cached_property
    def _control_tokens(self) -> dict[str, str]:
        """Tokens that a text must not write, with what they stand for."""
        if not self.tokenizer.chat_template and not self._has_template:
            return {}
        probe = self._ids(self._probe())
        found = dict.fromkeys(
            (text for index, text in self._special_tokens.items() if index in probe),
            "the chat template writes",
        )
        pictures = (self._special_tokens[index] for index in self.picture_ids)
        return found | dict.fromkeys(pictures, "stands for a picture")

    def _probe(self, *slots: Slot) -> str:
        """A short rendered conversation with pictures or videos."""
        turns = [PromptTurn("user", (*slots, "a")), PromptTurn("assistant", ("b",))]
        listed = [turn.message(self.takes_images) for turn in turns]
        return self._with_begin_token(self._rendered(listed, False))

    def _measure(self, sizes: Sequence[Size]) -> int:
        """Tokens that blank pictures of these sizes add to a prompt."""
        text = self._probe(*[Slot.IMAGE] * len(sizes))
        blanks = [Image.new("RGB", size) for size in sizes]
        return int(self.inputs([text], [blanks])["input_ids"].shape[1]) - len(self._ids(text))

    def _video_tokens(self, video: VideoFrames) -> int:
        """Tokens that a video adds to a prompt, counted once for each shape and sampling."""
        if video.key not in self._video_counts:
            text = self._probe(Slot.VIDEO)
            made = self.inputs([text], [[]], [[video.blank()]])
            self._video_counts[video.key] = made["input_ids"].shape[1] - len(self._ids(text))
        return self._video_counts[video.key]

    def _refuse_control_tokens(self, turns: Sequence[PromptTurn]) -> None:
        for number, turn in enumerate(turns, start=1):
            for part in turn.content:
                for token, what in self._control_tokens.items():
                    if isinstance(part, str) and token in part:
                        raise DataError(
                            f"turn {number} writes {token}, a token that {what}; leave it out"
                        )
