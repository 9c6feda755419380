"""State dicts, nested and plain, and damaged or malicious pickles."""

import argparse
import io
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmmamba_cli.checkpoint.tensor_source import open_source
from mmmamba_cli.checkpoint.torch_pickle import PickleFile
from mmmamba_cli.errors import CheckpointError

STATE = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b": torch.tensor([1, 2], dtype=torch.int16),
    "c": torch.randn(4).to(torch.bfloat16),
}
OLD = {"_use_new_zipfile_serialization": False}


def refused(path: Path, *parts: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in {caught.value}"
    return str(caught.value)


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def assert_is_state(path: Path) -> None:
    with open_source(path) as source:
        assert source.kind == "pickle"
        assert source.names == tuple(STATE)
        for name, tensor in STATE.items():
            assert source.read(name).dtype == tensor.dtype
            assert torch.equal(source.read(name), tensor)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_plain_state_dict(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    assert_is_state(saved(tmp_path / f"x{suffix}", STATE, **options))


WRAPPINGS: dict[str, Any] = {
    "state_dict": {"epoch": 3, "state_dict": STATE, "optimizer": [{"lr": 0.1}]},
    "model_state_dict": {"model_state_dict": STATE, "loss": 0.5},
    "model": {"model": STATE, "args": None},
    "twice": {"model": {"state_dict": OrderedDict(STATE)}},
    "beside settings": {"model": {"width": 3}, "state_dict": STATE},
    "prefixed": {f"module.{name}": tensor for name, tensor in STATE.items()},
    "nested and prefixed": {"state_dict": {f"module.{n}": t for n, t in STATE.items()}},
    "parameters": {
        name: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        for name, tensor in STATE.items()
    },
}


@pytest.mark.parametrize("content", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_wrapped_state_dict(tmp_path: Path, content: Any) -> None:
    assert_is_state(saved(tmp_path / "x.ckpt", content))


def test_state_dict_of_a_module(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    source = open_source(saved(tmp_path / "x.pt", module.state_dict()))
    assert source.names == tuple(module.state_dict())
    assert not source.read("0.weight").requires_grad


def test_shared_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(6.0).view(2, 3)
    source = open_source(saved(tmp_path / "x.pt", {"a": base, "tied": base, "t": base.T}))
    assert torch.equal(source.read("t"), base.T)
    assert torch.equal(source.read("tied"), base)


BAD_STATES: dict[str, tuple[Any, str]] = {
    "a list": ([torch.zeros(1)], "one object of type list, expected a state dict"),
    "a number": (3, "one object of type int"),
    "a bare tensor": (torch.zeros(3), "one object of type Tensor"),
    "empty": ({}, "holds no tensors"),
    "a scalar among tensors": ({**STATE, "step": 3}, "found 'step' (int)"),
    "nested otherwise": ({"weights": STATE}, "found 'weights' (dict)"),
    "tensors beside the nest": ({"model": STATE, "head": torch.zeros(1)}, "found 'model' (dict)"),
    "many": ({f"n{i}": i for i in range(12)}, "'n9' (int) and 2 more"),
    "numbers as names": ({1: torch.zeros(1)}, "expected text as tensor names, found 1"),
    "sparse": ({"s": torch.eye(3).to_sparse()}, "'s' is sparse"),
    "complex": ({"z": torch.zeros(2, dtype=torch.complex64)}, "unknown dtype complex64"),
    "without data": ({"m": torch.zeros(2, device="meta")}, "'m' comes without data"),
    "more than the file holds": ({"e": torch.zeros(1).expand(100_000)}, "claims 400000 bytes"),
    "surrogate": ({"\ud800": torch.zeros(1)}, r"'\ud800' has a name that is not UTF-8"),
}


@pytest.mark.parametrize("content, message", BAD_STATES.values(), ids=BAD_STATES.keys())
def test_not_a_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    refused(saved(tmp_path / "x.pt", content), "x.pt", message)


@pytest.mark.filterwarnings("ignore")  # torch deprecates them
def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    refused(saved(tmp_path / "x.pt", {"q": quantized}), "'q' is sparse, nested or quantized")


class Harmful:
    """Unpickling runs a shell command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize(
    "options",
    [{}, OLD, {"pickle_protocol": 4}, {**OLD, "pickle_protocol": 4}],
    ids=["zip", "old", "zip protocol 4", "old protocol 4"],
)
def test_code_is_named_and_never_run(tmp_path: Path, options: dict[str, Any]) -> None:
    trap = tmp_path / "sprung"
    path = saved(tmp_path / "x.ckpt", {**STATE, "h": Harmful(f"touch {trap}")}, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = refused(path, "holds code, which is never run", "asks for posix.system")
    assert "Ordered" not in message
    assert "rebuild" not in message
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), "the trap itself does not work, so the test above shows nothing"


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_code_in_a_bare_pickle(tmp_path: Path, protocol: int) -> None:
    trap = tmp_path / "sprung"
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps(Harmful(f"touch {trap}"), protocol))
    refused(path, "holds code", "posix.system")
    assert not trap.exists()


def test_code_in_a_shard_is_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    saved(tmp_path / "part.bin", {"h": Harmful(f"touch {trap}")})
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"h": "part.bin"}}')
    refused(tmp_path, "part.bin holds code")
    assert not trap.exists()


def test_whole_models_and_settings_are_code(tmp_path: Path) -> None:
    refused(saved(tmp_path / "x.pt", torch.nn.Linear(2, 2)), "torch.nn.modules.linear.Linear")
    refused(saved(tmp_path / "x.pt", {"args": argparse.Namespace(a=1)}), "argparse.Namespace")


def test_globals_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"\x80\x02cos\x1b[2J\nsystem\n.")
    assert "\x1b" not in refused(path, r"os\x1b[2J.system")


def test_conversion_command(tmp_path: Path) -> None:
    content = {"state_dict": {**STATE, "tied": STATE["b"]}, "args": argparse.Namespace(a=1)}
    path = saved(tmp_path / "x.ckpt", content)
    line = refused(path).split("python -c ", 1)[1].rsplit(")", 1)[0]
    assert line.startswith('"')
    assert line.endswith('"')
    subprocess.run([sys.executable, "-c", line[1:-1]], check=True, cwd=tmp_path)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a.weight"], STATE["a.weight"])


def zipped(state: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_truncated_files(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = saved(tmp_path / "whole.pt", STATE, **options).read_bytes()
    for length in (1, 3, 4, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        refused(tmp_path / "x.pt", "damaged")


def test_empty_file_and_foreign_content(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"")
    refused(tmp_path / "x.pt", "x.pt is empty")
    (tmp_path / "x.pt").write_bytes(b"<!DOCTYPE html><html>not found</html>")
    refused(tmp_path / "x.pt", "damaged, or is no state dict")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("holiday.txt", "photos")
    refused(tmp_path / "x.pt", "damaged, or is no state dict")


def test_zip_bomb(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 50_000_000)
        archive.writestr("x/version", b"3")
    assert (tmp_path / "x.pt").stat().st_size < 100_000
    refused(tmp_path / "x.pt", "compressed entries", "'x/data.pkl'")


def test_entry_that_claims_more_than_the_file(tmp_path: Path) -> None:
    content = bytearray(zipped(STATE))
    directory = content.index(b"PK\x01\x02")
    content[directory + 20 : directory + 28] = struct.pack("<2I", 3 << 30, 3 << 30)
    (tmp_path / "x.pt").write_bytes(content)
    refused(tmp_path / "x.pt", "reach beyond its end")


class Claiming:
    """Pickles as a tensor with a size other than its storage's."""

    def __init__(self, tensor: torch.Tensor, size: int):
        self.tensor, self.size = tensor, size

    def __reduce__(self) -> Any:
        arguments = (self.tensor.storage(), 0, (self.size,), (1,), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_tensor_larger_than_its_storage(tmp_path: Path, options: dict[str, Any]) -> None:
    refused(saved(tmp_path / "x.pt", {"a": Claiming(torch.ones(4), 5)}, **options), "damaged")
    good = PickleFile(saved(tmp_path / "y.pt", {"a": Claiming(torch.ones(4), 4)}, **options))
    assert torch.equal(good.read("a"), torch.ones(4))


def test_missing_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.pt", STATE)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", denied)
    refused(path, "x.pt cannot be read: Permission denied")
