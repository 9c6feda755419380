"""A Python process with the dependencies of an export but without this package."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

# `-S` skips .pth files and so an editable installation; the import hook refuses a regular one.
START = """
import sys
sys.path[:] = [p for p in sys.path if "site-packages" not in p and p] + {site!r}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mmmamba_cli", "mmmamba_evals", "mmmamba_recipes"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
try:
    import mmmamba_cli
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("mmmamba_cli is here")
"""


def run_isolated(program: str, *words: object, home: Path) -> str:
    """Run `program` in the process and return its stdout; `home` is an empty cache folder."""
    paths = sysconfig.get_paths()
    site = list(dict.fromkeys([paths["purelib"], paths["platlib"]]))
    environment = {
        **os.environ,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        # The same number of threads, for bit-identical sums.
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", START.format(site=site) + program, *map(str, words)],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
