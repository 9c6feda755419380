"""Which scan a model gets on this machine: backends that are there, and the one `auto` takes."""

from __future__ import annotations

import warnings

import torch

from mmmamba_cli.doctor.report import OK, WARNING, Check
from mmmamba_cli.ops.ssd import SCAN_BACKENDS
from mmmamba_cli.ops.ssd.choosing import choose
from mmmamba_cli.ops.ssd.limits import Scan

DTYPES = (torch.bfloat16, torch.float32)
BATCH, LENGTH, HEADS, KV_HEADS, DIM = 1, 8, 4, 2, 64


def check_choice(device: torch.device) -> Check:
    """The scan that `auto` takes on `device`, for each dtype, in inference and in training.

    A warning with what was seen if it passes over one that is installed because it is wrong here.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        taken = {
            (dtype, trains): _taken(device, dtype, trains)
            for dtype in DTYPES
            for trains in (False, True)
        }
    there = f"there are {', '.join(SCAN_BACKENDS)}; auto takes {_in_words(taken)}"
    seen = dict.fromkeys(str(each.message) for each in caught if each.category is RuntimeWarning)
    if seen:
        return Check("scan", WARNING, f"{there}. " + "; ".join(seen))
    return Check("scan", OK, there)


def _taken(device: torch.device, dtype: torch.dtype, trains: bool) -> str:
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device, requires_grad=trains)

    tokens = (BATCH, LENGTH)
    asked = Scan(
        x=zeros(*tokens, KV_HEADS, DIM, dtype=dtype),
        dt=zeros(*tokens, HEADS, dtype=dtype),
        A=zeros(HEADS),
        B=zeros(*tokens, KV_HEADS, DIM, dtype=dtype),
        C=zeros(*tokens, HEADS, DIM, dtype=dtype),
        dt_bias=None,
        D=None,
        initial_state=None,
        seq_idx=None,
    )
    return choose(SCAN_BACKENDS, asked)


def _in_words(taken: dict[tuple[torch.dtype, bool], str]) -> str:
    """`triton`, or `triton (bfloat16), chunked (float32; float32 in training)`."""
    if len(set(taken.values())) == 1:
        return next(iter(taken.values()))
    cases: dict[str, list[str]] = {}
    for (dtype, trains), name in taken.items():
        case = str(dtype).removeprefix("torch.") + (" in training" if trains else "")
        cases.setdefault(name, []).append(case)
    return ", ".join(f"{name} ({'; '.join(said)})" for name, said in cases.items())
