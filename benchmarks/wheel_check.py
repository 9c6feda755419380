"""Check of a wheel: install it into an empty environment and run the commands of the README.

`make release-check` runs it on the files in dist/. The environment, the working directory and the
home directory are new and empty, so that nothing of a checkout can be imported. The source
distribution, if given, is then built and installed in place of the wheel, for the light commands.
Times, sizes and versions go to the JSON file given by --out, one entry per Python version; entries
of other versions stay as long as they are about the same wheel. Standard library only: it runs
with any Python, and checks another one.

    python benchmarks/wheel_check.py dist/mmmamba-*.whl --python python3.13 --torch torch==2.14.1
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAMED_VERSIONS = ("torch", "transformers", "numpy", "safetensors", "typer", "pillow")
# Two steps for each stage: the check is about the installation, not about what is learned.
SHORT_STAGES = [f"stages.stage{number}.steps=2" for number in (1, 2, 3)]
SETTINGS = [word for setting in SHORT_STAGES for word in ("--set", setting)]
LESSONS = ("--data", "scenes/lessons.jsonl", "--image-root", "scenes")
EXAMPLE, AUTO_CLASSES = "example.py", "auto_classes.py"
AUTO_CLASSES_CODE = """
from transformers import AutoModelForImageTextToText, AutoProcessor
import mmmamba_cli.model
model = AutoModelForImageTextToText.from_pretrained("exported", trust_remote_code=True)
AutoProcessor.from_pretrained("exported", trust_remote_code=True)
print("loaded", type(model).__name__)
"""


class CheckFailure(Exception):
    """A step that did not end as expected; the message has the command and its output."""


@dataclass(frozen=True)
class Step:
    """A command, the text that its output must contain, and what is typed into it."""

    words: tuple[str, ...]
    expected: str
    typed: str | None = None


@dataclass
class Environment:
    """A virtual environment with the wheel, and an empty folder in which commands run."""

    folder: Path
    work: Path
    steps: list[dict[str, object]] = field(default_factory=list)

    @property
    def scripts(self) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin")

    def variables(self) -> dict[str, str]:
        """The variables of this process, without those that lead to other code or settings."""
        dropped = ("PYTHON", "MMMAMBA", "VIRTUAL_ENV", "HF_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
        search_path = os.pathsep.join([str(self.scripts), os.defpath])
        home = str(self.work.parent / "home")
        # pip's notice of a newer version would stand behind its JSON.
        quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONNOUSERSITE": "1"}
        return {**kept, **quiet, "PATH": search_path, "HOME": home}

    def run(self, words: Sequence[str], typed: str | None = None) -> str:
        """Output of a command that must succeed."""
        command = [str(self.scripts / words[0]), *words[1:]]
        done = subprocess.run(
            command,
            cwd=self.work,
            env=self.variables(),
            input=typed or "",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        if done.returncode:
            shown = shlex.join(words)
            raise CheckFailure(f"{shown} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def take(self, step: Step) -> str:
        """Run a step and keep its time."""
        shown = shlex.join(step.words)
        print(f"$ {shown}", flush=True)
        began = time.monotonic()
        output = self.run(step.words, step.typed)
        seconds = round(time.monotonic() - began, 1)
        if step.expected not in output:
            raise CheckFailure(f"{shown} did not print {step.expected!r}:\n{output}")
        self.steps.append({"command": shown, "seconds": seconds})
        return output


def mmmamba(*words: str, expected: str = "", typed: str | None = None) -> Step:
    return Step(("mmmamba", *words), expected, typed)


def light_steps(version: str) -> Iterator[Step]:
    """Commands that need no torch, and `doctor`."""
    yield mmmamba("--version", expected=f"mmmamba {version}")
    yield mmmamba("--help", expected="scenes")
    yield mmmamba("recipe", "list", expected="scenes-demo")
    yield mmmamba("inspect", "scenes-linear", expected="SSM states")
    yield mmmamba("doctor", expected="torch")


def pipeline_steps() -> Iterator[Step]:
    """The README's commands from a teacher to an exported student."""
    size = ("--short", "--pictures", "2", "--lessons", "24")
    yield mmmamba("scenes", "build", "--out", "scenes", *size, expected="lessons.jsonl")
    yield mmmamba("scenes", "sheet", "--out", "sheet.png")
    yield mmmamba("seed", "scenes-teacher", "--recipe", "scenes-demo", expected="products/seed")
    yield mmmamba("data", "check", *LESSONS[1:], expected="bad samples")
    yield mmmamba("distill", "--stage", "1,2", *LESSONS, *SETTINGS, expected="stage2")
    yield mmmamba("hybridize", "--attn-layers", "2", expected="hybrid-2")
    yield mmmamba("distill", "--stage", "3", *LESSONS, *SETTINGS, expected="stage3")
    yield mmmamba("eval", "--suite", "scenes", "--limit", "16", "--teacher", expected="scenes")
    profile = ("--contexts", "256", "--budget", "5")
    yield mmmamba("profile", *profile, expected="256")
    yield mmmamba("ablate", "--help", expected="PLAN")
    yield mmmamba("report", expected="report.html")
    yield mmmamba("export", "--format", "hub", "--out", "exported", expected="exported")
    yield mmmamba("inspect", "exported", expected="layers")
    yield mmmamba("status", expected="hybrid-2")
    question = "What is shown?\n"
    yield mmmamba(
        "chat", "--model", "scenes-linear", "--max-new-tokens", "16", expected="\n", typed=question
    )
    yield Step(("python", EXAMPLE), "\n")
    yield Step(("python", AUTO_CLASSES), "loaded ")


def recipe_steps(environment: Environment) -> Iterator[Step]:
    listed = json.loads(environment.run(["mmmamba", "recipe", "list", "--json"]))
    rows = listed["recipes"] if isinstance(listed, dict) else listed
    for row in rows:
        yield mmmamba("recipe", "validate", row["name"] if isinstance(row, dict) else row)


def check_origin(environment: Environment) -> None:
    """Raise `CheckFailure` unless the packages are those of the environment."""
    ask = "import mmmamba_cli, mmmamba_evals; print(mmmamba_cli.__file__, mmmamba_evals.__file__)"
    for place in environment.run(["python", "-c", ask]).split():
        if not Path(place).is_relative_to(environment.folder):
            raise CheckFailure(f"{place} is imported, expected a file in {environment.folder}")


def folder_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def installed_versions(environment: Environment) -> dict[str, str]:
    listed = json.loads(environment.run(["python", "-m", "pip", "list", "--format", "json"]))
    found: Mapping[str, str] = {row["name"].lower(): row["version"] for row in listed}
    return {name: found[name] for name in NAMED_VERSIONS} | {"packages": str(len(found))}


def pip_install(environment: Environment, *words: str) -> float:
    """Seconds that `pip install` took."""
    print(f"$ pip install {shlex.join(words)}", flush=True)
    began = time.monotonic()
    pip = ["python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    environment.run([*pip, *words])
    return round(time.monotonic() - began, 1)


def check_source(environment: Environment, sdist: Path, version: str) -> float:
    """Install the source distribution in place of the wheel; seconds of its build."""
    environment.run(["python", "-m", "pip", "uninstall", "--quiet", "--yes", "mmmamba"])
    seconds = pip_install(environment, "--no-deps", str(sdist))
    check_origin(environment)
    for step in (*light_steps(version), *recipe_steps(environment)):
        environment.run(step.words)
    return seconds


def readme_example(wheel: Path) -> str:
    """The first block of Python in the README, which is the description in the wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        description = archive.read(name).decode("utf-8")
    found = re.search(r"^```python\n(.*?)^```", description, re.MULTILINE | re.DOTALL)
    if found is None:
        raise CheckFailure(f"{wheel.name}: its description has no block of Python")
    return found[1]


def check(environment: Environment, wheel: Path) -> None:
    """Run every step; the first that fails raises `CheckFailure`."""
    check_origin(environment)
    scripts = {EXAMPLE: readme_example(wheel), AUTO_CLASSES: AUTO_CLASSES_CODE}
    for name, text in scripts.items():
        (environment.work / name).write_text(text, encoding="utf-8")
    steps = (*light_steps(version_of(wheel)), *recipe_steps(environment), *pipeline_steps())
    for step in steps:
        environment.take(step)


def version_of(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def check_python(
    python: str, wheel: Path, sdist: Path | None, torch: str | None
) -> dict[str, object]:
    """The record of one Python version; its environment is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="wheel-check-") as name:
        top = Path(name).resolve()
        environment = Environment(top / "environment", top / "work")
        environment.work.mkdir()
        (top / "home").mkdir()
        subprocess.run([python, "-m", "venv", str(environment.folder)], check=True)
        python_version = environment.run(["python", "--version"]).split()[1]
        print(f"Python {python_version}", flush=True)
        seconds = {"torch": pip_install(environment, torch)} if torch is not None else {}
        seconds["wheel"] = pip_install(environment, str(wheel))
        size = folder_bytes(environment.folder)
        check(environment, wheel)
        if sdist is not None:
            seconds["source distribution"] = check_source(environment, sdist, version_of(wheel))
        return {
            "python": python_version,
            "versions": installed_versions(environment),
            "install_seconds": seconds,
            "environment_bytes": size,
            "steps": environment.steps,
        }


def record(out: Path, wheel: Path, found: Sequence[Mapping[str, object]]) -> None:
    """Write the entries; those of other Python versions stay if they are about this wheel."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    entries = before.get("pythons", []) if before.get("sha256") == digest else []
    new = {entry["python"] for entry in found}
    kept = [entry for entry in entries if entry["python"] not in new]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    device = f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}"
    entries = [*kept, *({**entry, "date": now, "device": device} for entry in found)]
    content = {
        "command": "python benchmarks/wheel_check.py WHEEL --python PYTHON --torch REQUIREMENT",
        "wheel": wheel.name,
        "sha256": digest,
        "bytes": wheel.stat().st_size,
        "pythons": sorted(entries, key=lambda entry: entry["python"]),
    }
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--sdist", type=Path, help="source distribution to build and install too")
    parser.add_argument("--python", action="append", help="interpreter to check; may be repeated")
    parser.add_argument("--torch", help="requirement to install first, such as a CPU build")
    parser.add_argument("--out", type=Path, help="JSON file of sizes, times and versions")
    chosen = parser.parse_args()
    wheel: Path = chosen.wheel.resolve()
    for file in filter(None, (chosen.wheel, chosen.sdist)):
        if not file.is_file():
            parser.error(f"{file} does not exist: build it with make release")
    sdist: Path | None = chosen.sdist and chosen.sdist.resolve()
    pythons = chosen.python or [sys.executable]
    try:
        found = [check_python(python, wheel, sdist, chosen.torch) for python in pythons]
    except CheckFailure as failure:
        print(failure, file=sys.stderr)
        return 1
    if chosen.out is not None:
        record(chosen.out, wheel, found)
    print(f"{wheel.name} works in {len(found)} empty environments")
    return 0


if __name__ == "__main__":
    sys.exit(main())
