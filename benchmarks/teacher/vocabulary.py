"""Tokenizer of the small teacher: SentencePiece trained on questions and answers about scenes.

    python benchmarks/teacher/vocabulary.py --out FOLDER

Writes `tokenizer.model` and `added_tokens.json` in InternLM2's format: BPE with byte fallback, no
text normalisation, special tokens after the pieces. The chat template's system text is
encoded as two pieces, which saves about a hundred tokens per prompt.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from random import Random

import sentencepiece

from mmmamba_cli.processing.chat_template import DEFAULT_SYSTEM
from mmmamba_cli.processing.processor_loader import INTERNVL_TOKENS
from mmmamba_evals.scenes.lessons import draw_lesson
from mmmamba_evals.scenes.long_inputs import WHAT_NEEDLE, draw_pictures, draw_text
from mmmamba_evals.scenes.world import World

PIECES = 1000
LESSONS = 6000
# Repetitions of all words of the world, so that most become single pieces.
REPEATS = 40


def corpus(world: World, seed: int) -> list[str]:
    """Questions and answers in the format of the training."""
    rng = Random(seed)
    lines = []
    for _ in range(LESSONS):
        _, asked = draw_lesson(rng, world)
        for one in asked:
            lines += [one.text, f"assistant\n{one.answer}"]
    for _ in range(LESSONS // 20):
        lines += [one.text for one in draw_pictures(rng, world, 2)[1]]
        text, asked_pair, _ = draw_text(rng, world, 8)
        lines += [text, WHAT_NEEDLE, *(one.text for one in asked_pair)]
    return lines + [" ".join((*world.words, *world.classes))] * REPEATS


def train_tokenizer(lines: list[str]) -> bytes:
    """A SentencePiece model as bytes; the same for the same lines."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", *DEFAULT_SYSTEM.split(" ")],
        hard_vocab_limit=False,
        max_sentence_length=100_000,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(folder: Path, model: bytes) -> dict[str, int]:
    """Write both files; returns the ids of the special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    ids = {token: pieces + i for i, token in enumerate(INTERNVL_TOKENS)}
    (folder / "added_tokens.json").write_text(json.dumps(ids, indent=2) + "\n")
    return ids


def main() -> None:
    from world import training_world

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--atlas", type=Path, action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    _, world = training_world(given.atlas)
    write_tokenizer(given.out, train_tokenizer(corpus(world, given.seed)))


if __name__ == "__main__":
    main()
