"""The processor of a plain language model: its own tokenizer and chat template, no pictures.

What messages and training texts say is text: control tokens typed in them have no power, see
`ControlTokens`. In a finished prompt that is passed to the processor they are meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import Unpack

from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.processing.chat_template import ConversationInput, Message, as_turns
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
    """Nobody's config: transformers finds a processor by its name among those with a config."""

    model_type = "mmmamba-text"


class HolisticTextProcessor(ProcessorMixin):
    """Tokenizer and chat template of a plain language model, saved and loaded with it.

    `stop_token_ids` are where an answer ends; without them, the tokenizer's end token and what the
    template puts behind an answer.
    """

    valid_processor_kwargs = HolisticTextProcessorKwargs

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int] | None = None,
        chat_template: str | None = None,
    ):
        tokenizer.padding_side = "left"
        # What a tokenizer is saved with is what it was made with.
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
        """As transformers' own; a folder without a tokenizer is a `CheckpointError`."""
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
        """Encode one finished prompt, or a batch of them.

        Special tokens in a text are taken for what they are; the begin token is put in front if the
        tokenizer does that and the text does not start with it, unless `add_special_tokens=False`.
        Keywords are transformers' for texts (`padding`, `truncation`, `max_length`,
        `padding_side`, `return_tensors`, ...), as they are or in `text_kwargs`. Returns `input_ids`
        and `attention_mask` (B, T), int64, padded on the left, or lists with `return_tensors=None`.
        Raises `DataError` for images, or text that is not valid Unicode; `TypeError` for a keyword
        that is not known.
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

        A conversation is a question or a list of messages; `system` is put in front of those
        without their own. What messages say is text: control tokens typed in them have no power.
        `images`, which other models' processors take, must be empty. Returns and raises what
        calling the processor does; `CheckpointError` if the model has no template.
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
        """Ids of a whole conversation, as `chat` gives them, and which belong to an answer.

        An answer is what the template makes of the assistant's text, up to and with the special
        token behind it. Raises `DataError` where its tokens cannot be told exactly from those
        around it, or if there are images.
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
        """Ids of plain text, with what the tokenizer puts around it, such as a begin token.

        Control tokens in it are text.
        """
        check_unicode(text)
        return self._control_tokens.encode_text(text)

    def _messages(self, conversation: ConversationInput) -> list[dict[str, str]]:
        """Messages of plain text, in which control tokens are marked as typed."""
        turns = as_turns(conversation, 0)
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
        """First column of answer `index`, and the one behind its end token."""
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
        # A template may put empty thoughts before an answer, or leave old thoughts out of it.
        if not said.endswith(meant) and not (said and meant.endswith(said)):
            raise DataError(f"{where}: the chat template changes what the answer says")
        return len(header), end + 1

    def _template_stops(self) -> set[int]:
        """The end token, and the token with which the template ends an answer."""
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
        """Ids of what the template made of marked messages."""
        check_unicode(self._control_tokens.unescape(text))
        return self._control_tokens.encode(text)

    def _batch(self, rows: list[list[int]], text_kwargs: Mapping[str, Any]) -> BatchFeature:
        cut = [truncate(self.tokenizer, row, text_kwargs, 0, ()) for row in rows]
        return BatchFeature(pad_rows(self.tokenizer, cut, text_kwargs, None))


def _refuse_images(images: Sequence[Any] | None) -> None:
    """Raise `DataError` if there are images, be it in lists of lists."""
    if images is not None and any(not isinstance(i, list | tuple) or i for i in images):
        raise DataError("the model reads text only", "leave out the images")
