"""The device that a command or a caller asks for, checked before anything is loaded onto it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.errors import MmmambaError

if TYPE_CHECKING:
    import torch

# Devices that commands run on. `mmmamba_cli.load` takes any that torch has.
COMMAND_DEVICES = ("cpu", "cuda")
REMEDY = "give cpu or cuda"


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name for a command; CUDA where there is one, if None.

    Raises `MmmambaError` for a name that is not known, and for a device that is not there.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = _parsed(name)
    if device.type not in COMMAND_DEVICES:
        raise MmmambaError(f"device {str(name)!r} cannot be used", REMEDY)
    return check_device(device)


def check_device(name: str | int | torch.device) -> torch.device:
    """The device of that name, of any kind, if this machine has it. Raises `MmmambaError`."""
    import torch

    device = _parsed(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise MmmambaError(f"device {device} is not there: {_gpus(count)}", "give cpu")
    elif device.type not in ("cpu", "meta"):
        known = torch.accelerator.current_accelerator(check_available=True)
        if known is None or known.type != device.type:
            raise MmmambaError(f"device {device} is not there: torch finds no such device", REMEDY)
    return device


def _parsed(name: str | int | torch.device) -> torch.device:
    import torch

    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise MmmambaError(f"device {name!r} is not known", REMEDY) from error


def _gpus(count: int) -> str:
    import torch

    if count:
        return f"torch finds {count} GPU{'s' if count > 1 else ''}, counted from 0"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch was built without CUDA"
    return "torch finds no GPU"
