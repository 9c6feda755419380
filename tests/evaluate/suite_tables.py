"""Small tables in VLMEvalKit's layout, and a scripted model."""

from __future__ import annotations

import base64
import csv
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmmamba_cli.evaluate import EncodedPrompt, EvalPrompt, ModelIdentity, OutOfMemory
from mmmamba_cli.evaluate.scoring.yes_no import PERCEPTION, REASONING

ENDING = " Please answer yes or no."
SPLITS = ("random", "popular", "adversarial")


def picture(number: int, size: tuple[int, int] = (60, 40)) -> str:
    """A picture unique to `number`, as base64."""
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    image.putpixel((0, 0), (number % 256, number // 256, 7))
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_tsv(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write a TSV as pandas does: a heading, cells quoted as needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with file.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return file


def mme_rows(pairs: int = 2, categories: Sequence[str] = (*PERCEPTION, *REASONING)) -> list[Any]:
    """`pairs` pictures a category with two questions each, the second by reference."""
    rows: list[dict[str, Any]] = []
    for category in categories:
        for number in range(pairs):
            first = len(rows)
            size = ((60, 40), (40, 40), (130, 40))[number % 3]
            path = f"images/{category}/{number}.png"
            question = f"Is this {category} {number}?"
            rows.append(
                {
                    "index": first,
                    "image": picture(first, size),
                    "image_path": path,
                    "question": question + ENDING,
                    "answer": "Yes",
                    "category": category,
                }
            )
            rows.append(
                {
                    "index": first + 1,
                    "image": str(first),
                    "image_path": path,
                    "question": f"Or is it {category} no {number + 100}?{ENDING}",
                    "answer": "No",
                    "category": category,
                }
            )
    return rows


def pope_rows(each: int = 4) -> list[Any]:
    """`each` questions a split, about two pictures that all splits share."""
    rows: list[dict[str, Any]] = []
    for split in SPLITS:
        for number in range(each):
            index = len(rows)
            owner = number % 2
            image = picture(owner) if index < 2 else str(owner)
            rows.append(
                {
                    "index": index,
                    "image": image,
                    "image_path": f"{owner}.jpg",
                    "question": f"Is there thing {number} in the image?{ENDING}",
                    "answer": "Yes" if number < each / 2 else "No",
                    "category": split,
                }
            )
    return rows


class ScriptedModel:
    """Gives scripted answers, records prompts and batches, and runs out of memory above a limit."""

    def __init__(
        self,
        answers: Mapping[str, str] | Callable[[EvalPrompt], str],
        name: str = "scripted",
        most_columns: int | None = None,
        columns: int | None = None,
    ):
        self.answers = answers
        self.identity = ModelIdentity(name, f"hash of {name}")
        self.most_columns = most_columns
        self.columns = columns
        self.asked: list[EvalPrompt] = []
        self.batches: list[list[str]] = []
        self.threads: set[str] = set()

    def prompt_length(self, prompt: EvalPrompt) -> int:
        for one in prompt.pictures:
            one.size()
        return len(prompt.text)

    def encode(self, prompt: EvalPrompt) -> EncodedPrompt:
        self.threads.add(threading.current_thread().name)
        for one in prompt.pictures:
            one.open()
        return EncodedPrompt(prompt, len(prompt.text))

    def generate(self, batch: Sequence[EncodedPrompt], max_new_tokens: int) -> list[str]:
        wide = len(batch) * max(one.length for one in batch)
        if self.most_columns is not None and wide > self.most_columns:
            raise OutOfMemory("too wide")
        self.asked += [one.prompt for one in batch]
        self.batches.append([one.prompt.index for one in batch])
        return [self.answer(one.prompt) for one in batch]

    def answer(self, prompt: EvalPrompt) -> str:
        if callable(self.answers):
            return self.answers(prompt)
        return self.answers[prompt.index]

    def score_choices(self, batch: Sequence[EncodedPrompt]) -> list[list[float]]:
        self.batches.append([one.prompt.index for one in batch])
        return [
            [0.0 if choice == self.answer(one.prompt) else -1.0 for choice in one.prompt.choices]
            for one in batch
        ]

    def max_batch_tokens(self, longest: EncodedPrompt, max_new_tokens: int) -> int | None:
        return self.columns
