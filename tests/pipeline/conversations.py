"""Small sets of conversations with pictures, as files."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image

WORDS = ("a", "red", "cat", "sits", "on", "the", "old", "table", "near", "green", "apples")


def write_conversations(
    folder: Path, samples: int, seed: int = 0, name: str = "train", pictures: bool = True
) -> Path:
    """Write `name.jsonl` of questions; with `pictures`, every second one has one in `images/`."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(samples):
        answer = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
        record: dict[str, object] = {"id": index}
        question = "What is it?"
        if pictures and index % 2:
            picture = f"images/{name}-{index}.png"
            size = rng.choice([(40, 40), (90, 45)])
            colour = tuple(rng.randrange(256) for _ in range(3))
            Image.new("RGB", size, colour).save(folder / picture)
            record["image"] = picture
            question = f"<image>\n{question}"
        record["conversations"] = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer},
        ]
        lines.append(json.dumps(record))
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file
