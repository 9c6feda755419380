"""The chat template `internlm2-chat`: from a conversation to a prompt.

A prompt is a list of parts: text, special tokens, and slots for pictures. Keeping them apart until
they are ids means that nobody can write a special token by typing its characters: what a message
says is text, and `<|im_end|>` in a question is ten ordinary characters. The tokens with which the
model points at things (`GROUNDING_TOKENS`) are the exception, they are part of its language. In a
user's message `<image>` stands for the next picture; in the system's and the assistant's it is
text.

`CHAT_TEMPLATE` is the same template for transformers' `apply_chat_template`, which makes one string
of it: there, as everywhere in transformers, special tokens in messages are taken for what they are.
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


@dataclass(frozen=True)
class Special:
    """A special token that is meant as one, once or several times in a row."""

    token: str
    times: int = 1


@dataclass(frozen=True)
class ImageSlot:
    """The place of the next picture."""


Part = str | Special | ImageSlot


def as_messages(conversation: str | Sequence[Message], num_images: int) -> list[dict[str, str]]:
    """A question or a list of messages -> messages of plain text, pictures placed.

    A message is `{"role": ..., "content": ...}`; its content is text, or a list of
    `{"type": "text", "text": ...}` and `{"type": "image"}`. If no user message says where the
    pictures belong, they are put in front of the first one, see `place_images`. Raises `DataError`
    for anything else.
    """
    if isinstance(conversation, str):
        conversation = [{"role": "user", "content": conversation}]
    messages = [_plain(message, index) for index, message in enumerate(conversation)]
    users = [message for message in messages if message["role"] == "user"]
    placed = any(IMAGE_PLACEHOLDER in message["content"] for message in users)
    if users and num_images and not placed:
        users[0]["content"] = place_images(users[0]["content"], num_images)
    return messages


def place_images(question: str, num_images: int) -> str:
    """Put placeholders for pictures before a question, as the published evaluations do.

    One picture: `<image>\\n`; several: a line `Image-1: <image>`, `Image-2: <image>`, ... each.
    """
    if num_images == 1:
        return f"{IMAGE_PLACEHOLDER}\n{question}"
    lines = [f"Image-{index}: {IMAGE_PLACEHOLDER}\n" for index in range(1, num_images + 1)]
    return "".join(lines) + question


def render_chat(
    messages: Iterable[Mapping[str, str]],
    *,
    system: str | None = None,
    add_generation_prompt: bool = True,
) -> list[Part]:
    """Messages of plain text -> the parts of their prompt, without the begin token.

    `system` is the system text of a conversation that does not start with its own; None is
    `DEFAULT_SYSTEM`. There is no newline between turns. `add_generation_prompt` opens the
    assistant's turn.
    """
    turns = list(messages)
    if not turns or turns[0]["role"] != "system":
        text = DEFAULT_SYSTEM if system is None else system
        turns.insert(0, {"role": "system", "content": text})
    parts: list[Part] = []
    for turn in turns:
        said: list[Part] = [turn["content"]]
        if turn["role"] == "user":
            said = split_images(turn["content"])
        parts += [Special(TURN_START), f"{turn['role']}\n", *said, Special(TURN_END)]
    if add_generation_prompt:
        parts += [Special(TURN_START), "assistant\n"]
    return join_text(parts)


def split_images(text: str) -> list[Part]:
    """Text -> text and a slot for each `<image>` in it."""
    first, *rest = text.split(IMAGE_PLACEHOLDER)
    parts: list[Part] = [first]
    for piece in rest:
        parts += [ImageSlot(), piece]
    return parts


def join_text(parts: Iterable[Part]) -> list[Part]:
    """Put neighbouring texts together, so that they are encoded as one, and drop empty ones."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return joined


def check_images(parts: Iterable[Part], num_images: int) -> None:
    """Raise `DataError` unless there is one slot for each picture."""
    slots = sum(isinstance(part, ImageSlot) for part in parts)
    if slots != num_images:
        raise DataError(
            f"the prompt has {slots} {IMAGE_PLACEHOLDER} but {num_images} images are given",
            f"write {IMAGE_PLACEHOLDER} once for each image, or, in a chat, nowhere to have them "
            "placed in front",
        )


def expand_images(parts: Iterable[Part], context_tokens: Iterable[int]) -> Iterator[str | Special]:
    """Replace the slots by `<img>`, n times `<IMG_CONTEXT>` and `</img>`, n as given for each."""
    counts = iter(context_tokens)
    for part in parts:
        if isinstance(part, ImageSlot):
            yield from (Special(IMAGE_START), Special(IMAGE_CONTEXT, next(counts)))
            yield Special(IMAGE_END)
        else:
            yield part


def _plain(message: Message, index: int) -> dict[str, str]:
    where = f"message {index + 1}"
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise DataError(f"{where} is {message!r}, expected a dict of role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES or (role == "system" and index):
        raise DataError(
            f"{where} has role {role!r}, allowed are {', '.join(ROLES)}; system only comes first"
        )
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, Sequence):
        raise DataError(f"{where} has a {type(content).__name__} as content, expected text")
    return {"role": role, "content": "".join(_plain_item(item, where, role) for item in content)}


def _plain_item(item: Any, where: str, role: str) -> str:
    match item:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image"} if role == "user" and set(item) == {"type"}:
            return f"{IMAGE_PLACEHOLDER}\n"
    raise DataError(
        f"{where} has {item!r} in its content, expected "
        '{"type": "text", "text": ...} or, from the user, {"type": "image"}',
        "pass the pictures themselves as images",
    )
