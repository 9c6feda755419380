"""Corrupted tokenizers, processors and generation configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from case import Case, numbers, outcome
from materials import Materials
from mutations import same_json, spoil_bytes, spoil_json

CaseOf = Callable[[str, int], Case]
CODE = "from pathlib import Path\nPath({canary!r}).touch()\nclass Any: pass\n"
# Files by material.
FILES = {
    "hovle": ("tokenizer.model", "added_tokens.json", "tokenizer_config.json"),
    "internlm2": ("tokenizer.model", "tokenizer_config.json", "generation_config.json"),
    "llama": ("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    "own": (
        "tokenizer.model",
        "tokenizer_config.json",
        "processor_config.json",
        "generation_config.json",
        "source_config.json",
    ),
}


def use(case: Case, kind: str, folder: Path) -> str | None:
    """Use the tokenizer: seed the teacher, or export a product."""
    if kind == "own":
        words = ("export", "--model", folder, "--format", "hub", "--out", case.home / "out")
    else:
        words = ("seed", folder, "--run", case.home / "run", "--no-report")
    done = case.command(*words, "--json")
    if done.code:
        return None
    found = outcome(done)
    return str(found.get("content_hash") or found["product"]["content_hash"])


@pytest.mark.parametrize("number", numbers(21))
@pytest.mark.parametrize("kind", FILES)
def test_spoiled(case_of: CaseOf, materials: Materials, kind: str, number: int) -> None:
    case = case_of(f"{kind}-tokenizer", number)
    folder = case.copy(getattr(materials, kind))
    file = folder / FILES[kind][number % len(FILES[kind])]
    case.done.append(file.name)
    if file.suffix == ".model":
        file.write_bytes(spoil_bytes(case.rng, file.read_bytes(), case.done))
    else:
        tree = json.loads(file.read_text()) if file.is_file() else {"bos_token": "<s>"}
        file.write_bytes(spoil_json(case.rng, tree, case.done))
    use(case, kind, folder)


@pytest.mark.parametrize("number", numbers(4))
@pytest.mark.parametrize("kind", FILES)
def test_code_beside_it(case_of: CaseOf, materials: Materials, kind: str, number: int) -> None:
    """Code referenced by a config is never run, whether the folder is accepted or refused."""
    case = case_of(f"{kind}-code", number)
    folder = case.copy(getattr(materials, kind))
    (folder / "evil.py").write_text(CODE.format(canary=str(case.canary)))
    files = ("config.json", "tokenizer_config.json", "processor_config.json")
    name = files[number % 3]
    file = folder / name
    tree = json.loads(file.read_text()) if file.is_file() else {}
    classes = ("AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoModel")
    tree["auto_map"] = dict.fromkeys(classes, "evil.Any") | {
        "AutoTokenizer": ["evil.Any", "evil.Any"]
    }
    if number == 3:
        tree["tokenizer_class"] = tree["processor_class"] = "evil.Any"
        (folder / "tokenizer.json").unlink(missing_ok=True)
    file.write_text(json.dumps(tree))
    case.done.append(f"auto_map in {name}")
    use(case, kind, folder)


@pytest.mark.parametrize("kind", FILES)
def test_the_same(case_of: CaseOf, materials: Materials, kind: str) -> None:
    case = case_of(f"{kind}-same-tokenizer", 0)
    folder = case.copy(getattr(materials, kind))
    for name in FILES[kind]:
        file = folder / name
        # The order of merges in tokenizer.json matters; the order of keys does not.
        if file.suffix == ".json" and file.is_file():
            file.write_bytes(same_json(case.rng, json.loads(file.read_text()), case.done))
    assert use(case, kind, folder) is not None
