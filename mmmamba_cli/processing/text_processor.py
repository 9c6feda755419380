"""Processor of a plain language model: its own tokenizer and chat template, no images.

Control tokens typed in messages and training texts are text, see `ControlTokens`; in a finished
prompt they are parsed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import Unpack

from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.processing.chat_template import ConversationInput, Message, to_turns
from mmmamba_cli.processing.control_tokens import ControlTokens
from mmmamba_cli.processing.processor_kwargs import (
    HolisticTextProcessorKwargs,
    merge_kwargs,
    pad_rows,
    truncate,
)
from mmmamba_cli.processing.tokenizer import check_unicode

TOKENIZER_CONFIG = "tokenizer_config.json"
ACCEPTED_INPUTS = "text"
PROBE_CONVERSATION = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


class TextOnlyMarker(PreTrainedConfig):
    """Config of no model; transformers finds a processor class by the name of a config."""

    model_type = "mmmamba-text"


class HolisticTextProcessor(ProcessorMixin):
    """Tokenizer and chat template of a plain language model, saved and loaded with it.

    `stop_token_ids` end an answer; by default the tokenizer's end token and the token that the
    template puts after an answer.
    """

    valid_processor_kwargs = HolisticTextProcessorKwargs

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int] | None = None,
        chat_template: str | None = None,
    ):
        tokenizer.padding_side = "left"
        # `save_pretrained` writes init_kwargs.
        tokenizer.init_kwargs["padding_side"] = "left"
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise CheckpointError(
                    "the tokenizer has neither an end token nor a padding token",
                    "name one in its tokenizer_config.json",
                )
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.chat_template is None:
            tokenizer.chat_template = chat_template
        super().__init__(tokenizer, chat_template=tokenizer.chat_template)
        self._control_tokens = ControlTokens(tokenizer)
        self.stop_token_ids = sorted(set(stop_token_ids or self._template_stops()))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> HolisticTextProcessor:
        """Load as in transformers; `CheckpointError` for a folder without a tokenizer."""
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir() and not (folder / TOKENIZER_CONFIG).is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer ({TOKENIZER_CONFIG}), so text cannot be read",
                "seed again from a teacher that has one",
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def image_processor(self) -> None:
        """None: the model has no vision."""
        return None

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask"]

    def __call__(
        self,
        images: None = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Unpack[HolisticTextProcessorKwargs],
    ) -> BatchFeature:
        """Encode a finished prompt, or a batch of prompts.

        Special tokens in a text are parsed. The tokenizer's begin token, if it has one, is
        prepended to a text that does not start with it, unless `add_special_tokens=False`. Keywords
        are transformers' (`padding`, `truncation`, `max_length`, `padding_side`, `return_tensors`,
        ...), passed directly or in `text_kwargs`. Returns `input_ids` and `attention_mask` (B, T),
        int64, padded on the left, or lists with `return_tensors=None`.

        Raises:
            DataError: images, or text that is not valid Unicode.
            TypeError: an unknown keyword.
        """
        text_kwargs, _ = merge_kwargs(self, kwargs, ACCEPTED_INPUTS)
        _refuse_images(images)
        if text is None:
            raise DataError("the processor reads text", "pass text=...")
        texts = [text] if isinstance(text, str) else list(text)
        added = text_kwargs.get("add_special_tokens")
        return self._batch([self._ids(one, added is None or added) for one in texts], text_kwargs)

    def chat(
        self,
        conversation: ConversationInput | Sequence[ConversationInput],
        images: Sequence[Any] | None = None,
        *,
        system: str | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Unpack[HolisticTextProcessorKwargs],
    ) -> BatchFeature:
        """Encode a question or conversation, or a list of them, with the model's chat template.

        A conversation is a question or a list of messages; `system` is the system text of those
        without one. Control tokens typed in messages are text. `images`, which other processors
        take, must be empty. Returns and errors are those of `__call__`; `CheckpointError` if the
        model has no template.
        """
        text_kwargs, _ = merge_kwargs(self, kwargs, ACCEPTED_INPUTS)
        _refuse_images(images)
        one = isinstance(conversation, str) or isinstance(next(iter(conversation), None), Mapping)
        listed: Sequence[Any] = [conversation] if one else conversation
        if not listed:
            raise DataError("there is no conversation", "pass a question or at least one message")
        rows = []
        for talk in listed:
            messages = self._messages(talk)
            if system is not None and messages[0]["role"] != "system":
                content = self._control_tokens.escape(system)
                messages.insert(0, {"role": "system", "content": content})
            rows.append(self._rendered_ids(self._render(messages, add_generation_prompt)))
        return self._batch(rows, text_kwargs)

    def conversation_ids(
        self, messages: Sequence[Message], num_tiles: Sequence[int] = ()
    ) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, as `chat` encodes it, and whether each belongs to an answer.

        An answer is the rendered assistant text, including the special token after it.

        Raises:
            DataError: images, or the tokens of an answer cannot be separated from those around it.
        """
        _refuse_images(num_tiles)
        talk = self._messages(messages)
        text = self._render(talk, add_generation_prompt=False)
        ids = self._rendered_ids(text)
        answers = [i for i, message in enumerate(talk) if message["role"] == "assistant"]
        is_answer = [False] * len(ids)
        for index in answers:
            start, end = self._answer(talk, index, text, ids)
            is_answer[start:end] = [True] * (end - start)
        return ids, is_answer

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text with the tokenizer's begin and end tokens; control tokens are text."""
        check_unicode(text)
        return self._control_tokens.encode_text(text)

    def _messages(self, conversation: ConversationInput) -> list[dict[str, str]]:
        """Messages of plain text with escaped control tokens."""
        turns = to_turns(conversation, 0)
        if any(turn.slots for turn in turns):
            raise DataError("the model reads text only", "leave out the images")
        return [
            {
                "role": turn.role,
                "content": self._control_tokens.escape("".join(map(str, turn.content))),
            }
            for turn in turns
        ]

    def _answer(
        self, talk: list[dict[str, str]], index: int, text: str, ids: list[int]
    ) -> tuple[int, int]:
        """Start of answer `index` in `ids`, and the position after its end token."""
        content, where = talk[index]["content"], f"message {index + 1}"
        before = self._render(talk[:index], add_generation_prompt=True)
        header = self._rendered_ids(before)
        if not text.startswith(before) or ids[: len(header)] != header:
            raise DataError(
                f"{where}: the chat template or the tokenizer joins the beginning of the answer "
                "to what is before it, so its tokens cannot be told exactly"
            )
        special = self._control_tokens.by_id
        end = next((i for i in range(len(header), len(ids)) if ids[i] in special), None)
        if end is None:
            raise DataError(f"{where}: the chat template ends the answer with no special token")
        stop = text.index(special[ids[end]], len(before))
        said, meant = text[len(before) : stop].strip(), content.strip()
        # A template may put an empty thinking block before an answer, or drop an earlier one.
        if not said.endswith(meant) and not (said and meant.endswith(said)):
            raise DataError(f"{where}: the chat template changes what the answer says")
        return len(header), end + 1

    def _template_stops(self) -> set[int]:
        """The end token, and the token that the template puts after an answer."""
        found = {self.tokenizer.eos_token_id} - {None}
        if self.tokenizer.chat_template is not None:
            try:
                ids, is_answer = self.conversation_ids(PROBE_CONVERSATION)
            except DataError:
                return found
            found.add(max((i, token) for i, token in enumerate(ids) if is_answer[i])[1])
        return found

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        if self.tokenizer.chat_template is None:
            raise CheckpointError(
                "the model's tokenizer has no chat template, so it cannot hold a conversation",
                "use plain text, or take the instruction-tuned model of its family",
            )
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from error

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a finished prompt."""
        check_unicode(text)
        begin = self.tokenizer.bos_token
        if begin and text.startswith(begin):
            add_special_tokens = False
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    def _rendered_ids(self, text: str) -> list[int]:
        """Ids of rendered messages with escaped control tokens."""
        check_unicode(self._control_tokens.unescape(text))
        return self._control_tokens.encode(text)

    def _batch(self, rows: list[list[int]], text_kwargs: Mapping[str, Any]) -> BatchFeature:
        cut = [truncate(self.tokenizer, row, text_kwargs, 0, ()) for row in rows]
        return BatchFeature(pad_rows(self.tokenizer, cut, text_kwargs, None))


def _refuse_images(images: Sequence[Any] | None) -> None:
    """Raise `DataError` for images, including images in nested lists."""
    if images is not None and any(not isinstance(i, list | tuple) or i for i in images):
        raise DataError("the model reads text only", "leave out the images")
