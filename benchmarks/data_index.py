"""Time, memory and size of a data index of many samples, and what it saves each process.

    python benchmarks/data_index.py --folder DIR [--samples 1700000] [--workers N]

Writes conversations of pseudo-words with references to 64 JPEG pictures into DIR (1.6 GB for
1.7 M), and a processor with HoVLE's template, tiling and control tokens, whose SentencePiece
vocabulary of 16,000 pieces is trained on these words. Builds the index, then prepares global
batches of 128 as each of 1, 2 and 8 processes, with and without it. Prints JSON. Memory is the
proportional set size of this process and its workers together, sampled every 0.25 s; imports are
part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image

from mmmamba_cli.data import (
    SampleIndex,
    StepLoader,
    build_index,
    index_file,
    index_key,
    open_corpus,
    read_index,
)
from mmmamba_cli.data.holistic_collator import HolisticCollator
from mmmamba_cli.processing import HolisticVLMProcessor, processor_from_hovle

SEED = 0
PIECES = 16_000
NUM_WORDS, NUM_SENTENCES, NUM_PICTURES = 20_000, 20_000, 64
BATCH, MAX_LENGTH, STEPS = 128, 8192, 4
CONTROL_TOKENS = ("<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>")
# Tokens of InternVL's grounding; answers of detection data hold them.
GROUNDING_TOKENS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")


def make_sentences(rng: random.Random) -> list[str]:
    """Sentences of 4 to 24 pseudo-words, whose frequencies fall as 1 / rank."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(NUM_WORDS)]
    weights = [1 / rank for rank in range(1, NUM_WORDS + 1)]
    return [
        " ".join(rng.choices(words, weights, k=rng.randint(4, 24))).capitalize() + "."
        for _ in range(NUM_SENTENCES)
    ]


def make_processor(folder: Path, sentences: list[str]) -> HolisticVLMProcessor:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        # As the tokenizers of language models are trained, which must decode to the same text.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    names = (*CONTROL_TOKENS, *GROUNDING_TOKENS)
    added = {token: PIECES + number for number, token in enumerate(names)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    config = {
        "template": "internlm2-chat",
        "downsample_ratio": 0.5,
        "force_image_size": 448,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "embedding_config": {
            "image_size": 448,
            "patch_size": 14,
            "img_context_token_id": added["<IMG_CONTEXT>"],
        },
        "llm_config": {"vocab_size": PIECES + len(added)},
    }
    return processor_from_hovle(config, folder / "tokenizer.model")


def write_pictures(folder: Path, rng: random.Random) -> None:
    (folder / "images").mkdir(exist_ok=True)
    for number in range(NUM_PICTURES):
        width, height = rng.choice(((640, 480), (480, 640), (1024, 768), (336, 336), (1280, 400)))
        noise = np.random.default_rng(number).integers(0, 255, (height // 8, width // 8, 3))
        picture = Image.fromarray(noise.astype(np.uint8)).resize((width, height))
        picture.save(folder / "images" / f"{number}.jpg", quality=85)


def write_samples(folder: Path, count: int, sentences: list[str], rng: random.Random) -> Path:
    """One to six questions; 70 % of samples with a picture, 5 % with two to four."""
    file = folder / "train.jsonl"
    with file.open("w", encoding="utf-8") as handle:
        for number in range(count):
            kind = rng.random()
            pictures = 1 if kind < 0.7 else rng.randint(2, 4) if kind < 0.75 else 0
            turns = []
            for turn in range(min(6, 1 + int(rng.expovariate(0.7)))):
                shown = "<image>\n" * pictures if turn == 0 else ""
                answer = " ".join(rng.choices(sentences, k=min(12, 1 + int(rng.expovariate(0.4)))))
                turns.append({"from": "human", "value": shown + rng.choice(sentences)})
                turns.append({"from": "gpt", "value": answer})
            record: dict[str, Any] = {"id": str(number), "conversations": turns}
            if pictures:
                names = [f"images/{rng.randrange(NUM_PICTURES)}.jpg" for _ in range(pictures)]
                record["image"] = names[0] if pictures == 1 else names
            handle.write(json.dumps(record) + "\n")
    return file


def proportional_bytes() -> int:
    """Proportional set size of this process and its children."""
    total = 0
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text(encoding="utf-8").split()
    for process in (me, *children):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


@contextmanager
def peak_memory(found: list[int]) -> Iterator[None]:
    """Append the largest `proportional_bytes` while the block runs."""
    ended, peak = threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(0.25):
            peak[0] = max(peak[0], proportional_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        found.append(peak[0])


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@contextmanager
def counted_encodings(found: list[int]) -> Iterator[None]:
    """Count encoded samples in `found[0]`, and decode nothing: that is shared out in any case."""
    encode, collate = HolisticCollator.encode, HolisticCollator.collate

    def counted(self: HolisticCollator, sample: Any) -> Any:
        found[0] += 1
        return encode(self, sample)

    HolisticCollator.encode = counted  # type: ignore[method-assign]
    HolisticCollator.collate = lambda self, rows: (None, [])  # type: ignore[method-assign,assign]
    try:
        yield
    finally:
        HolisticCollator.encode = encode  # type: ignore[method-assign]
        HolisticCollator.collate = collate  # type: ignore[method-assign]


def measure_preparation(
    file: Path, processor: HolisticVLMProcessor, index: SampleIndex | None, world: int
) -> dict[str, list[float]]:
    """For each process: encoded samples and CPU milliseconds of a step, means over steps."""
    corpus = open_corpus(file, file.parent, index=index)
    options: dict[str, Any] = {"batch_size": BATCH, "max_length": MAX_LENGTH, "batching": "packed"}
    encoded: list[float] = []
    milliseconds: list[float] = []
    for rank in range(world):
        loader = StepLoader(corpus, processor, **options, rank=rank, world_size=world, index=index)
        with counted_encodings([0]):
            # The order of a pass is drawn at the first step.
            loader.prepare(STEPS)
        count = [0]
        with counted_encodings(count):
            start = time.process_time()
            for step in range(STEPS):
                loader.prepare(step)
            milliseconds.append(round((time.process_time() - start) / STEPS * 1000, 1))
        encoded.append(count[0] / STEPS)
    return {"samples_encoded": encoded, "cpu_milliseconds": milliseconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=1_700_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    sentences = make_sentences(rng)
    processor = make_processor(given.folder, sentences)
    write_pictures(given.folder, rng)
    file = write_samples(given.folder, given.samples, sentences, rng)

    peaks: list[int] = []
    load = os.getloadavg()[0]
    start, used = time.perf_counter(), cpu_seconds()
    with peak_memory(peaks):
        corpus = open_corpus(file, given.folder)
        key = index_key(corpus, processor)
        opened = time.perf_counter() - start
        index = build_index(corpus, processor, key, workers=given.workers)
        path = index_file(str(file), key)
        path.write_bytes(index.to_bytes())
    seconds, used = time.perf_counter() - start, cpu_seconds() - used
    index = read_index(path)
    totals = index.summary(MAX_LENGTH)
    preparation = {
        str(world): {
            "without_index": measure_preparation(file, processor, None, world),
            "with_index": measure_preparation(file, processor, index, world),
        }
        for world in (1, 2, 8)
    }
    result = {
        "what": "index of conversations with pictures for a HoVLE processor, all steps included",
        "command": "python benchmarks/data_index.py --folder DIR"
        + (f" --samples {given.samples}" if given.samples != 1_700_000 else "")
        + (f" --workers {given.workers}" if given.workers != os.cpu_count() else ""),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"CPU, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "sentencepiece", "pillow")},
        },
        "seed": SEED,
        "load_average_before_and_after": [load, os.getloadavg()[0]],
        "workers": given.workers,
        "samples": totals.samples,
        "data_bytes": file.stat().st_size,
        "pictures": totals.images,
        "tiles": totals.tiles,
        "tokens": totals.tokens,
        "bad": totals.bad,
        "seconds": seconds,
        "seconds_to_open_and_hash": opened,
        "cpu_seconds": used,
        "cpu_microseconds_per_sample": used / totals.samples * 1e6,
        "peak_bytes_of_all_processes": peaks[0],
        "index_bytes": path.stat().st_size,
        "preparation_of_a_batch_of_128_by_each_process_of": preparation,
        "torch_threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
