"""Python processes with PyTorch and transformers but without what the tests have imported.

A server with the two libraries starts once; each process is a fork of it, because the imports take
longer than most of the programs. The server has no editable installation and no current folder on
its path, and a process imports this package only if it is asked for.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import torch

import mmmamba_cli

ROOT = Path(mmmamba_cli.__file__).parents[1]
SERVER = Path(__file__).with_name("isolated_server.py")


@cache
def isolated_home() -> Path:
    """The folder below which the processes have their caches; `hf` is that of Hugging Face."""
    folder = tempfile.TemporaryDirectory(prefix="isolated-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def _server() -> subprocess.Popen[str]:
    paths = sysconfig.get_paths()
    # The libraries may lie elsewhere: a .pth file can name their folder.
    folders = [paths["purelib"], paths["platlib"], str(Path(torch.__file__).parents[1])]
    site = list(dict.fromkeys(folders))
    environment = {
        **os.environ,
        "HF_HOME": str(isolated_home() / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)
    # `-S` skips .pth files and so an editable installation.
    server = subprocess.Popen(
        [sys.executable, "-I", "-S", str(SERVER), json.dumps(site)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=isolated_home(),
        env=environment,
    )
    atexit.register(server.kill)
    return server


def run_isolated(program: str, *words: object, package: Path | None = None) -> str:
    """Run `program`, which may use `sys`, with `words` as its arguments; return its stdout.

    It has as many threads as this process, for bit-identical sums. `import mmmamba_cli` takes it
    from the folder `package`, and fails without one. Raises `AssertionError` with the program's
    stderr if it fails.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory(dir=isolated_home()) as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        asked = {
            "program": program,
            "words": [*map(str, words)],
            "outputs": [*map(str, outputs)],
            "package": str(package) if package else None,
            "threads": torch.get_num_threads(),
        }
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = server.stdout.readline()
        assert code, f"the server of isolated processes ended: {server.wait()}"
        text, errors = (file.read_text(encoding="utf-8") for file in outputs)
    assert int(code) == 0, errors
    return text
