"""A package `vlmeval` with VLMEvalKit's documented interface, as far as an adapter meets it.

The kit itself is installed from source with 150 packages; its interface is small: a model base
class, a table of models, data sets that build prompts and score, and a job that runs one over the
other.
"""

from __future__ import annotations

from pathlib import Path

MODULES = {
    "__init__.py": "import ssl\nssl._create_default_https_context = None\n",
    "config.py": "supported_VLM = {}\n",
    "vlm/__init__.py": "",
    "vlm/base.py": """
class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image"]

    def use_custom_prompt(self, dataset):
        return False

    def build_prompt(self, line, dataset):
        raise NotImplementedError

    def set_dump_image(self, dump_image):
        self.dump_image_func = dump_image

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def generate_inner(self, message, dataset=None):
        raise NotImplementedError

    def generate(self, message, dataset=None):
        for item in message:
            assert set(item) == {"type", "value"}
            assert item["type"] in self.allowed_types
        return self.generate_inner(message, dataset)
""",
    "dataset/__init__.py": """
import base64, csv, os
from pathlib import Path

TYPES = {"MME": "Y/N", "POPE": "Y/N", "MMStar": "MCQ", "LLaVABench": "VQA"}


def DATASET_TYPE(dataset):
    return TYPES.get(dataset, "VQA")


class Dataset:
    def __init__(self, name):
        self.dataset_name = name
        file = Path(os.environ["LMUData"], name + ".tsv")
        csv.field_size_limit(1 << 30)
        with file.open(newline="") as handle:
            self.data = list(csv.DictReader(handle, delimiter="\\t"))
        images = {row["index"]: row["image"] for row in self.data}
        for row in self.data:
            row["image"] = images.get(row["image"], row["image"])
            row["hint"] = float("nan")
        self.root = file.parent / "images" / name

    def dump_image(self, line):
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / (line["index"] + ".jpg")
        path.write_bytes(base64.b64decode(line["image"]))
        return [str(path)]

    def build_prompt(self, line):
        return [
            {"type": "image", "value": self.dump_image(line)[0]},
            {"type": "text", "value": line["question"]},
        ]

    def evaluate(self, file, **judge):
        assert judge["model"] == "exact_matching"
        with open(file, newline="") as handle:
            rows = list(csv.DictReader(handle, delimiter="\\t"))
        hits = [row["prediction"] == row["answer"] for row in rows]
        return {"Overall": 100 * sum(hits) / len(hits)}


def build_dataset(name):
    return Dataset(name) if name in TYPES else None
""",
    "inference.py": """
import csv
import os


def infer_data_job(model, work_dir, model_name, dataset, verbose=False, api_nproc=4,
                   ignore_failed=False, use_vllm=False):
    model.set_dump_image(dataset.dump_image)
    name = dataset.dataset_name
    # As the kit does: answers that are there are not asked for again.
    if os.path.exists(f"{work_dir}/{model_name}_{name}.tsv"):
        return model
    for row in dataset.data:
        if model.use_custom_prompt(name):
            message = model.build_prompt(row, dataset=name)
        else:
            message = dataset.build_prompt(row)
        row["prediction"] = model.generate(message=message, dataset=name)
        row.pop("image")
    with open(f"{work_dir}/{model_name}_{name}.tsv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(dataset.data[0]), delimiter="\\t")
        writer.writeheader()
        writer.writerows(dataset.data)
    return model
""",
}


def write_package(folder: Path) -> Path:
    """Write `vlmeval` into a folder, which can then be put on the path."""
    for name, text in MODULES.items():
        file = folder / "vlmeval" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder
