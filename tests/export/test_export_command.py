"""`mmmamba export`: atomic writes, refusals, uploads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_runs import CASE, mmmamba
from safetensors.torch import load_file, save_file

from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.checkpoint.tensor_info import format_size
from mmmamba_cli.errors import CheckpointError, RunError
from mmmamba_cli.runs import Run


def test_json_output(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--run", run, "--format", "hub", "--out", out, "--json")
    done = mmmamba("export", *words)
    found = json.loads(done.stdout)
    assert found["format"] == "hub" and found["folder"] == str(out) and found["pushed"] is None
    assert found["content_hash"] == Run(run).product("hybrid-2").content_hash
    assert found["tensors"] == len(open_checkpoint(out).source.names)
    assert found["nbytes"] == sum(t.nbytes for t in load_file(out / "model.safetensors").values())
    assert "never distilled end to end" in done.stderr and "no tokenizer" in done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["content_hash"] == found["content_hash"] and manifest["dtype"] == "float32"
    found = json.loads(mmmamba("export", *words, "--overwrite", "--dtype", "bf16").stdout)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["content_hash"] == found["content_hash"] and manifest["dtype"] == "bfloat16"


def test_from_takes_another_product(run: Path, tmp_path: Path) -> None:
    words = ("--run", run, "--format", "mmmamba-hf", "--from", "seed", "--out", tmp_path / "out")
    mmmamba("export", *words)
    assert open_checkpoint(tmp_path / "out").config.attention_layers == ()


def test_existing_files_stay_without_overwrite(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    words = ("--run", run, "--format", "hub", "--out", out)
    with pytest.raises(CheckpointError, match=r"already exists .--overwrite replaces it"):
        mmmamba("export", *words)
    with pytest.raises(CheckpointError, match=r"did not write: mine\.txt .move what is to be kept"):
        mmmamba("export", *words, "--overwrite")
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    mmmamba("export", *words, "--overwrite")
    assert (out / "config.json").is_file()


def test_only_an_export_is_replaced(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--run", run, "--format", "hub", "--out", out, "--overwrite")
    mmmamba("export", *words)
    mmmamba("export", *words, "--dtype", "bf16")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    changes: dict[str, Any] = {
        "notes.txt": lambda: (out / "notes.txt").write_text("mine"),
        ".git/": lambda: (out / ".git/objects").mkdir(parents=True),
        "README.md (changed since)": lambda: (out / "README.md").write_text("my own card"),
        "config.json (changed since)": lambda: (out / "config.json").write_text("{}"),
    }
    for name, change in changes.items():
        change()
        with pytest.raises(CheckpointError) as raised:
            mmmamba("export", *words)
        assert f"did not write: {name} (move what" in str(raised.value)
        shutil.rmtree(out)
        out.mkdir()
        for file, content in before.items():
            (out / file).write_bytes(content)
    mmmamba("export", *words)


def test_an_export_without_a_record_is_known_by_its_card(run: Path, tmp_path: Path) -> None:
    """Older versions wrote no record."""
    out = tmp_path / "out"
    words = ("--run", run, "--format", "hub", "--out", out, "--overwrite")
    mmmamba("export", *words)
    (out / "mmmamba_export.json").unlink()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"did not write: notes\.txt \("):
        mmmamba("export", *words)
    (out / "notes.txt").unlink()
    mmmamba("export", *words)
    (out / "mmmamba_export.json").unlink()
    (out / "README.md").write_text("# Mine\n")
    with pytest.raises(CheckpointError, match=r"did not write: README\.md, "):
        mmmamba("export", *words)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (".", "is the working directory"),
        ("..", "holds the working directory"),
        ("~", "is the home folder"),
        ("~/..", "holds the home folder"),
    ],
)
def test_working_directory_and_home_are_never_replaced(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, said: str
) -> None:
    """Even if the folder is an export."""
    out = tmp_path / "out"
    words = ("--run", run, "--format", "hub", "--overwrite")
    mmmamba("export", *words, "--out", out)
    home = out if place.startswith("~") else tmp_path / "home"
    work = tmp_path / "elsewhere" if place.startswith("~") else out
    if place.endswith(".."):
        (out / "deep").mkdir()
        home, work = (out / "deep", work) if place == "~/.." else (home, out / "deep")
    home.mkdir(exist_ok=True)
    work.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    with pytest.raises(CheckpointError, match=said):
        mmmamba("export", *words, "--out", Path(place).expanduser())
    assert (out / "model.safetensors").is_file()


def test_a_folder_that_holds_the_run_is_never_replaced(tmp_path: Path, run: Path) -> None:
    words = ("--model", CASE, "--format", "hub", "--out", run.parent, "--overwrite")
    with pytest.raises(CheckpointError, match=r"did not write: run/ \("):
        mmmamba("export", *words)
    assert (run / "run.json").is_file()


@pytest.mark.parametrize("place", [".", "products", "products/hybrid-2"])
def test_the_source_is_never_overwritten(run: Path, place: str) -> None:
    words = ("--format", "hub", "--out", run / place, "--overwrite")
    with pytest.raises(CheckpointError, match="holds what is being exported"):
        mmmamba("export", "--run", run, *words)
    assert (run / "products/hybrid-2/model.safetensors").is_file()


@pytest.mark.parametrize("form", ["hub", "mmmamba-hf"])
def test_a_failure_leaves_nothing(
    run: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmmamba_cli.export import exporter

    def fail(*_: Any) -> str:
        raise OSError("the disk is gone")

    monkeypatch.setattr(exporter, "card_text", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        mmmamba("export", "--run", run, "--format", form, "--out", tmp_path / "new/out")
    assert not (tmp_path / "new").exists()


def test_a_product_that_was_changed_is_refused(run: Path, tmp_path: Path) -> None:
    file = run / "products/hybrid-2/model.safetensors"
    state = load_file(file)
    state["model.norm.weight"][0] += 1
    save_file(state, file)
    with pytest.raises(RunError, match="was changed since it was written"):
        mmmamba("export", "--run", run, "--format", "mmmamba-hf", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_do_not_fit_the_dtype_are_refused(run: Path, tmp_path: Path) -> None:
    state = load_file(run / "products/seed/model.safetensors")
    state["model.norm.weight"][0] = 1e6
    save_file(state, run / "products/seed/model.safetensors")
    words = ("--model", run / "products/seed", "--format", "mmmamba-hf", "--out", tmp_path / "out")
    with pytest.raises(CheckpointError, match="do not fit into float16"):
        mmmamba("export", *words, "--dtype", "fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (("--from", "seed", "--model", CASE), RunError, "--from and --model exclude each other"),
        (("--from", "none"), RunError, "has no product 'none'"),
        (("--dtype", "int3"), CheckpointError, "dtype 'int3' is not known"),
        (("--push", "nameless"), CheckpointError, "'nameless' is no repository"),
        (("--push", "a/b@c"), CheckpointError, "'a/b@c' is no repository"),
    ],
)
def test_invalid_options(
    run: Path, tmp_path: Path, words: tuple[object, ...], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        mmmamba("export", "--run", run, "--format", "hub", "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


# Model card.


# Upload.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Fake huggingface_hub functions for uploads; the upload raises `error` if set."""
    import huggingface_hub

    asked: dict[str, Any] = {"error": None}

    def create_repo(repository: str, **options: Any) -> str:
        asked["made"] = (repository, options)
        return f"address of {repository}"

    def upload_folder(**options: Any) -> None:
        if asked["error"] is not None:
            raise asked["error"]
        asked["sent"] = options
        asked["files"] = sorted(file.name for file in Path(options["folder_path"]).iterdir())

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return asked


def push(run: Path, out: Path, *words: object) -> Any:
    options = ("--format", "hub", "--push", "someone/model", "--json")
    return mmmamba("export", "--run", run, "--out", out, *options, *words)


def test_a_push_sends_the_whole_folder(run: Path, tmp_path: Path, hub: dict[str, Any]) -> None:
    done = push(run, tmp_path / "out", "--private")
    assert hub["made"] == ("someone/model", {"private": True, "exist_ok": True})
    assert hub["sent"]["repo_id"] == "someone/model"
    assert hub["files"] == sorted(file.name for file in (tmp_path / "out").iterdir())
    assert json.loads(done.stdout)["pushed"] == "address of someone/model"
    assert "hf_secret" not in done.output + str(hub["sent"])


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("LocalTokenNotFoundError", None, "was not pushed: there is no token .log in"),
        ("HfHubHTTPError", 403, "does not let you write to someone/model"),
        ("RepositoryNotFoundError", 401, "does not let you write to someone/model"),
        ("HfHubHTTPError", 500, "could not be written to .status 500"),
        ("OfflineModeIsEnabled", None, "could not be written to .OfflineModeIsEnabled"),
    ],
)
def test_hub_errors_without_the_token(
    run: Path, tmp_path: Path, hub: dict[str, Any], name: str, status: int | None, said: str
) -> None:
    from types import SimpleNamespace

    from huggingface_hub import errors

    kind = getattr(errors, name)
    error = kind.__new__(kind)
    error.args = ("Authorization: Bearer hf_secret",)
    if status is not None:
        error.response = SimpleNamespace(status_code=status)
    hub["error"] = error
    with pytest.raises(CheckpointError, match=said) as raised:
        push(run, tmp_path / "out")
    assert "hf_secret" not in str(raised.value)
    assert (tmp_path / "out/config.json").is_file()


def test_progress_and_text_output(run: Path, tmp_path: Path) -> None:
    done = mmmamba("export", "--run", run, "--format", "hub", "--out", tmp_path / "out")
    size = sum(t.nbytes for t in load_file(tmp_path / "out/model.safetensors").values())
    assert f"exporting: {size}/{size} B" in done.stderr
    assert done.stdout.startswith(f"{len(load_file(tmp_path / 'out/model.safetensors'))} tensors")
    assert f" tensors, {format_size(size)} in " in done.stdout
    # Nothing can be asked without a tokenizer.
    assert "next:" not in done.stdout
    assert torch.float32 in {
        t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()
    }
