"""Licences of the project and of the files that ship with it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SCENES = ROOT / "evals/scenes"
SHIPPED = ("mmmamba_cli", "recipes", "evals")
NOTICE = (ROOT / "NOTICE").read_text()


def listed(heading: str) -> dict[str, str]:
    """Entries of NOTICE under `heading`: first word and rest of the line."""
    _, _, below = NOTICE.partition(f"\n{heading}, ")
    lines = below[: below.find("\n\n", below.find("\n\n") + 2)].splitlines()
    rows = (line.split(None, 1) for line in lines if line[:3].strip(" ") and line[:2] == "  ")
    return dict(rows)


def test_the_licence_is_apaches_whole_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
    assert "9. Accepting Warranty or Additional Liability." in text
    assert text.rstrip().endswith("limitations under the License.")
    assert "Copyright 2026 The mmmamba authors" in NOTICE


def test_every_set_of_drawings_is_in_the_notice() -> None:
    shipped = {f"{path.name}/" for path in (SCENES / "atlas").iterdir() if path.is_dir()}
    assert set(listed("Drawings")) == shipped
    for name in shipped:
        assert f"evals/scenes/atlas/{name}LICENSE" in NOTICE
        assert (SCENES / "atlas" / name / "LICENSE").is_file()


def test_every_font_is_in_the_notice_under_its_licence() -> None:
    licences = {
        entry["file"]: entry["licence"]
        for entry in yaml.safe_load((SCENES / "fonts.yaml").read_text())
    }
    assert set(licences) == {path.name for path in (SCENES / "fonts").glob("*.woff*")}
    found = {name: rest.split()[0] for name, rest in listed("Fonts").items()}
    assert found == licences


def test_every_model_is_in_the_notice_under_its_cards_licence() -> None:
    folders = [path for path in (SCENES / "models").iterdir() if path.is_dir()]
    assert set(listed("Models")) == {f"{path.name}/" for path in folders}
    for folder in folders:
        _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(front)["license"] == "apache-2.0"


def declared() -> list[str]:
    """The licence files of pyproject.toml, patterns resolved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [sorted(ROOT.glob(pattern)) for pattern in project["license-files"]]
    assert all(found), "a pattern of license-files matches nothing"
    return [path.relative_to(ROOT).as_posix() for paths in found for path in paths]


def test_every_licence_text_is_declared() -> None:
    texts = {
        path.relative_to(ROOT).as_posix()
        for name in SHIPPED
        for path in (ROOT / name).rglob("*")
        if path.name.startswith(("LICENSE", "NOTICE", "OFL", "COPYING"))
    }
    assert set(declared()) == texts | {"LICENSE", "NOTICE"}
