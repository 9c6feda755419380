"""A device whose waits are counted: its tensors have their values on the CPU.

A `DeviceTensor` says that it is on the meta device, where no value could be read. `DeviceRecorder`
runs its operators on the CPU and counts those for which the host would wait for a GPU: values that
are read, shapes that depend on values (`nonzero`, boolean masks), and copies that block. Operators
on tensors of both devices fail as on a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from mmmamba_cli.data import ModelBatch

DEVICE = torch.device("meta")
_ATEN = torch.ops.aten
# Operators that give a value of the device, or a shape that depends on values.
READING = {
    _ATEN._local_scalar_dense.default,
    _ATEN.equal.default,
    _ATEN.masked_select.default,
    _ATEN.nonzero.default,
    _ATEN.repeat_interleave.Tensor,
    _ATEN.unique_consecutive.default,
    _ATEN._unique2.default,
}
INDEXING = {
    _ATEN.index.Tensor,
    _ATEN.index_put.default,
    _ATEN.index_put_.default,
    _ATEN._index_put_impl_.default,
}
_TORCH = str(Path(torch.__file__).parent)


class DeviceTensor(Tensor):
    """A tensor that says that it is on `DEVICE`; `values` are on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> DeviceTensor:
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            values.stride(),
            values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        made.values = values
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of DeviceRecorder")


def is_device(value: Any) -> bool:
    return isinstance(value, DeviceTensor)


class DeviceRecorder(TorchDispatchMode):
    """Runs operators of `DEVICE` on the CPU.

    Attributes:
        waits: numbers of waits by the name of the innermost function outside of torch.
        operators: number of operators on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operators = 0

    def note(self) -> None:
        """Count a wait of the function that is running."""
        frame: Any = sys._getframe()
        while frame.f_code.co_filename.startswith((_TORCH, __file__)):
            frame = frame.f_back
        self.waits[frame.f_code.co_name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        named = kwargs.get("device")
        to_device = named is not None and torch.device(named) == DEVICE
        on_device = any(map(is_device, flat))
        lands = on_device or to_device
        if func in (_ATEN._to_copy.default, _ATEN.copy_.default):
            lands = self._copies(func, args, kwargs, to_device)
        elif on_device:
            self._check(func, args, flat)
        self.operators += lands
        plain_args, plain_kwargs = tree_map_only(
            DeviceTensor, lambda one: one.values, (args, kwargs)
        )
        if to_device:
            plain_kwargs = {**plain_kwargs, "device": "cpu"}
        out = func(*plain_args, **plain_kwargs)
        if func._schema.name.endswith("_"):
            return args[0]
        return tree_map_only(Tensor, DeviceTensor, out) if lands else out

    def _copies(self, func: Any, args: Any, kwargs: Any, to_device: bool) -> bool:
        """Count a copy between the devices that blocks; return whether the result is here."""
        if func is _ATEN.copy_.default:
            source, lands = args[1], is_device(args[0])
            blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        else:
            source = args[0]
            lands = to_device if kwargs.get("device") is not None else is_device(source)
            blocks = not kwargs.get("non_blocking")
        if is_device(source) != lands and blocks:
            self.note()
        return lands

    def _check(self, func: Any, args: Any, flat: Iterable[Any]) -> None:
        indices = args[1] if func in INDEXING else ()
        for one in indices:
            if one is not None and (one.dtype == torch.bool or not is_device(one)):
                self.note()
        if func in READING:
            self.note()
        for one in flat:
            known = is_device(one) or any(one is index for index in indices)
            if isinstance(one, Tensor) and one.dim() and not known:
                raise RuntimeError(f"{func} of tensors on two devices")


class _Conversions(TorchFunctionMode):
    """Numbers that become tensors, and tensors that become numbers, before any operator runs."""

    def __init__(self, recorder: DeviceRecorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.tolist and is_device(args[0]):
            self.recorder.note()
            return args[0].values.tolist()
        named = kwargs.get("device")
        makes = func in (torch.tensor, torch.as_tensor) and named is not None
        if makes and torch.device(named) == DEVICE and not is_device(args[0]):
            self.recorder.note()
            (values,) = tree_map_only(DeviceTensor, lambda one: one.values.tolist(), args)
            return DeviceTensor(func(values, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


@contextmanager
def recorded_device() -> Iterator[DeviceRecorder]:
    """A context in which `DEVICE` works."""
    with DeviceRecorder() as recorder, _Conversions(recorder):
        yield recorder


def move_models(*models: nn.Module) -> None:
    """Move parameters and buffers to the device; shared ones stay shared."""
    moved: dict[Tensor, Tensor] = {}
    for module in (part for model in models for part in model.modules()):
        for owned in (module._parameters, module._buffers):
            for name, value in owned.items():
                if value is None or is_device(value.data):
                    continue
                if value not in moved:
                    copy: Tensor = DeviceTensor(value.detach())
                    if isinstance(value, nn.Parameter):
                        copy = nn.Parameter(copy, requires_grad=value.requires_grad)
                    moved[value] = copy
                owned[name] = moved[value]  # type: ignore[assignment]


def moved_batch(batch: ModelBatch) -> ModelBatch:
    """The batch on the device, as a loader moves it."""
    return replace(
        batch,
        inputs={name: DeviceTensor(value) for name, value in batch.inputs.items()},
        labels=DeviceTensor(batch.labels),
        seq_idx=None if batch.seq_idx is None else DeviceTensor(batch.seq_idx),
        on_host=batch,
    )
