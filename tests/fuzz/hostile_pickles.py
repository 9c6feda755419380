"""Malicious pickles: code, false sizes, wrong contents."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

State = dict[str, torch.Tensor]


class Calls:
    """Unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.plan = (function, arguments)

    def __reduce__(self) -> Any:
        return self.plan


def payloads(canary: Path) -> list[Any]:
    """Objects that create the file `canary` when unpickled without checks."""
    import builtins
    import os
    import runpy
    import subprocess

    text = f"open({str(canary)!r}, 'w').close()"
    return [
        Calls(os.system, f"touch {canary}"),
        Calls(subprocess.check_output, ["touch", str(canary)]),
        Calls(builtins.exec, text),
        Calls(builtins.eval, text),
        Calls(builtins.open, str(canary), "w"),
        Calls(Path.touch, canary),
        Calls(os.mkdir, str(canary)),
        Calls(runpy.run_path, str(canary)),
        Calls(getattr, str, "join"),
        Calls(torch.load, str(canary)),
        Calls(torch.hub.load, "owner/name", "model"),
        Calls(torch.jit.load, str(canary)),
        Calls(__import__, "antigravity"),
    ]


def _with_payload(rng: random.Random, state: State, canary: Path) -> Any:
    payload = rng.choice(payloads(canary))
    return rng.choice(
        (
            payload,
            {**state, "extra": payload},
            {"state_dict": state, "optimizer": payload},
            {"state_dict": state, payload: 1},
            [payload, state],
            OrderedDict([("a", payload), *state.items()]),
        )
    )


def _of_wrong_types(rng: random.Random, state: State, canary: Path) -> Any:
    first = next(iter(state))
    whole: list[Any] = [
        None,
        3,
        "text",
        [],
        {},
        list(state.values()),
        {1: state[first]},
        {**state, 7: state[first]},
        {**state, "epoch": 3},
        {**state, first: None},
        {**state, first: state[first].to_sparse()},
        {**state, first: state[first].to(torch.complex64)},
        {**state, first: torch.empty(3, 4, device="meta")},
        {**state, first: state[first].expand(10_000, *state[first].shape)},
        {**state, first: torch.full_like(state[first], float("nan"))},
        {**state, first: torch.full_like(state[first], float("inf"))},
        {**state, first: state[first].to(torch.int64)},
        {**state, first: state[first][..., :1]},
        {**state, "a\ud800": state[first]},
        {**state, "\x1b[2J": state[first]},
        {**state, "x" * 100_000: state[first]},
        {"state_dict": {"state_dict": {"model": {}}}},
        {"model": state, "state_dict": {"a": 1}},
        {k: v for k, v in state.items() if k != first},
        {"a": torch.nn.Parameter(state[first])},
        {"state_dict": torch.nn.Linear(2, 2)},
    ]
    return rng.choice(whole)


def _circle(rng: random.Random, state: State, canary: Path) -> Any:
    circle: dict[str, Any] = {}
    circle["state_dict"] = circle
    return circle


def bad_state(rng: random.Random, state: State, canary: Path, done: list[str]) -> bytes:
    """The bytes of a malicious file, in torch's format or as a bare pickle."""
    make = rng.choice((_with_payload, _with_payload, _of_wrong_types, _of_wrong_types, _circle))
    value = make(rng, state, canary)
    new = rng.random() < 0.7
    done.append(f"{make.__name__}, {'zip' if new else 'old format'}")
    file = io.BytesIO()
    if make is _with_payload and rng.random() < 0.3:
        done.append("bare pickle")
        return pickle.dumps(value, protocol=rng.choice((0, 2, 4, 5)))
    torch.save(value, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def lying_zip(rng: random.Random, good: bytes, done: list[str]) -> bytes:
    """A zip with compressed, missing, duplicate or misnamed entries."""
    kind = rng.choice(("packed", "bomb", "lacks", "twice", "outside", "sizes", "empty", "other"))
    done.append(f"zip {kind}")
    if kind == "sizes":
        at = good.rfind(b"PK\x01\x02")
        return good[: at + 20] + rng.choice((b"\xff" * 8, b"\0" * 8)) + good[at + 28 :]
    source, file = zipfile.ZipFile(io.BytesIO(good)), io.BytesIO()
    packing = zipfile.ZIP_DEFLATED if kind in ("packed", "bomb") else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", packing) as target:
        for index, name in enumerate([] if kind == "empty" else source.namelist()):
            if kind == "lacks" and index == rng.randrange(4):
                continue
            target.writestr(f"../../{name}" if kind == "outside" else name, source.read(name))
            if kind == "twice" and index == 0:
                target.writestr(name, b"garbage")
        if kind == "bomb":
            target.writestr("archive/data/999", b"\0" * (64 << 20))
        if kind == "other":
            target.writestr("archive/code/x.py", "raise SystemExit(3)")
    return file.getvalue()
