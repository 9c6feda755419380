"""Fork a process for each program read from stdin; see `isolated_process.py`.

Argument: JSON of the folders with the installed packages. Each line of stdin is JSON with
`program`, its `words`, `outputs` (files for stdout and stderr), `package` (the folder of this
package or null) and `threads`. The answer to each is a line with the exit code.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

# A process that takes longer is ended by a signal.
MAX_SECONDS = 300
OWN_PACKAGES = ("mmmamba_cli", "mmmamba_evals", "mmmamba_recipes")


class RefuseOwnPackages:
    """An import hook, because a regular installation is on the path."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in OWN_PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def import_libraries() -> None:
    """Import what most programs use."""
    from transformers import (  # noqa: F401
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
        GenerationMixin,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )

    assert not any(name.partition(".")[0] in OWN_PACKAGES for name in sys.modules)


def next_process() -> dict[str, Any]:
    """Serve until stdin ends; return in each forked process, with what it is asked for."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return dict(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    raise SystemExit


def prepare(asked: dict[str, Any]) -> None:
    import torch

    signal.alarm(MAX_SECONDS)
    for descriptor, file in zip((1, 2), asked["outputs"], strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["-c", *asked["words"]]
    # This also creates the thread pool of PyTorch, which a fork lacks.
    torch.set_num_threads(asked["threads"])
    if asked["package"] is not None:
        sys.path.insert(0, asked["package"])
        return
    sys.meta_path.insert(0, RefuseOwnPackages())
    try:
        import mmmamba_cli
    except ModuleNotFoundError:
        return
    raise SystemExit(f"mmmamba_cli is here: {mmmamba_cli.__file__}")


if __name__ == "__main__":
    sys.path[:] = [p for p in sys.path if "site-packages" not in p and p] + json.loads(sys.argv[1])
    import_libraries()
    asked = next_process()
    prepare(asked)
    exec(asked["program"], {"__name__": "__main__", "sys": sys})
