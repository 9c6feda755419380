"""Building the full atlas with a stand-in npm that serves tarballs made by the tests."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from mmmamba_cli.errors import CheckpointError, DataError, MmmambaError
from mmmamba_evals.scenes import atlas_download as fetching
from mmmamba_evals.scenes.atlas_download import EmojiPackage, fetch, pinned_packages
from mmmamba_evals.scenes.classes import class_table

CLASSES = ["dog", "ice cream", "spider"]
# Writes the tarball, if there is one, into the working directory, as npm does.
STAND_IN = """#!{python}
import json, os, shutil, sys
told = json.load(open({told!r}))
with open({log!r}, "a") as log:
    print(*sys.argv[1:], file=log)
if told["tarball"]:
    shutil.copy(told["tarball"], "some-name-1.0.0.tgz")
sys.stderr.write(told["stderr"])
sys.exit(told["code"])
"""


def png(size: int = 64) -> bytes:
    """A red box, wider than high, on a transparent background."""
    image = Image.new("RGBA", (size, size))
    ImageDraw.Draw(image).rectangle((size // 8, size // 4, size * 7 // 8 - 1, size // 2), "red")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def svg() -> bytes:
    return (
        b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
        b'<rect x="12" y="18" width="48" height="24" fill="#ff0000"/></svg>'
    )


def tar(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def integrity(tarball: bytes) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(tarball).digest()).decode()


def google(classes: list[str], content: bytes | None = None) -> dict[str, bytes]:
    codes = [class_table()[name].code for name in classes]
    picture = png() if content is None else content
    return {f"package/img/google/64/{code}.png": picture for code in codes} | {
        "package/package.json": b"{}"
    }


class Npm:
    """Configures the stand-in npm and reads its log."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.told, self.log = folder / "told.json", folder / "log"
        self.log.touch()
        script = folder / "bin" / "npm"
        script.parent.mkdir()
        text = STAND_IN.format(python=sys.executable, told=str(self.told), log=str(self.log))
        script.write_text(text)
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(script.parent))
        self.fails("E404", "No match found", code=1)

    def fails(self, code_word: str, reason: str, code: int) -> None:
        lines = f"npm warn Unknown\nnpm error code {code_word}\nnpm error {reason}\n"
        self._tell(None, lines, code)

    def serves(self, tarball: bytes, style: str = "noto", pinned: str | None = None) -> None:
        """Serve a tarball, and pin its checksum unless another is given."""
        path = self.folder / "served.tgz"
        path.write_bytes(tarball)
        self._tell(path, "", 0)
        package = vars(pinned_packages()[style]) | {"integrity": pinned or integrity(tarball)}
        packages = {**pinned_packages(), style: EmojiPackage(**package)}
        self.monkeypatch.setattr(fetching, "pinned_packages", lambda: packages)

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines()

    def _tell(self, tarball: Path | None, stderr: str, code: int) -> None:
        self.told.write_text(
            json.dumps({"tarball": tarball and str(tarball), "stderr": stderr, "code": code})
        )


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Npm:
    (tmp_path / "npm").mkdir()
    # The folder of temporary files, so that a test can check that none remain.
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return Npm(tmp_path / "npm", monkeypatch)


def refusal(out: Path, kind: type[MmmambaError] = DataError, style: str = "noto") -> str:
    """The error message; also check that no partial output remains."""
    with pytest.raises(kind) as raised:
        fetch(out, [style], CLASSES)
    assert not out.exists()
    assert list((out.parent / "temporary").iterdir()) == []
    sentence = str(raised.value)
    assert "\n" not in sentence
    return sentence


def test_a_style_is_built(tmp_path: Path, npm: Npm) -> None:
    npm.serves(tar(google(CLASSES)))
    said: list[str] = []
    out = tmp_path / "atlas"
    fetch(out, ["noto"], CLASSES, say=said.append)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {
        "noto/NOTICE",
        "noto/LICENSE",
        *(f"noto/{name}/noto.png" for name in ("dog", "ice_cream", "spider")),
    }
    with Image.open(out / "noto" / "dog" / "noto.png") as image:
        # The 64 x 64 picture is cropped to the box of 48 x 17 pixels.
        assert (image.mode, image.size) == ("RGBA", (48, 17))
        assert image.getextrema() == ((255, 255), (0, 0), (0, 0), (255, 255))
    notice = (out / "noto" / "NOTICE").read_text()
    assert "Google" in notice
    assert "Apache License 2.0" in notice
    assert "emoji-datasource-google@16.0.0" in notice
    assert npm.asked() == ["pack emoji-datasource-google@16.0.0"]
    assert said == [
        "noto: downloading emoji-datasource-google@16.0.0",
        f"noto: 3 drawings in {out / 'noto'}",
    ]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_large_drawings_are_scaled_and_found_without_variation_selector(
    tmp_path: Path, npm: Npm
) -> None:
    plain = [class_table()[name].code.replace("-fe0f", "") for name in CLASSES]
    assert "1f577" in plain  # the spider's, which the table has with a selector
    npm.serves(tar({f"package/assets/{code}.webp": png(256) for code in plain}), "fluent")
    fetch(tmp_path / "atlas", ["fluent"], CLASSES)
    with Image.open(tmp_path / "atlas" / "fluent" / "spider" / "fluent.png") as image:
        # Of 192 x 65 pixels.
        assert image.size == (96, 33)


def test_vector_drawings_are_rendered(tmp_path: Path, npm: Npm) -> None:
    codes = [class_table()[name].code.upper().replace("-FE0F", "") for name in CLASSES]
    npm.serves(tar({f"package/color/svg/{code}.svg": svg() for code in codes}), "openmoji")
    fetch(tmp_path / "atlas", ["openmoji"], CLASSES)
    with Image.open(tmp_path / "atlas" / "openmoji" / "dog" / "openmoji.png") as image:
        assert image.size == (96, 48)
        assert image.getpixel((48, 24)) == (255, 0, 0, 255)
    assert not (tmp_path / "atlas" / "openmoji" / "LICENSE").exists()
    assert "ShareAlike 4.0" in (tmp_path / "atlas" / "openmoji" / "NOTICE").read_text()


def test_vector_drawings_need_their_library(
    tmp_path: Path, npm: Npm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'mmmamba\[scenes\]'"):
        fetch(tmp_path / "atlas", ["noto", "openmoji"], CLASSES)
    assert npm.asked() == []


def test_tarball_with_wrong_checksum_is_not_opened(
    tmp_path: Path, npm: Npm, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tar(google(CLASSES))
    other = tar(google(CLASSES, png(32)))
    npm.serves(other, pinned=integrity(good))
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("it was opened"))
    sentence = refusal(tmp_path / "atlas")
    assert integrity(other) in sentence
    assert integrity(good) in sentence
    assert "emoji-datasource-google@16.0.0" in sentence


@pytest.mark.parametrize(
    "name", ["../../outside.png", "package/../../outside.png", "/tmp/outside.png", "..\\o.png"]
)
def test_path_traversal_is_an_error(tmp_path: Path, npm: Npm, name: str) -> None:
    npm.serves(tar({name: png(), **google(CLASSES)}))
    assert "outside" in refusal(tmp_path / "atlas")
    assert list(tmp_path.rglob("*outside*")) == []


def test_link_instead_of_a_picture_is_an_error(tmp_path: Path, npm: Npm) -> None:
    members = google(CLASSES)
    place = f"package/img/google/64/{class_table()['dog'].code}.png"
    del members[place]
    file = io.BytesIO(tar(members))
    plain = io.BytesIO()
    with tarfile.open(fileobj=file) as old, tarfile.open(fileobj=plain, mode="w:gz") as new:
        for member in old:
            new.addfile(member, old.extractfile(member))
        link = tarfile.TarInfo(place)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        new.addfile(link)
    npm.serves(plain.getvalue())
    assert place in refusal(tmp_path / "atlas")


def test_too_large_picture_is_an_error(tmp_path: Path, npm: Npm) -> None:
    npm.serves(tar(google(CLASSES, bytes((1 << 20) + 1))))
    assert "1048576 bytes" in refusal(tmp_path / "atlas")


def test_a_missing_picture_is_named(tmp_path: Path, npm: Npm) -> None:
    npm.serves(tar(google(["dog"])))
    sentence = refusal(tmp_path / "atlas")
    assert "has no drawing of ice cream, spider" in sentence


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no picture", "is not a picture"),
        (png()[:60], "is not a picture"),
        (b"", "is not a picture"),
    ],
)
def test_a_damaged_picture_is_named(tmp_path: Path, npm: Npm, content: bytes, words: str) -> None:
    npm.serves(tar(google(CLASSES, content)))
    sentence = refusal(tmp_path / "atlas")
    assert words in sentence
    assert class_table()["dog"].code in sentence


def test_an_empty_picture_is_named(tmp_path: Path, npm: Npm) -> None:
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 8)).save(file, "PNG")
    npm.serves(tar(google(CLASSES, file.getvalue())))
    assert "is fully transparent" in refusal(tmp_path / "atlas")


def test_a_damaged_vector_drawing_is_named(tmp_path: Path, npm: Npm) -> None:
    codes = [class_table()[name].code.upper() for name in CLASSES]
    npm.serves(tar({f"package/color/svg/{code}.svg": b"<svg" for code in codes}), "openmoji")
    assert "is not a picture" in refusal(tmp_path / "atlas", style="openmoji")


@pytest.mark.parametrize(
    "damage", [b"not a tarball", tar(google(CLASSES))[:200]], ids=["none", "cut off"]
)
def test_a_damaged_tarball_is_named(tmp_path: Path, npm: Npm, damage: bytes) -> None:
    npm.serves(damage)
    assert "the tarball of emoji-datasource-google@16.0.0 is damaged" in refusal(tmp_path / "atlas")


def test_npm_error_is_quoted(tmp_path: Path, npm: Npm) -> None:
    npm.fails("ECONNREFUSED", "FetchError: request to the registry failed", 1)
    sentence = refusal(tmp_path / "atlas")
    assert "exit code 1" in sentence
    assert "ECONNREFUSED FetchError: request to the registry failed" in sentence
    assert "Unknown" not in sentence


def test_npm_without_output_file(tmp_path: Path, npm: Npm) -> None:
    npm.fails("", "", 0)
    assert "failed (exit code 0)" in refusal(tmp_path / "atlas")


def test_npm_that_is_killed(tmp_path: Path, npm: Npm) -> None:
    npm.serves(tar(google(CLASSES))[:200])
    npm.told.write_text(npm.told.read_text().replace('"code": 0', '"code": 137'))
    assert "failed (exit code 137)" in refusal(tmp_path / "atlas")


def test_npm_not_installed(tmp_path: Path, npm: Npm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "npm" in refusal(tmp_path / "atlas")


def test_npm_not_executable(tmp_path: Path, npm: Npm) -> None:
    (tmp_path / "npm" / "bin" / "npm").write_text("#!/no/such/interpreter\n")
    assert "cannot be run" in refusal(tmp_path / "atlas")


def test_unknown_names_are_rejected_before_downloading(tmp_path: Path, npm: Npm) -> None:
    with pytest.raises(DataError, match=r"no style is called apple.*noto, twemoji"):
        fetch(tmp_path / "atlas", ["apple"])
    with pytest.raises(DataError, match="no class is called dgo"):
        fetch(tmp_path / "atlas", ["noto"], ["dog", "dgo"])
    assert npm.asked() == []


def test_existing_folder_is_kept_or_replaced(tmp_path: Path, npm: Npm) -> None:
    npm.serves(tar(google(CLASSES)))
    old = tmp_path / "atlas" / "noto" / "old"
    old.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="already exists"):
        fetch(tmp_path / "atlas", ["fluent", "noto"], CLASSES)
    assert npm.asked() == []
    assert old.is_dir()
    (old / "mine.png").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"did not write: old/mine.png"):
        fetch(tmp_path / "atlas", ["fluent", "noto"], CLASSES, overwrite=True)
    assert npm.asked() == []
    (old / "mine.png").rename(old / "noto.png")
    fetch(tmp_path / "atlas", ["noto"], CLASSES, overwrite=True)
    assert not old.exists()
    assert (tmp_path / "atlas" / "noto" / "dog" / "noto.png").is_file()


def test_file_written_during_the_download_is_kept(tmp_path: Path, npm: Npm) -> None:
    npm.serves(tar(google(CLASSES)))
    old = tmp_path / "atlas" / "noto"
    old.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"did not write: mine.txt"):
        fetch(
            tmp_path / "atlas",
            ["noto"],
            CLASSES,
            overwrite=True,
            say=lambda text: (old / "mine.txt").touch(),
        )
    assert [path.name for path in old.iterdir()] == ["mine.txt"]


def test_a_failed_replacement_leaves_the_old(tmp_path: Path, npm: Npm) -> None:
    npm.fails("ENOSPC", "no space left on device", 228)
    old = tmp_path / "atlas" / "noto" / "old"
    old.mkdir(parents=True)
    with pytest.raises(DataError, match="ENOSPC no space left on device"):
        fetch(tmp_path / "atlas", ["noto"], CLASSES, overwrite=True)
    assert [path.name for path in (tmp_path / "atlas").iterdir()] == ["noto"]
    assert old.is_dir()


def test_packages_are_pinned() -> None:
    packages = pinned_packages()
    assert list(packages) == ["noto", "twemoji", "fluent", "openmoji"]
    for package in packages.values():
        assert len(base64.b64decode(package.integrity.removeprefix("sha512-"), validate=True)) == 64
        assert package.version.count(".") == 2
        assert "licence" in package.licence.lower() or "://" in package.licence
    # Their owners do not permit redistribution.
    assert not any(
        word in package.package
        for package in packages.values()
        for word in ("apple", "facebook", "emojione", "joypixels")
    )
