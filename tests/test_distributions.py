"""The wheel and the source distribution, built once: licences, recipes, suites and adapters."""

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
from test_licences import ROOT, SHIPPED, declared

from mmmamba_cli.evaluate import suite_names
from mmmamba_cli.recipe import recipe_names

# Without the .pth files there, so that an editable install of the checkout is not found.
SITE = [path for path in sys.path if path.endswith("site-packages")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution of the working tree."""
    source = tmp_path_factory.mktemp("built") / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SHIPPED:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
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


def check_metadata(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("License-File", [])) == set(declared())


def test_the_wheel_holds_the_licences(wheel: zipfile.ZipFile) -> None:
    (place,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    check_metadata(email.message_from_bytes(wheel.read(f"{place}/METADATA")))
    for name in declared():
        assert wheel.read(f"{place}/licenses/{name}") == (ROOT / name).read_bytes()


def test_the_source_distribution_holds_the_licences(built: Path) -> None:
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        top = file.name.removesuffix(".tar.gz")
        held = {name: archive.extractfile(f"{top}/{name}") for name in ("PKG-INFO", *declared())}
        packed = {name: stream.read() for name, stream in held.items() if stream is not None}
    check_metadata(email.message_from_bytes(packed.pop("PKG-INFO")))
    assert packed == {name: (ROOT / name).read_bytes() for name in declared()}


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
    path = f"import sys; sys.path[:0] = {[str(installed), *SITE]!r}\n"
    asked = subprocess.run(
        [sys.executable, "-S", "-c", path + ask], cwd=tmp_path, capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr
    place, found = asked.stdout.splitlines()
    assert place.startswith(str(installed))
    names, tables, *modules = json.loads(found)
    assert names == suite_names()
    assert tables == 1
    assert modules == ["mmmamba_evals.vlmeval_adapter", "mmmamba_evals.lm_eval_adapter"]
