"""The `hub` format of students of other teachers, loaded without this package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from exported_students import (
    ExportedStudent,
    card_code,
    computed_elsewhere,
    exported,
    inputs_of,
)
from families import FAMILIES, picture
from family_students import PLANS
from torch import Tensor

# Families with deepstack, with other names on disk, and of text.
WHOLE = ("qwen3_vl", "internvl", "qwen3")
FROM_CACHE = ("qwen3",)
# Families whose processor `AutoProcessor` or `AutoTokenizer` opens without torchvision.
WITH_CARD = ("gemma3", "qwen3")
PLAN_OF = {name: list(PLANS)[index % len(PLANS)] for index, name in enumerate(FAMILIES)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """A student's export, what it computes without this package, and the answer of its card."""

    student: ExportedStudent
    computed: dict[str, Tensor]
    card: str | None
    answer: Path


def has_processor(name: str) -> bool:
    """Whether the libraries that a family's processor needs are installed."""
    try:
        return FAMILIES[name].processor is not None
    except pytest.skip.Exception:
        return False


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All from one isolated process, whose start takes longer than its work."""
    work = tmp_path_factory.mktemp("students")
    picture(24, 16).save(work / "picture.png")
    students = {
        name: exported(name, PLAN_OF[name], work) for name in FAMILIES if has_processor(name)
    }
    cards = {name: card_code(students[name].folder, work / "picture.png") for name in WITH_CARD}
    computed = computed_elsewhere(
        list(students.values()), work, whole=WHOLE, from_cache=FROM_CACHE, cards=cards
    )
    return {
        name: Case(one, computed[name], cards.get(name), work / f"{name}.answer")
        for name, one in students.items()
    }


def case_of(name: str, cases: dict[str, Case]) -> Case:
    # Skips where the processor cannot be made, and says why.
    assert FAMILIES[name].processor is not None
    return cases[name]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_without_this_package(name: str, cases: dict[str, Case]) -> None:
    case = case_of(name, cases)
    inputs = inputs_of(case.student.family)
    assert torch.equal(case.computed["logits"], case.student.model(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", WHOLE)
def test_tokens_and_a_second_save_without_this_package(name: str, cases: dict[str, Case]) -> None:
    case = case_of(name, cases)
    family = case.student.family
    tokens = case.student.model.generate(**inputs_of(family), **family.generation(6))
    assert torch.equal(case.computed["tokens"], tokens)
    assert torch.equal(case.computed["again"], case.computed["logits"])


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_CARD)
def test_the_code_of_the_card_gives_the_same_answer(name: str, cases: dict[str, Case]) -> None:
    case, said = case_of(name, cases), []
    assert case.card is not None
    exec(case.card, {"print": said.append})
    assert said == [case.answer.read_text()] and len(said[0]) > 3


@torch.no_grad()
@pytest.mark.parametrize("name", WHOLE)
def test_this_package_loads_an_export_with_its_own_classes(
    name: str, cases: dict[str, Case]
) -> None:
    one = case_of(name, cases).student
    auto = getattr(transformers, one.auto)
    model = auto.from_pretrained(one.folder, trust_remote_code=True).eval()
    assert type(model) is type(one.model)
    inputs = inputs_of(one.family)
    assert torch.equal(model(**inputs).logits, one.model(**inputs).logits)


def test_code_of_the_used_mixers_only(cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        folder = case.student.folder
        text = (folder / "modeling_mmmamba.py").read_text()
        for mixer in ("mamba2", "gated_delta", "gla", "window"):
            assert (f"# mmmamba_cli/model/mixers/{mixer}\n" in text) == (mixer in PLAN_OF[name])
        maps = json.loads((folder / "config.json").read_text())["auto_map"]
        own = {file.stem for file in folder.glob("*.py")}
        assert {place.split(".")[0] for place in maps.values()} == {"modeling_mmmamba_student"}
        assert own >= {"modeling_mmmamba_student", "mmmamba_teachers", "mmmamba_ops"}
        assert len(own) < 9
