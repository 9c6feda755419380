"""transformers' common tests, written to a folder from which Python imports `tests`.

    python tests/conformance/upstream.py        # prints the folder

The source distribution of the installed transformers holds the common model, processor and
tokenizer tests, without subfolders. A checkout named by `TRANSFORMERS_TESTS` adds them and the
generation tests; otherwise empty stand-ins make the rest importable.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "conformance"
CHECKOUT = "TRANSFORMERS_TESTS"
# Stand-ins for imports from the subfolders, without a checkout.
STAND_INS = {
    "tests/__init__.py": "",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "tests/fixtures/sample_text.txt": "A red cube lies here.\nTwo blue balls are beside it.\n",
}
# The processor tests load images by URL; these are drawn instead.
PICTURES = """from pathlib import Path

from PIL import Image


def url_to_local_path(url, return_url_if_not_found=True):
    if not url.endswith((".png", ".jpg", ".jpeg")):
        return url
    file = Path(__file__).parent / url.rsplit("/", 1)[-1]
    if not file.is_file():
        Image.effect_mandelbrot((320, 240), (-2, -1, 1, 1), 20).convert("RGB").save(file)
    return str(file)
"""


def upstream_tests() -> Path:
    """Write the folder that holds `tests` and `utils` from the cached distribution."""
    version = metadata.version("transformers")
    folder = CACHE / f"transformers-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "utils").mkdir(parents=True)
    checkout = os.environ.get(CHECKOUT)
    if checkout:
        _copy_checkout(Path(checkout), folder)
    _extract_common_tests(_source_distribution(version), folder / "tests")
    for name, text in STAND_INS.items():
        file = folder / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    (folder / "utils" / "fetch_hub_objects_for_ci.py").write_text(PICTURES, encoding="utf-8")
    return folder


def _copy_checkout(checkout: Path, folder: Path) -> None:
    if not (checkout / "tests" / "generation" / "test_utils.py").is_file():
        sys.exit(
            f"{CHECKOUT}={checkout}: no tests/generation/test_utils.py in it; "
            "name a checkout of transformers, or unset the variable"
        )
    for name in ("generation", "utils", "fixtures"):
        source = checkout / "tests" / name
        if source.is_dir():
            shutil.copytree(source, folder / "tests" / name)
    if (checkout / "utils" / "test_module").is_dir():
        shutil.copytree(checkout / "utils" / "test_module", folder / "utils" / "test_module")


def _source_distribution(version: str) -> Path:
    """The sdist of a version, downloaded by pip if it is not cached."""
    file = CACHE / f"transformers-{version}.tar.gz"
    if file.is_file():
        return file
    CACHE.mkdir(parents=True, exist_ok=True)
    # Downloaded elsewhere first, so that a partial file is not used.
    with tempfile.TemporaryDirectory(dir=CACHE) as partial:
        words = ["download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        requirement = f"transformers=={version}"
        subprocess.run(
            [sys.executable, "-m", "pip", *words, "--dest", partial, requirement],
            check=True,
            stdout=sys.stderr,
        )
        (found,) = Path(partial).glob("*.tar.gz")
        found.rename(file)
    return file


def _extract_common_tests(distribution: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with tarfile.open(distribution) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests":
                content = archive.extractfile(member)
                assert content is not None
                (folder / parts[2]).write_bytes(content.read())


if __name__ == "__main__":
    print(upstream_tests())
