"""`mmmamba export`: atomic writes, the model card, uploads."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mmmamba_hf_case import write_released
from safetensors.torch import load_file, save_file
from small_language_models import write, write_tokenizer
from test_as_a_new_user import write_teacher
from typer.testing import CliRunner

from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.checkpoint.tensor_info import format_size
from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import CheckpointError, RunError
from mmmamba_cli.export import CardInfo, CardScore, export_checkpoint
from mmmamba_cli.recipe.yaml_text import read_yaml, write_yaml
from mmmamba_cli.runs import Run
from mmmamba_cli.runs.manifest import command_line
from mmmamba_cli.runs.provenance import redact_command, redact_path, redact_recipe, redact_text

CASE = Path(__file__).parents[1] / "golden/hovle_pre"


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with an untrained seed and an untrained hybrid of it."""
    run = tmp_path / "secret-place/run"
    mmmamba("seed", CASE.resolve(), "--run", run, "--dtype", "fp32", "--no-report")
    mmmamba("hybridize", "--attn-layers", "2", "--run", run)
    return run


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


def card(run: Path, out: Path, *words: object) -> str:
    mmmamba("export", "--run", run, "--format", "hub", "--out", out, "--overwrite", *words)
    return (out / "README.md").read_text()


def test_the_card_tells_lineage_recipe_and_what_was_not_done(run: Path, tmp_path: Path) -> None:
    text = card(run, tmp_path / "out")
    manifests = Run(run).products()
    for name in ("seed", "hybrid-2"):
        assert f"- {name}: " in text and manifests[name].content_hash[:12] in text
    teacher = Run(run).teacher
    assert f"- teacher: hovle_pre (`{teacher.content_hash[:12]}`)" in text
    assert "**This model was never distilled end to end**" in text and "Stages done: none" in text
    assert "  attention: 2\n" in text and "conv_width: 2" in text
    assert "attention in layers 0, 2 of 5" in text
    assert "license" not in text and "\n## Scores" not in text
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mmmamba", "arxiv:2502.13145"],
    }


def test_the_card_takes_a_licence_and_a_title(run: Path, tmp_path: Path) -> None:
    text = card(run, tmp_path / "out", "--license", "apache-2.0", "--title", "My model")
    assert "\nlicense: apache-2.0\n" in text and "\n# My model\n" in text


@pytest.mark.parametrize("licence", ["mit\nbad: 1", "a: b", "", "-"])
def test_a_licence_that_would_break_the_card_is_refused(
    run: Path, tmp_path: Path, licence: str
) -> None:
    with pytest.raises(CheckpointError, match="is no name of a licence"):
        card(run, tmp_path / "out", "--license", licence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pictures", "words"])
def test_local_paths_are_redacted(tmp_path: Path, kind: str) -> None:
    """Every text in the hub folder except code and vocabulary."""
    place = tmp_path / "secret-place"
    if kind == "pictures":
        write_teacher(place / "teacher")
        teacher = place / "teacher/hovle.ckpt"
    else:
        write(place / "teacher", "Llama", {})
        write_tokenizer(place / "teacher")
        teacher = place / "teacher"
    raw = json.loads((place / "teacher/config.json").read_text())
    raw["_name_or_path"] = str(place)
    (place / "teacher/config.json").write_text(json.dumps(raw))
    mmmamba("seed", teacher, "--run", place / "run", "--no-report")
    text = card(place / "run", tmp_path / "out")
    assert "teacher: " in text
    for file in (tmp_path / "out").iterdir():
        if file.suffix in (".json", ".md", ".jinja"):
            text = file.read_text()
            assert "secret-place" not in text and str(tmp_path) not in text, file


def test_redact_path_and_recipe() -> None:
    assert redact_path("/home/someone/models/hovle.ckpt") == "hovle.ckpt"
    assert redact_path("~/models/hovle") == "hovle" and redact_path("../x/y") == "y"
    cached = "/c/hub/models--some--model/snapshots/0123456789abcdef0123456789abcdef01234567"
    assert redact_path(cached) == "some/model@0123456789ab"
    assert redact_path("some/model") == "some/model"
    assert redact_path("--out=/home/someone/x") == "--out=x"
    text = "teacher: /home/someone/hovle\ndata:\n  train: ~/secret/train.jsonl\nlr: 1e-3\n"
    assert redact_recipe(text) == "teacher: hovle\ndata:\n  train: train.jsonl\nlr: 0.001\n"


def test_redact_nested_values() -> None:
    long = "/home/someone/a folder/" + "x" * 120 + "/train: all.jsonl"
    text = write_yaml(
        {
            "description": "as in /home/someone/notes.md, see https://host/home/x",
            "data": {"train": [long, "~/b: c/d.tar"], "image_root": "C:\\Users\\me\\images"},
        }
    )
    found = redact_recipe(text)
    assert "someone" not in found and "Users" not in found and "b: c" not in found
    data = read_yaml(found, "it")["data"]
    assert data == {"train": ["train: all.jsonl", "d.tar"], "image_root": "images"}
    command = shlex.join(["mmmamba", "distill", "--data", "/home/me/a b/t.jsonl", "--set", "x=1"])
    assert redact_command(command) == "mmmamba distill --data t.jsonl --set x=1"
    assert redact_command("mmmamba seed /home/me/isn't/x") == "mmmamba seed x"
    assert redact_text("imported: '/home/me/x y.txt' of and/or") == "imported: 'x y.txt' of and/or"
    assert redact_text("the file /home/me/x.json: is damaged") == "the file x.json: is damaged"


def test_command_line_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/usr/bin/mmmamba", "seed", "my model", "--set", "description=it's $HOME"]
    monkeypatch.setattr(sys, "argv", words)
    assert shlex.split(command_line()) == ["mmmamba", *words[1:]]


def test_base_model_is_a_hub_teacher(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    teacher = tmp_path / f"hub/models--some--model/snapshots/{commit}"
    shutil.copytree(CASE, teacher)
    run = tmp_path / "run"
    mmmamba("seed", teacher, "--run", run, "--no-report")
    front = yaml.safe_load(card(run, tmp_path / "out").split("---\n")[1])
    assert front["base_model"] == "some/model"
    text = card(run, tmp_path / "out", "--base-model", "other/model")
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "other/model"
    with pytest.raises(CheckpointError, match="'nameless' is no repository"):
        card(run, tmp_path / "out", "--base-model", "nameless")


def test_card_scores_of_the_product(run: Path, tmp_path: Path) -> None:
    from mmmamba_cli.evaluate.result import DataInfo, ModelInfo, Result, RuleResult, json_text

    def write(name: str, content_hash: str, value: float, used: int = 10) -> None:
        part = RuleResult(
            rule="kit",
            scoring="yes-no",
            metric="accuracy",
            metrics={"accuracy": value},
            intervals={"accuracy": (value - 1, value + 1)},
            counts={},
            categories={},
        )
        result = Result(
            suite="pope",
            title="POPE",
            version=1,
            suite_digest="0",
            data=DataInfo(file="POPE.tsv", sha256="0", rows=20, used=used),
            model=ModelInfo(name=name, content_hash=content_hash),
            settings={},
            rules=(part,),
            seed=0,
            versions={},
        )
        (run / "evals" / name).mkdir(parents=True, exist_ok=True)
        (run / "evals" / name / "result.json").write_text(json_text(result))

    write("hybrid-2", Run(run).product("hybrid-2").content_hash, 85.25)
    write("seed", Run(run).product("seed").content_hash, 11.5)
    text = card(run, tmp_path / "out")
    row = "| POPE | kit | accuracy | 85.25 (84.25 to 86.25) | 10, a part |"
    assert row in text and "11.5" not in text and "95% intervals" in text
    assert "model-index" not in text  # partial suites are not in the metadata
    write("teacher", Run(run).teacher.content_hash, 91.5, used=20)
    text = card(run, tmp_path / "out")
    assert row in text and "91.5" not in text  # other questions
    write("hybrid-2", Run(run).product("hybrid-2").content_hash, 85.25, used=20)
    text = card(run, tmp_path / "out")
    assert "| POPE | kit | accuracy | 85.25 (84.25 to 86.25) | 91.5 | 20 |" in text
    (model,) = yaml.safe_load(text.split("---\n")[1])["model-index"]
    (result,) = model["results"]
    assert result["dataset"] == {"name": "POPE", "type": "pope"}
    assert result["metrics"] == [
        {"type": "accuracy", "value": 85.25, "name": "accuracy by the rule kit"}
    ]
    # Results of another kit in the same folder.
    (run / "evals" / "hybrid-2" / "lm-eval").mkdir()
    (run / "evals" / "hybrid-2" / "lm-eval" / "result.json").write_text('{"kit": "lm-eval"}')
    done = mmmamba("export", "--run", run, "--format", "hub", "--out", tmp_path / "more")
    assert "lm-eval/result.json has the scores of lm-eval" in done.stderr
    row = "| POPE | kit | accuracy | 85.25 (84.25 to 86.25) | 91.5 | 20 |"
    assert row in (tmp_path / "more" / "README.md").read_text()


def test_card_of_a_final_product(tmp_path: Path) -> None:
    folder = write_released(tmp_path / "in", CASE, "linear")
    mmmamba("import", folder, "--run", tmp_path / "run")
    text = card(tmp_path / "run", tmp_path / "out")
    assert "never distilled" not in text and "published as distilled end to end" in text
    assert "A linear model: Mamba-2 in all 5 layers" in text and "- origin: in (" in text
    found = export_checkpoint(
        open_checkpoint(folder),
        "mmmamba-hf",
        tmp_path / "direct",
        card=CardInfo(scores=(CardScore("MME", "kit", "total", 1300.0, 14),)),
    )
    text = (found.folder / "README.md").read_text()
    assert "published as distilled end to end, which was not checked" in text
    assert "| MME | kit | total | 1300 | 14 |" in text and "intervals" not in text


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
