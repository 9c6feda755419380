"""Regression tests for bugs that fuzzing found."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from case import Case, outcome
from materials import Materials
from mutations import put
from suite_tables import pope_rows, write_tsv
from test_fuzz_checkpoints import write_shards
from test_fuzz_suites import answers, write_book
from test_fuzz_tokenizers import use

from mmmamba_cli.evaluate.vlmeval_table import split_cell
from mmmamba_cli.runs import Run

CaseOf = Callable[[str, int], Case]
# Material, file, path in it, value there, and words of the message.
SPOILED: list[tuple[str, str, str, Any, str]] = [
    ("hovle", "config.json", "llm_config.rope_scaling.type", {"a": 1}, "rope_scaling"),
    ("hovle", "config.json", "llm_config.pad_token_id", "two", "pad_token_id"),
    ("hovle", "config.json", "llm_config.num_hidden_layers", 10**9, "num_hidden_layers"),
    ("hovle", "config.json", "llm_config.vocab_size", 10**30, "vocab_size"),
    ("hovle", "config.json", "embedding_config.special_token_maps", 3, "special_token_maps"),
    ("hovle", "config.json", "embedding_config.downsample_ratio", 1e-320, "downsample_ratio"),
    ("hovle", "config.json", "llm_config.rms_norm_eps", float("inf"), "rms_norm_eps"),
    ("hovle", "added_tokens.json", "<img>", [526], "added_tokens.json"),
    ("hovle", "tokenizer_config.json", "bos_token", ["<s>"], "bos_token"),
    ("hovle", "tokenizer_config.json", "added_tokens_decoder", 3, "added_tokens_decoder"),
    ("llama", "config.json", "layer_types", 3, "layer_types"),
    ("llama", "config.json", "eos_token_id", 0.5, "eos_token_id"),
    ("qwen2", "config.json", "num_hidden_layers", 10**9, "num_hidden_layers"),
    ("llama", "tokenizer.json", "model", 3, "tokenizer.json"),
    ("llama", "tokenizer_config.json", "model_max_length", ["long"], "model_max_length"),
    ("llama", "generation_config.json", "eos_token_id", "2", "eos_token_id"),
    ("own", "config.json", "language_stack.surprise", 1, "language_stack.surprise"),
    ("own", "config.json", "language_stack.num_heads", None, "language_stack.num_heads"),
    ("own", "config.json", "language_stack.num_kv_heads", 3, "key-value heads"),
    ("own", "config.json", "vision.pixel_shuffle", "beside", "pixel_shuffle"),
    ("own", "config.json", "vision.image_token_id", [3], "image_token_id"),
    ("own", "config.json", "layer_types", "full_attention", "layer_types"),
    ("own", "config.json", "dtype", [[]], "transformers cannot read"),
    ("own", "config.json", "hidden_size", 2**31 - 1, "config.json"),
    ("own", "source_config.json", "template", "\ud800", "source_config.json"),
    ("own", "processor_config.json", "image_size", [], "processor_config.json"),
    ("own", "tokenizer_config.json", "added_tokens_decoder", {"x": 1}, "tokenizer"),
]


@pytest.mark.parametrize(("kind", "name", "place", "value", "said"), SPOILED)
def test_one_field(
    case_of: CaseOf,
    materials: Materials,
    kind: str,
    name: str,
    place: str,
    value: Any,
    said: str,
) -> None:
    case = case_of(f"{kind} {name} {place}", 0)
    folder = case.copy(getattr(materials, kind))
    file = folder / name
    tree = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(put(tree, tuple(place.split(".")), value)))
    assert use(case, kind, folder) is None
    assert said in case.last.err


def test_a_state_dict_that_contains_itself(case_of: CaseOf, materials: Materials) -> None:
    case = case_of("circle", 0)
    folder = case.copy(materials.hovle)
    circle: dict[str, Any] = {}
    circle["state_dict"] = {"model": circle}
    torch.save(circle, folder / "hovle.ckpt")
    done = case.command("seed", folder / "hovle.ckpt", "--run", case.home / "run")
    assert done.code == 2


def test_names_that_a_terminal_would_obey(case_of: CaseOf, materials: Materials) -> None:
    case = case_of("escapes", 0)
    folder = case.copy(materials.hovle)
    torch.save({"\x1b[2J\x07": torch.ones(2), "x" * 9000: torch.ones(2)}, folder / "hovle.ckpt")
    done = case.command("seed", folder / "hovle.ckpt", "--run", case.home / "run")
    assert "\\x1b[2J\\x07" in done.err and "xxx..." in done.err


@pytest.mark.parametrize("rest", [struct.pack("<QQ", 0, 2**60), struct.pack("<QQ", 2**60, 0)])
def test_a_gguf_that_announces_what_it_does_not_hold(case_of: CaseOf, rest: bytes) -> None:
    case = case_of("gguf", 0)
    file = case.home / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<I", 3) + rest)
    done = case.command("seed", file, "--run", case.home / "run")
    assert "cannot be read as GGUF" in done.err


def test_a_gguf_with_an_endless_array(case_of: CaseOf) -> None:
    case = case_of("gguf-array", 0)
    file = case.home / "model.gguf"
    array = struct.pack("<Q", 1) + b"y" + struct.pack("<IIQ", 9, 8, 2**58)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    done = case.command("seed", file, "--run", case.home / "run")
    assert "more items of an array than it holds" in done.err


@pytest.mark.parametrize("value", ["!!float x", "!!int x", "!!bool 3", "!!timestamp never"])
def test_a_tag_that_does_not_fit(case_of: CaseOf, value: str) -> None:
    case = case_of("tag", 0)
    (case.home / "recipe.yaml").write_text(f"seed: {value}\n")
    done = case.command("recipe", "validate", case.home / "recipe.yaml")
    assert done.code == 2 and "tag" in done.err


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch canary']",
        "!!python/object/apply:builtins.open ['canary', 'w']",
        "!!python/name:os.system",
    ],
)
def test_a_tag_that_calls(case_of: CaseOf, value: str) -> None:
    case = case_of("tag-calls", 0)
    (case.home / "recipe.yaml").write_text(f"description: {value}\n")
    done = case.command("recipe", "validate", case.home / "recipe.yaml")
    assert done.code == 2 and "constructor" in done.err


def test_good_shards_outside_the_folder(case_of: CaseOf, materials: Materials) -> None:
    """Shards outside the folder are refused even if they exist and fit."""
    case = case_of("outside-shards", 0)
    folder = case.copy(materials.hovle)
    index = write_shards(folder, 1)
    shard = next(folder.glob("model-*.safetensors"))
    shard.rename(case.home / shard.name)
    for place in (f"../{shard.name}", str(case.home / shard.name)):
        index["weight_map"] = dict.fromkeys(index["weight_map"], place)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        done = case.command("seed", folder, "--run", case.home / "run", "--no-report")
        assert "outside its folder" in done.err


def manifest_of(run: Path, product: str) -> tuple[Path, dict[str, Any]]:
    file = run / "products" / product / "manifest.json"
    return file, json.loads(file.read_text())


def test_a_product_made_of_itself(case_of: CaseOf, materials: Materials) -> None:
    """`hybridize` twice: the second product would replace its parent."""
    case = case_of("itself", 0)
    run = case.copy(materials.run, "run")
    words = ("hybridize", "--run", run, "--attn-layers", 1, "--overwrite")
    assert "made of itself" in case.command(*words).err
    assert case.command(*words, "--from", "seed").code == 0


def test_a_lineage_in_a_circle(case_of: CaseOf, materials: Materials) -> None:
    case = case_of("lineage-circle", 0)
    run = case.copy(materials.run, "run")
    file, found = manifest_of(run, "hybrid-1")
    parent = {"role": "student", "name": "hybrid-1", "content_hash": found["content_hash"]}
    file.write_text(json.dumps({**found, "parents": [parent]}))
    done = case.command("hybridize", "--run", run, "--layers", "1,2")
    assert "no ancestor" in done.err
    words = ("--format", "mmmamba-hf", "--out", case.home / "out")
    assert case.command("export", "--run", run, *words).code == 0


def test_a_parent_without_a_role(case_of: CaseOf, materials: Materials) -> None:
    case = case_of("role", 0)
    run = case.copy(materials.run, "run")
    file, found = manifest_of(run, "hybrid-1")
    del found["parents"][0]["role"]
    file.write_text(json.dumps(found))
    assert "parents.0.role" in case.command("status", "--run", run).err


@pytest.mark.parametrize("name", ["../../elsewhere", "seed"])
def test_a_product_that_is_called_otherwise(
    case_of: CaseOf, materials: Materials, name: str
) -> None:
    """The name in a manifest pointed to a folder outside the run."""
    case = case_of("called", 0)
    run = case.copy(materials.run, "run")
    case.copy(materials.own, "elsewhere")
    file, found = manifest_of(run, "hybrid-1")
    file.write_text(json.dumps({**found, "name": name}))
    done = case.command("hybridize", "--run", run, "--layers", "0,1")
    assert "calls itself" in done.err


def test_a_current_product_outside_the_run(case_of: CaseOf, materials: Materials) -> None:
    case = case_of("outside", 0)
    run = case.copy(materials.run, "run")
    case.copy(materials.own, "elsewhere")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "current": "../../elsewhere"}))
    words = ("--format", "mmmamba-hf", "--out", case.home / "out")
    assert "has no product" in case.command("export", "--run", run, *words).err
    with pytest.raises(Exception, match="has no product"):
        Run(run).product("../../elsewhere")


def test_a_dtype_that_is_none(case_of: CaseOf, materials: Materials) -> None:
    case = case_of("dtype", 0)
    run = case.copy(materials.run, "run")
    file, found = manifest_of(run, "hybrid-1")
    file.write_text(json.dumps({**found, "dtype": "nn"}))
    done = case.command("hybridize", "--run", run, "--layers", "0,1")
    assert "dtype 'nn' is not known" in done.err


def test_a_range_of_shards_without_end(case_of: CaseOf, materials: Materials) -> None:
    case = case_of("range", 0)
    source = case.home / "part-{0..99999999999}.tar"
    done = case.command("data", "check", source, "--model", materials.hovle)
    assert "names more than" in done.err


def test_a_list_that_python_cannot_read() -> None:
    assert split_cell("[{[]: 1}]") == ["[{[]: 1}]"]
    assert split_cell("[" * 5000 + "]" * 5000) == ["[" * 5000 + "]" * 5000]


def test_a_picture_of_a_name_too_long(case_of: CaseOf, scripted: None) -> None:
    case = case_of("long-name", 0)
    rows = [{**row, "image": "", "image_path": "x" * 400} for row in pope_rows()]
    write_tsv(case.home / "data/POPE.tsv", rows)
    words = ("--suite", "pope", "--model", "student", "--data", case.home / "data")
    done = case.command("eval", *words, "--out", case.home / "out")
    assert "is in none of" in done.err


def test_a_workbook_that_is_damaged_inside(case_of: CaseOf) -> None:
    case = case_of("workbook", 0)
    rows = pope_rows()
    write_tsv(case.home / "data/POPE.tsv", rows)
    file = case.home / "answers.xlsx"
    write_book(file, answers(rows))
    content = file.read_bytes()
    at = content.index(b"xl/worksheets/sheet1.xml") + 40
    file.write_bytes(content[:at] + b"\xff" * 60 + content[at + 60 :])
    words = ("--suite", "pope", "--data", case.home / "data", "--out", case.home / "out")
    done = case.command("eval", *words, "--predictions", file)
    assert "XLSX" in done.err


def test_an_answer_nested_without_end(case_of: CaseOf) -> None:
    case = case_of("nested", 0)
    write_tsv(case.home / "data/POPE.tsv", pope_rows())
    file = case.home / "answers.jsonl"
    file.write_text("[" * 100_000)
    words = ("--suite", "pope", "--data", case.home / "data", "--out", case.home / "out")
    assert "is not JSON" in case.command("eval", *words, "--predictions", file).err


def test_a_good_picture_in_a_good_table(case_of: CaseOf, scripted: None) -> None:
    """Control for the two tests above."""
    case = case_of("good", 0)
    rows = pope_rows()
    assert base64.b64decode(rows[0]["image"])
    write_tsv(case.home / "data/POPE.tsv", rows)
    words = ("--suite", "pope", "--model", "student", "--data", case.home / "data", "--json")
    done = case.command("eval", *words, "--out", case.home / "out")
    assert outcome(done)["results"][0]["suite"] == "pope"
