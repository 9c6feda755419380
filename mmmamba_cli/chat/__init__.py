"""Talking to models: one conversation, one or several that answer it."""

from mmmamba_cli.chat.chat_model import Answer, Speaker, generate_ids, load_speaker, locate
from mmmamba_cli.chat.conversation import Conversation
from mmmamba_cli.chat.side_by_side import SideBySide, column_width
from mmmamba_cli.inference import Settings

__all__ = [
    "Answer",
    "Conversation",
    "Settings",
    "SideBySide",
    "Speaker",
    "column_width",
    "generate_ids",
    "load_speaker",
    "locate",
]
