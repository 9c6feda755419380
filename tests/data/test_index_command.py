"""`mmmamba data index`, and who finds the index: `distill`, `data check`, other commands."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conversations import write_conversations
from test_as_a_new_user import write_teacher
from typer.testing import CliRunner

from mmmamba_cli.checkpoint import open_any_checkpoint
from mmmamba_cli.cli.app import app
from mmmamba_cli.data import (
    CorpusSpec,
    FoundIndex,
    GeneratedCorpus,
    StepLoader,
    check_data,
    find_index,
    index_key,
    index_summary,
    jsonl,
    open_corpus,
    read_index,
)
from mmmamba_cli.distill.stage_loaders import build_loaders
from mmmamba_cli.distributed import World
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.processing import HolisticVLMProcessor
from mmmamba_cli.recipe import load_recipe
from mmmamba_cli.runs import open_training_processor

CPU = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher")) / "hovle.ckpt"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_conversations(tmp_path / "data", 20)


def run_index(data: Path | str, teacher: Path, *more: object) -> Result:
    root = () if "--image-root" in more else ("--image-root", Path(data).parent)
    words = ("data", "index", data, *root, "--model", teacher, "--workers", 0, *more)
    return CliRunner().invoke(app, [str(word) for word in words])


def built(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def loaders(
    teacher: Path, data: Path, *sets: str, world: World = CPU
) -> tuple[StepLoader, StepLoader | None, str]:
    """The loaders of a stage, and what was printed."""
    said: list[str] = []
    fields = {"data.train": str(data), "data.image_root": str(data.parent), "data.workers": "0"}
    texts = [f"{name}={value}" for name, value in fields.items()]
    recipe = load_recipe("mmmamba-linear", [*texts, *sets])
    student = open_any_checkpoint(teacher)
    found = build_loaders(student, recipe, recipe.stages[0], world, said.append)
    return *found, "\n".join(said)


def test_an_index_is_built_once(data: Path, teacher: Path) -> None:
    result = run_index(data, teacher, "--json")
    found = built(result)
    file = Path(found.pop("file"))
    assert "counting tokens: 20/20 samples" in result.stderr
    assert file.parent == data.parent and file.name.startswith("train.jsonl.")
    processor = open_training_processor(open_any_checkpoint(teacher))
    assert processor is not None
    corpus = open_corpus(data, data.parent)
    report = check_data(corpus, processor, 1 << 40)
    assert found == {
        "built": True,
        "samples": 20,
        "images": 10,
        "tiles": report.tiles,
        "tokens": report.tokens,
        "longest": max(report.lengths),
        "cut": 0,
        "bad": 0,
    }
    written = file.stat().st_mtime_ns
    again = run_index(data, teacher)
    assert again.exit_code == 0 and f"{file} is already there" in again.stdout
    assert file.stat().st_mtime_ns == written
    assert built(run_index(data, teacher, "--json", "--overwrite"))["built"] is True
    assert file.stat().st_mtime_ns != written
    assert [each.name for each in data.parent.iterdir() if ".index" in each.name] == [file.name]
    # A damaged one is replaced.
    file.write_bytes(file.read_bytes()[:100])
    assert built(run_index(data, teacher, "--json"))["built"] is True


def test_distill_finds_it(data: Path, teacher: Path) -> None:
    _, held_out, said = loaders(teacher, data, f"data.held_out={data}")
    assert said == "" and held_out is not None
    file = built(run_index(data, teacher, "--json"))["file"]
    loader, held_out, said = loaders(teacher, data, f"data.held_out={data}")
    assert (
        said.splitlines()
        == [f"data index: {file}, each process prepares only its share of a batch"] * 2
    )
    assert loader._index is not None and held_out is not None and held_out._index is not None
    assert loader._index.to_bytes() == read_index(Path(file)).to_bytes()


class OtherProcess(World):
    """Rank 1 of 2: process 0 has found `found`, and could not open it if there is a `problem`."""

    def __init__(self, found: FoundIndex, problem: str | None = None):
        super().__init__(torch.device("cpu"), rank=1, size=2)
        object.__setattr__(self, "found", found)
        object.__setattr__(self, "problems", [problem] if problem else [])

    def run_on_main(self, work: Callable[[], Any]) -> Any:
        return vars(self)["found"]

    def all_gather(self, values: Sequence[Any]) -> list[Any]:
        return [*vars(self)["problems"], *values]


def test_other_processes_search_nothing(
    data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index has the positions of lines; unless each process can open it, none uses it."""
    file = Path(built(run_index(data, teacher, "--json"))["file"])
    expected = loaders(teacher, data)[0]
    searched: list[Path] = []
    search = jsonl._index

    def counted(file: Path, size: int) -> Any:
        searched.append(file)
        return search(file, size)

    monkeypatch.setattr(jsonl, "_index", counted)
    loader, _, said = loaders(teacher, data, world=OtherProcess(FoundIndex(file)))
    assert not searched and said.startswith(f"data index: {file}, each")
    assert [loader.corpus[i] for i in range(20)] == [expected.corpus[i] for i in range(20)]
    assert [loader.corpus.name(i) for i in range(20)] == [
        expected.corpus.name(i) for i in range(20)
    ]
    for world in (
        OtherProcess(FoundIndex(file), "gone"),
        OtherProcess(FoundIndex(file.with_name("gone"))),
    ):
        loader, _, said = loaders(teacher, data, world=world)
        assert searched.pop() == data and loader._index is None
        assert said.startswith("data index: not used, ") and "gone" in said


def test_other_settings_have_another_index(data: Path, teacher: Path) -> None:
    whole = built(run_index(data, teacher, "--json"))
    loader, _, said = loaders(teacher, data, "data.max_tiles=1")
    assert loader._index is None
    assert said == (
        f"data index: {whole['file']} is not used: it was built with max_tiles None, expected 1; "
        f"`mmmamba data index {data} --image-root {data.parent} --max-tiles 1` builds another"
    )
    small = built(run_index(data, teacher, "--json", "--max-tiles", 1))
    assert small["file"] != whole["file"] and small["tokens"] < whole["tokens"]
    for sets, file in (((), whole["file"]), (("data.max_tiles=1",), small["file"])):
        assert loaders(teacher, data, *sets)[2].startswith(f"data index: {file}, each")


def test_a_stale_index_is_named_and_not_used(
    data: Path, teacher: Path, processor: HolisticVLMProcessor
) -> None:
    file = Path(built(run_index(data, teacher, "--json"))["file"])
    picture = data.parent / "images" / "train-3.png"
    text, pixels = data.read_bytes(), picture.read_bytes()
    changes = [(data, text.replace(b"What", b"Where", 1)), (picture, pixels[:-1] + b"?")]
    for path, content in changes:
        before = path.read_bytes()
        path.write_bytes(content)
        loader, _, said = loaders(teacher, data)
        assert loader._index is None
        assert f"{file} is not used: the data have changed since it was built" in said
        path.write_bytes(before)
    assert loaders(teacher, data)[0]._index is not None
    # Of another processor, with other tiles or words.
    corpus = open_corpus(data, data.parent)
    found = find_index(str(data), corpus, processor, None)
    assert found.file == file and not found.stale
    processor.tokenizer.chat_template, template = (
        "{{ messages }}",
        processor.tokenizer.chat_template,
    )
    try:
        found = find_index(str(data), corpus, processor, None)
    finally:
        processor.tokenizer.chat_template = template
    assert found.file is None and "another tokenizer, chat template or tiling" in found.stale[0]
    file.write_bytes(file.read_bytes()[:-1])
    loader, _, said = loaders(teacher, data)
    assert loader._index is None and "is not a complete data index" in said


def test_data_may_move_with_their_index(data: Path, teacher: Path, tmp_path: Path) -> None:
    file = Path(built(run_index(data, teacher, "--json"))["file"])
    moved = shutil.move(data.parent, tmp_path / "moved") / data.name
    assert f"{moved.parent / file.name}, each process" in loaders(teacher, moved)[2]


def test_a_folder_that_cannot_be_written(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access

    def read_only(path: Any, mode: int, **options: Any) -> bool:
        refused = mode == os.W_OK and path == data.parent
        return not refused and access(path, mode, **options)

    monkeypatch.setattr(os, "access", read_only)
    file = Path(built(run_index(data, teacher, "--json"))["file"])
    assert file.is_relative_to(tmp_path / "cache" / "mmmamba")
    assert str(file) in loaders(teacher, data)[2]
    # Another set of the same name does not see it.
    other = write_conversations(tmp_path / "other", 20, seed=1)
    assert loaders(teacher, other)[2] == ""


def test_data_check_names_it(data: Path, teacher: Path) -> None:
    words = ["data", "check", str(data), "--image-root", str(data.parent), "--model", str(teacher)]

    def checked(*more: str) -> str:
        result = CliRunner().invoke(app, [*words, *more])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert json.loads(checked("--json"))["index"] is None and "data index" not in checked()
    file = built(run_index(data, teacher, "--json"))["file"]
    assert json.loads(checked("--json"))["index"] == file
    assert f"data index: {file}" in checked().splitlines()
    stale = f"{file} is not used: it was built with max_tiles None, expected 1"
    assert stale in checked("--max-tiles", "1").splitlines()


def test_totals_for_other_commands(
    data: Path, teacher: Path, processor: HolisticVLMProcessor
) -> None:
    corpus = open_corpus(data, data.parent)
    assert index_summary(str(data), corpus, processor, 60) is None
    run_index(data, teacher)
    report = check_data(corpus, processor, 60, decode=False)
    found = index_summary(str(data), corpus, processor, 60)
    assert found is not None
    assert (found.tokens, found.cut, found.bad) == (report.tokens, report.cut, len(report.bad))
    assert report.cut and report.bad


def test_an_interrupted_command_leaves_nothing(
    data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = sorted(data.parent.iterdir())
    for name in ("mmmamba_cli.data.index_builder.content_digest", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(name, interrupted)
            assert run_index(data, teacher).exit_code == 130
        assert sorted(data.parent.iterdir()) == before


def test_sources_that_have_no_index(data: Path, teacher: Path) -> None:
    result = run_index(data.parent / "gone.jsonl", teacher)
    assert isinstance(result.exception, MmmambaError) and "gone.jsonl" in str(result.exception)
    spec = CorpusSpec("drawn:all", "drawn", "all", {})
    processor: Any = None
    drawn = GeneratedCorpus(spec, processor, None)
    with pytest.raises(MmmambaError, match="drawn:all makes its samples while training"):
        index_key(drawn, processor)
    run_index(data, teacher)
    assert find_index(str(data), drawn, processor) == FoundIndex(None)


def test_names_of_patterns(tmp_path: Path, teacher: Path, data: Path) -> None:
    """Several files of one source have one index, whose name has no pattern."""
    for part in range(2):
        with tarfile.open(data.parent / f"part-{part}.tar", "w") as tar:
            for line in data.read_text().splitlines()[::2]:
                record = tmp_path / "record.json"
                record.write_text(line)
                tar.add(record, f"{part}-{json.loads(line)['id']}.json")
    source = str(data.parent / "part-{0..1}.tar")
    found = built(run_index(source, teacher, "--json"))
    assert Path(found["file"]).name.startswith("part-_0..1_.tar.") and found["samples"] == 20
    assert f"data index: {found['file']}, each" in loaders(teacher, Path(source))[2]
