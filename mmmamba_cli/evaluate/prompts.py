"""Prompts of rows, with the wording of the published evaluations."""

from __future__ import annotations

import re

from mmmamba_cli.evaluate.candidates import Candidates
from mmmamba_cli.evaluate.images import pictures_of
from mmmamba_cli.evaluate.interfaces import EvalPrompt
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.suite import PromptStyle, Suite
from mmmamba_cli.evaluate.vlmeval_table import VLMEvalTable

CHINESE = re.compile(r"[\u4e00-\u9fff]")
LETTER_INSTRUCTION = {
    False: "\nAnswer with the option's letter from the given choices directly.",
    True: "\n请直接回答选项字母。",
}
DIRECT_INSTRUCTION = {False: "\nAnswer the question directly.", True: "\n请直接回答问题。"}
# MMMU's references to pictures.
IMAGE_REFERENCE = re.compile(r"<image (\d+)>")
# Largest number of tiles of all pictures of a prompt together.
MAX_TILES_PER_PROMPT = 64


def question_text(row: Row, style: PromptStyle) -> str:
    """The question without its pictures."""
    text = row.question
    if style.remove:
        text = text.removesuffix(style.remove)
    if style.style == "choices":
        if row.hint:
            text = f"{row.hint}\n{text}"
        text += "".join(f"\n{letter}. {option}" for letter, option in row.options.items())
        is_chinese = CHINESE.search(text) is not None
        text += LETTER_INSTRUCTION[is_chinese] if row.options else DIRECT_INSTRUCTION[is_chinese]
    return text + style.append


def place_pictures(text: str, pictures: int) -> str:
    """Prepend picture placeholders: `<image>`, or one line for each of several pictures.

    With several pictures, references such as `<image 2>` in the text become `<Image-2>`.
    """
    if pictures == 0:
        return text
    if pictures == 1:
        return f"<image>\n{text}"
    lines = "".join(f"Image-{i}: <image>\n" for i in range(1, pictures + 1))
    return lines + IMAGE_REFERENCE.sub(r"<Image-\1>", text)


def tiles_per_picture(max_tiles: int, pictures: int) -> int:
    """The largest number of tiles of one of `pictures` pictures."""
    return max(1, min(max_tiles, MAX_TILES_PER_PROMPT // max(1, pictures)))


def build_eval_prompt(
    row: Row,
    suite: Suite,
    table: VLMEvalTable,
    max_tiles: int | None,
    by_likelihood: bool,
    candidates: Candidates | None = None,
) -> EvalPrompt:
    """The prompt of a row; `max_tiles` overrides the suite's.

    With `by_likelihood` the options, or the suite's choices, are ranked; with `candidates`, these.
    """
    choices = (tuple(row.options) or suite.choices) if by_likelihood else ()
    pictures = pictures_of(table, table.cells[row.place], suite.dataset, suite.enlarge)
    return EvalPrompt(
        index=row.index,
        text=place_pictures(question_text(row, suite.prompt), len(pictures)),
        pictures=pictures,
        max_tiles=tiles_per_picture(max_tiles or suite.max_tiles, len(pictures)),
        choices=choices if candidates is None else candidates.texts,
        by_length=candidates is not None and candidates.open,
    )
