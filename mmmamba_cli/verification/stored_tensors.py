"""Every tensor of a teacher's files accounted for: names, shapes, dtypes and finite values."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import prod
from typing import Any

from mmmamba_cli.checkpoint import check_finite
from mmmamba_cli.checkpoint.tensor_source import TensorSource
from mmmamba_cli.errors import CheckpointError, name_some
from mmmamba_cli.inspection import format_bytes
from mmmamba_cli.teachers import model_names, unexpected_tensors
from mmmamba_cli.teachers.anatomy import meta_model, teacher_class
from mmmamba_cli.verification.report import DIFFERENT, OK, CheckResult

TENSORS, VALUES = "tensors", "finite values"
MAX_NAMED = 5


def check_stored_tensors(source: TensorSource, config: Any) -> CheckResult:
    """The tensors of the files and those of the stock class of `config`. Reads headers only.

    A name that the stock class declares as one to ignore is not unexpected. Where transformers
    joins several tensors to one, their elements are counted.
    """
    model = meta_model(teacher_class(type(config)), config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored: dict[str, list[str]] = defaultdict(list)
    for name, own in model_names(config, source.names).items():
        stored[own].append(name)
    tied = set(model.all_tied_weights_keys)
    missing = [name for name in expected if name not in stored and name not in tied]
    wrong = [
        f"{names[0]} is {list(source.info(names[0]).shape)}, expected {list(expected[own])}"
        for own, names in stored.items()
        if own in expected and not _fits(source, names, expected[own])
    ]
    problems = [
        f"{what}: {name_some(names, MAX_NAMED)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected_tensors(config, source.names)),
            ("other shapes", wrong),
        )
        if names
    ]
    if problems:
        return CheckResult(TENSORS, DIFFERENT, "; ".join(problems))
    return CheckResult(TENSORS, OK, describe_source(source))


def _fits(source: TensorSource, names: list[str], shape: tuple[int, ...]) -> bool:
    shapes = [source.info(name).shape for name in names]
    if len(shapes) == 1 and len(shapes[0]) == len(shape):
        return tuple(shapes[0]) == shape
    return sum(map(prod, shapes)) == prod(shape)


def describe_source(source: TensorSource) -> str:
    """The number of tensors and files, and the dtypes in which they are stored."""
    infos = [source.info(name) for name in source.names]
    kinds = Counter(info.dtype_name for info in infos)
    dtypes = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    size = format_bytes(sum(info.nbytes for info in infos))
    files = f"{len(source.files)} file{'s' if len(source.files) > 1 else ''}"
    return f"all {len(infos)} accounted for ({dtypes}; {size} in {files})"


def check_values(source: TensorSource) -> CheckResult:
    """No tensor has NaN or infinite values. Reads every tensor, one at a time."""
    for name in source.names:
        try:
            check_finite(source.read(name), name)
        except CheckpointError as error:
            return CheckResult(VALUES, DIFFERENT, str(error))
    return CheckResult(VALUES, OK, f"no NaN and no infinity in {len(source.names)} tensors")


def num_elements(source: TensorSource) -> int:
    """Elements of all tensors of the files."""
    return sum(prod(source.info(name).shape) for name in source.names)


def largest_tensor(source: TensorSource) -> tuple[str, int]:
    """Name and number of elements of the largest tensor."""
    sizes = {name: prod(source.info(name).shape) for name in source.names}
    name = max(sizes, key=lambda one: sizes[one])
    return name, sizes[name]
