"""Chat: a conversation, and one or several models that answer it."""

from mmmamba_cli.chat.chat_model import (
    AnsweringModel,
    ChatAnswer,
    ChatModel,
    generate_ids,
    load_chat_model,
    resolve_models,
)
from mmmamba_cli.chat.conversation import Conversation
from mmmamba_cli.chat.in_place_chat import InPlaceChatModel, load_any_chat_model
from mmmamba_cli.chat.side_by_side import SideBySide, column_width
from mmmamba_cli.inference import Settings

# Former names, kept for one release.
Answer = ChatAnswer
load_speaker, locate = load_chat_model, resolve_models

__all__ = [
    "Answer",
    "AnsweringModel",
    "ChatAnswer",
    "ChatModel",
    "Conversation",
    "InPlaceChatModel",
    "Settings",
    "SideBySide",
    "column_width",
    "generate_ids",
    "load_any_chat_model",
    "load_chat_model",
    "load_speaker",
    "locate",
    "resolve_models",
]
