"""Golden tensors of related methods: `mixers/NAME.safetensors` and others, by folder.

MMMAMBA_GOLDEN_RELATED names another folder of the same layout. Its files may have other sizes, and
other names that begin with the same stem.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN_RELATED = Path(
    os.environ.get("MMMAMBA_GOLDEN_RELATED", Path(__file__).parent / "golden_related")
)


class RelatedTensors(NamedTuple):
    """The tensors of one file, without the prefixes of their names, floating ones in fp64.

    raw: projections from which the inputs were made.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    gradients: dict[str, Tensor]
    raw: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def scale(self) -> float:
        return float(self.metadata["scale"])


def related_files(folder: str, stem: str) -> list[Path]:
    """Files of `folder` whose names begin with `stem`; none at all is a broken checkout."""
    found = sorted((GOLDEN_RELATED / folder).glob(f"{stem}*.safetensors"))
    if not found:
        raise pytest.UsageError(
            f"no {folder}/{stem}*.safetensors in {GOLDEN_RELATED}: set MMMAMBA_GOLDEN_RELATED"
        )
    return found


def related_cases(folder: str, *stems: str) -> pytest.MarkDecorator:
    """Parametrize `file` with the files of all `stems`."""
    files = [file for stem in stems for file in related_files(folder, stem)]
    return pytest.mark.parametrize("file", files, ids=lambda file: file.stem)


def related_tensors(file: Path) -> RelatedTensors:
    """Read a file; inputs are leaves that require gradients."""
    groups, metadata = tensor_groups(file)
    inputs = {
        name: tensor.requires_grad_(tensor.is_floating_point())
        for name, tensor in groups["input"].items()
    }
    return RelatedTensors(
        inputs,
        groups["output"],
        groups["cotangent"],
        groups["grad"],
        groups.get("raw", {}),
        metadata,
    )


def tensor_groups(file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """The tensors of a file by the first part of their names, floating ones in fp64; metadata."""
    groups: dict[str, dict[str, Tensor]] = {}
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
        for key in opened.keys():  # noqa: SIM118  the file is no mapping
            group, _, name = key.partition(".")
            tensor = opened.get_tensor(key)
            wide = tensor.double() if tensor.is_floating_point() else tensor
            groups.setdefault(group, {})[name] = wide
    return groups, metadata


def assert_close_to_golden(golden: RelatedTensors, **outputs: Tensor) -> None:
    """Compare outputs to 1e-5 and, from the file's cotangents, all gradients to 1e-4, absolute."""
    assert outputs.keys() == golden.outputs.keys()
    total = torch.zeros((), dtype=torch.float64)
    for name, output in outputs.items():
        torch.testing.assert_close(output, golden.outputs[name], rtol=0, atol=1e-5)
        total = total + (output * golden.cotangents[name]).sum()
    assert golden.gradients.keys() == golden.inputs.keys()
    found = torch.autograd.grad(total, list(golden.inputs.values()))
    for name, gradient in zip(golden.inputs, found, strict=True):
        torch.testing.assert_close(gradient, golden.gradients[name], rtol=0, atol=1e-4)
