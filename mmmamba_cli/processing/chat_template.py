"""Chat template `internlm2-chat`: conversation to prompt.

A prompt is a list of parts: text, special tokens, and image slots. They stay apart until they are
encoded, so that a message cannot inject a special token by typing its characters: `<|im_end|>` in a
question is ten ordinary characters. `GROUNDING_TOKENS` are the exception, since the model uses them
in its answers.

`<image>` is an image placeholder only in a user message that is a plain string, and only for images
that no content part places. In the text of a content part, in a conversation without images, and in
system and assistant messages, it is text.

`CHAT_TEMPLATE` is the same template for transformers' `apply_chat_template`, which renders one
string. There, as everywhere in transformers, special tokens in messages are special tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmmamba_cli.errors import DataError

TEMPLATES = ("internlm2-chat",)
ROLES = ("system", "user", "assistant")
IMAGE_PLACEHOLDER = "<image>"

DEFAULT_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
IMAGE_START = "<img>"
IMAGE_END = "</img>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"
REQUIRED_TOKENS = (TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE_CONTEXT)
ANSWER_HEADER = "assistant\n"
GROUNDING_TOKENS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if not messages or messages[0].role != 'system' %}"
    "<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for item in message.content %}"
    "{% if item.type == 'image' %}{{ '<image>\n' }}{% else %}{{ item.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Message = Mapping[str, Any]
# A question, or a list of messages.
ConversationInput = str | Sequence[Message]


@dataclass(frozen=True)
class SpecialToken:
    """A special token, repeated `times` times."""

    token: str
    times: int = 1


@dataclass(frozen=True)
class ImageSlot:
    """Slot of an image; of the next image passed beside the messages if `source` is None."""

    source: Any = None


PromptPart = str | SpecialToken | ImageSlot
Content = list[str | ImageSlot]


@dataclass(frozen=True)
class Turn:
    """Message of one role: texts with image slots between them."""

    role: str
    content: tuple[str | ImageSlot, ...]

    @property
    def slots(self) -> list[ImageSlot]:
        return [part for part in self.content if isinstance(part, ImageSlot)]


def to_turns(
    conversation: str | Sequence[Message], num_images: int, *, placeholders: bool = False
) -> list[Turn]:
    """Convert a question or a list of messages to turns with a slot for every image.

    A message is `{"role": ..., "content": ...}`. Its content is text, or a list of
    `{"type": "text", "text": ...}` and, from the user, `{"type": "image"}`, optionally with the
    image as `image` or `path`. `num_images` images are passed beside the messages. Images without a
    content part take the `<image>` in the user's plain strings; without any, they go before the
    first user message, see `image_lines`. With `placeholders`, as in training data, every `<image>`
    in a plain string is a slot. `check_images` compares the numbers of slots and images.

    Raises:
        DataError: a message of another form.
    """
    if isinstance(conversation, str):
        conversation = [{"role": "user", "content": conversation}]
    turns = [_turn(message, index) for index, message in enumerate(conversation)]
    plain = [isinstance(message["content"], str) for message in conversation]
    marked = sum(slot.source is None for turn in turns for slot in turn.slots)
    if placeholders or num_images > marked:
        turns = [
            Turn(turn.role, tuple(split_images(str(turn.content[0]))))
            if is_plain and turn.role == "user"
            else turn
            for turn, is_plain in zip(turns, plain, strict=True)
        ]
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is not None and num_images and not any(turn.slots for turn in turns):
        turns[first] = Turn("user", (*image_lines(num_images), *turns[first].content))
    return turns


def image_lines(num_images: int) -> Content:
    """Image slots before a question, in the format of the published evaluations.

    One image takes a line of its own; several take lines `Image-1: `, `Image-2: `, ...
    """
    if num_images == 1:
        return [ImageSlot(), "\n"]
    lines: Content = []
    for index in range(1, num_images + 1):
        lines += [f"Image-{index}: ", ImageSlot(), "\n"]
    return lines


def place_images(question: str, num_images: int) -> str:
    """Prepend `image_lines` to a question, as a string with `<image>` placeholders."""
    lines = image_lines(num_images) if num_images else []
    shown = [IMAGE_PLACEHOLDER if isinstance(part, ImageSlot) else part for part in lines]
    return "".join(shown) + question


def render_chat(
    turns: Iterable[Turn],
    *,
    system: str | None = None,
    add_generation_prompt: bool = True,
) -> list[PromptPart]:
    """Render turns as the parts of a prompt, without the begin token.

    `system` is the system text of a conversation without one; None is `DEFAULT_SYSTEM`. Turns are
    not separated by newlines. `add_generation_prompt` opens the assistant's turn.
    """
    listed = list(turns)
    if not listed or listed[0].role != "system":
        listed.insert(0, Turn("system", (DEFAULT_SYSTEM if system is None else system,)))
    parts: list[PromptPart] = []
    for turn in listed:
        parts += [SpecialToken(TURN_START), f"{turn.role}\n", *turn.content, SpecialToken(TURN_END)]
    if add_generation_prompt:
        parts += [SpecialToken(TURN_START), "assistant\n"]
    return join_text(parts)


def split_images(text: str, at_most: int = -1) -> Content:
    """Split text at each `<image>`, or at the first `at_most`, into texts and image slots."""
    first, *rest = text.split(IMAGE_PLACEHOLDER, at_most) if at_most else (text,)
    parts: Content = [first]
    for piece in rest:
        parts += [ImageSlot(), piece]
    return parts


def content_with_images(text: str, num_images: int) -> list[Any]:
    """Message content of a text; its first `num_images` `<image>` are slots, others are text."""
    parts = split_images(text, num_images)
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


def join_text(parts: Iterable[PromptPart]) -> list[PromptPart]:
    """Join adjacent texts, so that they are encoded as one, and drop empty texts."""
    joined: list[PromptPart] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return joined


def check_images(parts: Iterable[PromptPart], num_images: int) -> None:
    """Raise `DataError` unless there is one slot per image."""
    slots = sum(isinstance(part, ImageSlot) for part in parts)
    if slots != num_images:
        raise DataError(
            f"the prompt has {slots} {IMAGE_PLACEHOLDER} but {num_images} images are given",
            f"write {IMAGE_PLACEHOLDER} once for each image, or, in a chat, nowhere to have them "
            "placed in front",
        )


def expand_images(
    parts: Iterable[PromptPart], context_tokens: Iterable[int]
) -> Iterator[str | SpecialToken]:
    """Replace each slot by `<img>`, its number of `<IMG_CONTEXT>`, and `</img>`."""
    counts = iter(context_tokens)
    for part in parts:
        if isinstance(part, ImageSlot):
            yield from (SpecialToken(IMAGE_START), SpecialToken(IMAGE_CONTEXT, next(counts)))
            yield SpecialToken(IMAGE_END)
        else:
            yield part


def mark_answers(
    parts: Iterable[str | SpecialToken], encode: Any, special: Any
) -> Iterator[tuple[int, bool]]:
    """Yield (id, whether it belongs to an answer) for each token of a rendered conversation.

    `encode(text)` and `special(token)` return ids. An answer is the assistant's text and the token
    that ends its turn. Header and answer are encoded as one text, so the answer begins at the first
    id that differs from the ids of the header alone.
    """
    opened = answering = False
    for part in parts:
        if isinstance(part, SpecialToken):
            ends = part.token == TURN_END
            yield from [(special(part.token), answering and ends)] * part.times
            opened, answering = part.token == TURN_START, answering and not ends
            continue
        ids, known = encode(part), 0
        if opened and part.startswith(ANSWER_HEADER):
            answering = True
            known = _common_prefix(ids, encode(ANSWER_HEADER))
        yield from ((token, answering and i >= known) for i, token in enumerate(ids))
        opened = False


def _turn(message: Any, index: int) -> Turn:
    where = f"message {index + 1}"
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise DataError(f"{where} is {message!r:.200}, expected a dict of role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES or (role == "system" and index):
        raise DataError(
            f"{where} has role {role!r:.60}, allowed are {', '.join(ROLES)}; system only comes "
            "first"
        )
    if isinstance(content, str):
        return Turn(role, (content,))
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise DataError(f"{where} has a {type(content).__name__} as content, expected text")
    return Turn(role, tuple(part for item in content for part in _parts(item, where, role)))


def _parts(item: Any, where: str, role: str) -> Content:
    """Parts of one content item of a message; an image is followed by a newline."""
    match item:
        case ImageSlot() if role == "user":
            return [item]
        case {"type": "text", "text": str(text)}:
            return [text]
        case {"type": "image", **rest} if role == "user" and not rest:
            return [ImageSlot(), "\n"]
        case {"type": "image", "image": source, **rest} if role == "user" and not rest:
            return [ImageSlot(source), "\n"]
        case {"type": "image", "path": source, **rest} if role == "user" and not rest:
            return [ImageSlot(source), "\n"]
    raise DataError(
        f"{where} has {item!r:.200} in its content, expected "
        '{"type": "text", "text": ...} or, from the user, {"type": "image"}',
        "pass the pictures themselves as images",
    )


def _common_prefix(one: Sequence[int], two: Sequence[int]) -> int:
    for i, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return i
    return min(len(one), len(two))
