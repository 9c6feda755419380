"""Ctrl-C at any moment: exit code 130, and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Interrupts of a command; MMMAMBA_KILLS=20 interrupts it more often.
KILLS = int(os.environ.get("MMMAMBA_KILLS", "0"))
# Seconds of a command that takes long.
LONG_SECONDS = 4.0
# Seconds until an interrupted command has ended, on a busy machine too.
ENDED_SECONDS = 120.0
# A background shell job ignores Ctrl-C, and its child processes inherit that.
HEED = "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
MAIN = "from mmmamba_cli.__main__ import main\nmain()\n"
# Interrupts are handled once `main` has installed its handler, before all imports; Python's own
# start-up is out of reach.
READY_MAIN = (
    "import sys\nfrom mmmamba_cli import interrupts\n"
    "catch = interrupts.handle_interrupts\n"
    "def catch_and_say():\n"
    "    catch()\n    assert 'mmmamba_cli.cli' not in sys.modules\n    os.write(1, b'.')\n"
    "interrupts.handle_interrupts = catch_and_say\n"
) + MAIN


def start(code: str, *words: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    try:
        _, stderr = process.communicate(timeout=ENDED_SECONDS)
    finally:
        process.kill()
    return process.returncode, stderr.decode()


def interrupted(code: str, words: Sequence[object], seconds: float) -> tuple[int, str]:
    """Exit code and stderr of a process that is interrupted after a delay from its first line."""
    with start(code, *words) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        return ended(process)


def seconds_of(words: Sequence[object]) -> float:
    begun = time.perf_counter()
    with start(HEED + READY_MAIN, *words) as process:
        ended(process)
    return time.perf_counter() - begun


@pytest.mark.parametrize(
    ("words", "moments"),
    [
        (["--help"], max(8, KILLS)),
        (["inspect", "scenes-linear"], max(12, KILLS)),
        (["doctor", "--device", "cpu"], max(4, KILLS)),
    ],
)
def test_at_any_moment_of_a_command(words: list[str], moments: int) -> None:
    """Interrupt imports, work and exit; a process that has ended already is skipped."""
    whole = LONG_SECONDS if words[0] == "doctor" else seconds_of(words)
    codes = []
    for moment in range(moments):
        code, said = interrupted(HEED + READY_MAIN, words, whole * moment / moments)
        assert "Traceback" not in said, (moment, said)
        assert "KeyboardInterrupt" not in said, (moment, said)
        codes.append(code)
    # Once Python has restored the default handlers, the signal itself ends the process.
    assert set(codes) <= {0, 130, -signal.SIGINT}, codes
    assert codes[0] == 130


CASES = {
    # Packages that treat every failed import as a missing dependency.
    "an import that swallows it": (
        "import pathlib, sys, tempfile\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "(folder / 'greedy.py').write_text('import os, time\\nos.write(1, b\".\")\\n"
        "try:\\n    time.sleep(600)\\nexcept BaseException:\\n    pass\\ntime.sleep(600)\\n')\n"
        "sys.path.insert(0, str(folder))\n"
        "import greedy\n"
    ),
    "a library that turns it into its own error": (
        "import os, time\nos.write(1, b'.')\n"
        "try:\n    time.sleep(600)\n"
        "except KeyboardInterrupt:\n    raise RuntimeError('worker exited')\n"
    ),
    "a finaliser": (
        "import os, time\n"
        "class Held:\n    def __del__(self):\n        os.write(1, b'.')\n        time.sleep(600)\n"
        "held = Held()\ndel held\ntime.sleep(600)\n"
    ),
    "a forked worker": (
        "import multiprocessing, os, time\n"
        "def work():\n    os.write(1, b'.')\n    time.sleep(600)\n"
        "worker = multiprocessing.get_context('fork').Process(target=work)\n"
        "worker.start()\nworker.join()\n"
    ),
    # Processes started as by `scenes build`, interrupted during their imports.
    "spawned workers": (
        "import multiprocessing, os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from contextlib import ExitStack\n"
        "from mmmamba_cli.interrupts import block_interrupts\n"
        "with ExitStack() as stack:\n"
        "    pool = ProcessPoolExecutor(2, multiprocessing.get_context('spawn'))\n"
        "    stack.callback(pool.shutdown, cancel_futures=True)\n"
        "    with block_interrupts():\n"
        "        results = pool.map(time.sleep, [1] * 300)\n"
        "    os.write(1, b'.')\n"
        "    list(results)\n"
    ),
    "the end of the interpreter": (
        "import atexit, os, time\n"
        "atexit.register(time.sleep, 600)\natexit.register(os.write, 1, b'.')\n"
    ),
}


@pytest.mark.parametrize("body", CASES.values(), ids=CASES.keys())
def test_wherever_it_arrives(body: str) -> None:
    command = "".join(f"    {line}\n" for line in body.splitlines())
    code = (
        "import sys, types\n"
        "from mmmamba_cli.cli import app\n"
        f"def act():\n{command}"
        "module = sys.modules['mmmamba_cli.cli.act'] = types.ModuleType('mmmamba_cli.cli.act')\n"
        "module.command = act\napp.COMMANDS = (*app.COMMANDS, 'act')\n"
    )
    # `ended` waits for less time than the command would take.
    assert interrupted(HEED + code + MAIN, ["act"], 0.2) == (130, "")


def test_an_ignored_one_stays_ignored() -> None:
    ignore = "import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code, _ = interrupted(ignore + READY_MAIN, ["recipe", "list"], 0.05)
    assert code == 0


def test_a_bug_after_an_answered_interrupt_keeps_its_traceback() -> None:
    body = (
        "    try:\n        os.write(1, b'.')\n        time.sleep(600)\n"
        "    except KeyboardInterrupt:\n        pass\n    raise KeyError('ours')\n"
    )
    code = (
        "import os, sys, time, types\nfrom mmmamba_cli.cli import app\n"
        f"def act():\n{body}"
        "module = sys.modules['mmmamba_cli.cli.act'] = types.ModuleType('mmmamba_cli.cli.act')\n"
        "module.command = act\napp.COMMANDS = (*app.COMMANDS, 'act')\n"
    )
    ended_with, said = interrupted(HEED + code + MAIN, ["act"], 0.2)
    assert ended_with == 1
    assert said.endswith("KeyError: 'ours'\n")
