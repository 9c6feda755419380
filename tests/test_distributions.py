"""The wheel and the source distribution, built once: files, sizes, licences, recipes, suites."""

from __future__ import annotations

import email
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from isolated_process import run_isolated
from test_licences import ROOT, SHIPPED, declared

import mmmamba_cli
from mmmamba_cli.evaluate import suite_names
from mmmamba_cli.recipe import recipe_names

# What the source distribution takes from a clone, beside the package itself.
SOURCE_FOLDERS = (*SHIPPED, "benchmarks", "docs", "tests", ".ci")
SOURCE_FILES = (
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "NOTICE",
    "README.md",
    "constraints-dev.txt",
    "pyproject.toml",
)
# Kinds of file in the wheel, beside licences and the metadata.
WHEEL_SUFFIXES = {"", ".jinja", ".json", ".md", ".model", ".png", ".py", ".safetensors"} | {
    ".txt",
    ".woff",
    ".woff2",
    ".yaml",
}
MAX_WHEEL_BYTES = 40_000_000
# The code, the drawings and everything else but the shipped models.
MAX_BYTES_WITHOUT_MODELS = 4_000_000
MODELS = "mmmamba_evals/scenes/models/"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution of the working tree."""
    source = tmp_path_factory.mktemp("built") / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCE_FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in SOURCE_FILES:
        shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (file,) = built.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def sdist(built: Path) -> dict[str, bytes]:
    """The files of the source distribution, by name without its top folder."""
    (file,) = built.glob("*.tar.gz")
    found = {}
    with tarfile.open(file) as archive:
        for entry in archive:
            stream = archive.extractfile(entry)
            if stream is not None:
                found[entry.name.partition("/")[2]] = stream.read()
    return found


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def check_metadata(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("License-File", [])) == set(declared())


def test_the_wheel_has_every_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    """The code of each package and nothing beside them: a new folder must be in pyproject.toml."""
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {f"mmmamba_cli/{name}" for name in files_below(ROOT / "mmmamba_cli")}
    expected |= {f"mmmamba_evals/{name}" for name in files_below(ROOT / "evals")}
    expected |= {f"mmmamba_recipes/{name}" for name in files_below(ROOT / "recipes")}
    assert names == expected
    assert {Path(name).suffix for name in names} <= WHEEL_SUFFIXES


def test_the_wheel_is_small_apart_from_the_models(wheel: zipfile.ZipFile) -> None:
    sizes = {entry.filename: entry.compress_size for entry in wheel.infolist()}
    rest = sum(size for name, size in sizes.items() if not name.startswith(MODELS))
    assert rest < MAX_BYTES_WITHOUT_MODELS
    assert sum(sizes.values()) < MAX_WHEEL_BYTES


def test_the_source_distribution_is_a_clone(sdist: dict[str, bytes]) -> None:
    """It carries tests, pages and benchmarks, so that `make test` works from it."""
    expected = set(SOURCE_FILES)
    for name in SOURCE_FOLDERS:
        expected |= {f"{name}/{below}" for below in files_below(ROOT / name)}
    extra = {name for name in sdist.keys() - expected if not name.startswith("mmmamba.egg-info/")}
    assert expected <= sdist.keys()
    assert extra == {"PKG-INFO", "setup.cfg"}


def test_the_metadata_is_complete(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Version"] == mmmamba_cli.__version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    classifiers = metadata.get_all("Classifier", [])
    for version in ("3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {version}" in classifiers


def test_the_wheel_holds_the_licences(wheel: zipfile.ZipFile) -> None:
    (place,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    check_metadata(email.message_from_bytes(wheel.read(f"{place}/METADATA")))
    for name in declared():
        assert wheel.read(f"{place}/licenses/{name}") == (ROOT / name).read_bytes()


def test_the_source_distribution_holds_the_licences(sdist: dict[str, bytes]) -> None:
    check_metadata(email.message_from_bytes(sdist["PKG-INFO"]))
    for name in declared():
        assert sdist[name] == (ROOT / name).read_bytes()


def test_the_wheel_carries_every_recipe(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if name.startswith("mmmamba_recipes/")}
    assert held == {f"mmmamba_recipes/{name}.yaml" for name in recipe_names()}


def test_the_wheel_has_suites_and_adapters(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Use its suites and adapters without the checkout."""
    installed = tmp_path / "installed"
    wheel.extractall(installed)
    ask = (
        "import mmmamba_cli\nfrom mmmamba_cli.evaluate import *\n"
        "import json\nprint(mmmamba_cli.__file__)\n"
        "print(json.dumps([suite_names(), len(published_rows()),"
        " find_evaluator('vlmeval').__module__, find_evaluator('lm-eval').__module__]))"
    )
    place, found = run_isolated(ask, package=installed).splitlines()
    assert place.startswith(str(installed))
    names, tables, *modules = json.loads(found)
    assert names == suite_names()
    assert tables == 1
    assert modules == ["mmmamba_evals.vlmeval_adapter", "mmmamba_evals.lm_eval_adapter"]
