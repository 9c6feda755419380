"""Exports of students of tiny teachers, and the program that loads them without this package."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, Family, prompts
from family_students import rows_of, student
from isolated_process import isolated_home, run_isolated
from safetensors.torch import load_file, save_file

from mmmamba_cli.checkpoint import open_any_checkpoint
from mmmamba_cli.export import export_checkpoint

# Loads each folder of a JSON list by the Auto classes and saves what it computes.
PROGRAM = """
import json, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
import transformers
torch.set_num_threads(1)
for one in json.loads(Path(sys.argv[1]).read_text()):
    auto = getattr(transformers, one["auto"])
    inputs = load_file(one["inputs"])
    def load(folder):
        model, info = auto.from_pretrained(
            folder, trust_remote_code=True, dtype="auto", output_loading_info=True
        )
        assert not any(info.values()), info
        assert type(model).__module__.startswith("transformers_modules.")
        return model.eval()
    model = load(one["folder"])
    found = {}
    with torch.no_grad():
        found["logits"] = model(**inputs).logits
        if one["card"]:
            said = {}
            exec(one["card"], {"print": lambda text: said.update(answer=text)})
            Path(one["out"]).with_suffix(".answer").write_text(said["answer"])
        if one["is_whole"]:
            found["tokens"] = model.generate(**inputs, **one["generation"])
            model.save_pretrained(one["again"])
            found["again"] = load(one["again"])(**inputs).logits
    save_file(found, one["out"])
assert not any(key.startswith("mmmamba_cli") for key in sys.modules)
"""


@dataclass(frozen=True)
class ExportedStudent:
    """A student of a family, the folder it was saved to, and that of its export."""

    family: Family
    model: Any
    saved: Path
    folder: Path

    @property
    def auto(self) -> str:
        return "AutoModelForImageTextToText" if self.family.pictures else "AutoModelForCausalLM"


def save_student(name: str, plan: str, folder: Path) -> Any:
    """Save a student in float32, with its processor, and return it."""
    model = copy.deepcopy(student(name, plan)).float()
    model.save_pretrained(folder)
    FAMILIES[name].processor.save_pretrained(folder)
    return model


def exported(name: str, plan: str, work: Path) -> ExportedStudent:
    """Save a student and export it."""
    saved, folder = work / name / "saved", work / name / "hub"
    model = save_student(name, plan, saved)
    export_checkpoint(open_any_checkpoint(saved), "hub", folder)
    return ExportedStudent(FAMILIES[name], model, saved, folder)


def card_code(folder: Path, picture: Path) -> str:
    """The code of a card, for its folder and a picture, with a short answer."""
    text = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    for old, new in (
        ("this folder, or its name on the Hub", str(folder)),
        ("picture.jpg", str(picture)),
        ("max_new_tokens=100", "max_new_tokens=8, min_new_tokens=8, do_sample=False"),
    ):
        text = text.replace(old, new)
    return text


def inputs_of(family: Family) -> dict[str, torch.Tensor]:
    """A batch of three padded rows, with pictures where the family takes them."""
    found = prompts(family, rows_of(family))
    return {name: value.contiguous() for name, value in found.items()}


def into_hub_cache(folder: Path, name: str) -> str:
    """Copy an export into the Hub's cache of isolated processes as `name`, and return that."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = isolated_home() / f"hf/hub/models--{name.replace('/', '--')}"
    shutil.copytree(folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    return name


def computed_elsewhere(
    students: list[ExportedStudent],
    work: Path,
    *,
    whole: tuple[str, ...],
    from_cache: tuple[str, ...],
    cards: dict[str, str],
) -> dict[str, dict[str, torch.Tensor]]:
    """What the exports compute in a process without this package, by family.

    Those in `whole` also generate, and are saved and loaded again. One `from_cache` is loaded by
    its name on the Hub, for which transformers takes the code file by file. `cards` has the code
    of the cards of families, whose answers are in `FAMILY.answer` below `work`.
    """
    asked = []
    names = {
        one.family.name: into_hub_cache(one.folder, f"someone/my.{one.family.name}-1")
        for one in students
        if one.family.name in from_cache
    }
    for one in students:
        name = one.family.name
        save_file(inputs_of(one.family), work / f"{name}.inputs")
        asked.append(
            {
                "folder": names.get(name, str(one.folder)),
                "auto": one.auto,
                "inputs": str(work / f"{name}.inputs"),
                "generation": one.family.generation(6),
                "is_whole": name in whole,
                "card": cards.get(name),
                "again": str(work / name / "again"),
                "out": str(work / f"{name}.out"),
            }
        )
    (work / "asked.json").write_text(json.dumps(asked))
    run_isolated(PROGRAM, work / "asked.json")
    return {one.family.name: load_file(work / f"{one.family.name}.out") for one in students}
