"""Talking to models: one conversation, one or several that answer it."""

from mmmamba_cli.chatting.columns import SideBySide, column_width
from mmmamba_cli.chatting.conversation import Conversation
from mmmamba_cli.chatting.generation import generate_ids
from mmmamba_cli.chatting.speaker import Answer, Speaker, load_speaker, locate
from mmmamba_cli.decoding import Settings

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
