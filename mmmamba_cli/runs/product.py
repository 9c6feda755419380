"""Products: their specification, and writing them atomically, weights tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.checkpoint import (
    NATIVE_MODEL_TYPE,
    SOURCE_CONFIG,
    Checkpoint,
    ShardedWriter,
    TensorHasher,
    TensorInfo,
    atomic_folder,
    generation_config,
    tensor_plan,
)
from mmmamba_cli.checkpoint.atomic_writes import check_replaceable, unlisted_files
from mmmamba_cli.errors import RunError
from mmmamba_cli.model import HolisticVLMConfig
from mmmamba_cli.processing import (
    HolisticTextProcessor,
    HolisticVLMProcessor,
    processor_from_folder,
    processor_from_hovle,
    processor_from_language_model,
)
from mmmamba_cli.runs.manifest import (
    MANIFEST,
    Manifest,
    Parent,
    command_line,
    manifest_text,
    package_versions,
    utc_timestamp,
)
from mmmamba_cli.runs.run import Run

# Files of a teacher that its student has too: processor, tokenizer, chat template, generation, and
# the licence.
TEACHER_FILES = (
    "LICEN[CS]E*",
    "NOTICE*",
    "*.model",
    "*.tiktoken",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)
# Files that mmmamba writes into a product's folder, and tokenizer files of a teacher that users
# copy into it.
PRODUCT_FILES = (
    *TEACHER_FILES,
    MANIFEST,
    SOURCE_CONFIG,
    "config.json",
    "fidelity.json",
    "losses.png",
    "metrics.jsonl",
    "model-*-of-*.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
)

ReadTensor = Callable[[str], Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ProductModel:
    """The model of a product: what `write_product` needs of any kind of model.

    Attributes:
        tensors: descriptions of its tensors, by their names in the file.
        parameters: number of parameters that the forward pass uses.
        attention_layers, num_layers: layers with the teacher's attention, and all layers.
        dtype: the dtype of the weights; small parameters may be wider.
        write_files: writes config, processor and generation config into a folder.
    """

    tensors: Mapping[str, TensorInfo]
    parameters: int
    attention_layers: tuple[int, ...]
    num_layers: int
    dtype: torch.dtype
    write_files: Callable[[Path], None]


def holistic_model(
    config: HolisticVLMConfig, shapes: Mapping[str, Shape], origin: Checkpoint, dtype: torch.dtype
) -> ProductModel:
    """The model of a product of class `HolisticVLM`; see `write_model_files` for `origin`."""
    return ProductModel(
        tensors=tensor_plan(shapes, dtype),
        parameters=sum(prod(s) for n, s in shapes.items() if not n.startswith("unused.")),
        attention_layers=config.attention_layers,
        num_layers=config.num_hidden_layers,
        dtype=dtype,
        write_files=partial(write_model_files, config=config, origin=origin, dtype=dtype),
    )


@dataclass(frozen=True)
class ProductSpec:
    """A product to be written: its metadata, and a function that reads each of its tensors."""

    name: str
    made_by: str
    model: ProductModel
    read: ReadTensor
    recipe: str
    # Called after all tensors are read: a parent's hash may be known only then.
    parents: Callable[[], tuple[Parent, ...]]
    stages: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    final: bool | None = False
    metrics: Mapping[str, Any] = field(default_factory=dict)
    # Digests of the data of a stage, by `train` and `held_out`.
    data: Mapping[str, dict[str, str]] = field(default_factory=dict)
    # How the attention layers were chosen, if by measurement.
    selection: Mapping[str, Any] = field(default_factory=dict)
    # Hashes tensors of a parent that `read` returns.
    hasher: TensorHasher | None = None


def write_product(
    run: Run,
    spec: ProductSpec,
    *,
    overwrite: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Manifest:
    """Write a product into the run, atomically, with one tensor of `spec.read` in memory at a time.

    `advance` is called with the number of bytes written. The caller holds the run's lock.

    Raises:
        RunError: if the product exists and `overwrite` is false.
        CheckpointError: if its folder has files that mmmamba did not write, or a value does not fit
            into the product's dtype.
    """
    target = run.product_folder(spec.name)
    if target.exists() and not overwrite:
        raise RunError(
            f"{run.folder} already has a product {spec.name!r}",
            "replace it with --overwrite, or choose another --run",
        )
    plan = spec.model.tensors
    with atomic_folder(target, overwrite, check_product_folder) as folder:
        with ShardedWriter(folder, plan, hasher=spec.hasher) as writer:
            for name, info in plan.items():
                writer.write(name, spec.read(name), cast=True)
                if advance is not None:
                    advance(info.nbytes)
            content_hash = writer.finish()
        manifest = _manifest(spec, content_hash)
        spec.model.write_files(folder)
        (folder / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
    return manifest


def check_product_folder(folder: Path) -> None:
    """Raise `CheckpointError` if a product's folder has files that mmmamba did not write."""
    check_replaceable(folder, lambda found: unlisted_files(found, PRODUCT_FILES), "mmmamba")


def _manifest(spec: ProductSpec, content_hash: str) -> Manifest:
    return Manifest(
        name=spec.name,
        made_by=spec.made_by,
        created=utc_timestamp(),
        command=command_line(),
        content_hash=content_hash,
        parents=spec.parents(),
        attention_layers=spec.model.attention_layers,
        num_layers=spec.model.num_layers,
        stages=spec.stages,
        dtype=str(spec.model.dtype).removeprefix("torch."),
        parameters=spec.model.parameters,
        recipe=spec.recipe,
        notes=spec.notes,
        final=spec.final,
        metrics=dict(spec.metrics),
        data=dict(spec.data),
        selection=dict(spec.selection),
        versions=package_versions(),
    )


def write_model_files(
    folder: Path, config: HolisticVLMConfig, origin: Checkpoint, dtype: torch.dtype
) -> None:
    """Write config, generation config, processor and the teacher's config beside the weights.

    `origin` is the checkpoint with the tokenizer and the config of the teacher.
    """
    config = HolisticVLMConfig.from_dict(config.to_dict())
    config.dtype = dtype
    config.architectures = ["HolisticVLM"]
    config.save_pretrained(folder)
    source = json.dumps(origin.raw_config, indent=2, ensure_ascii=False) + "\n"
    (folder / SOURCE_CONFIG).write_text(source, encoding="utf-8")
    generation = generation_config(origin)
    processor = open_processor(origin)
    if processor is not None:
        processor.save_pretrained(folder)
        generation.eos_token_id = sorted(set(processor.stop_token_ids))
    generation.save_pretrained(folder)


def open_processor(checkpoint: Checkpoint) -> HolisticVLMProcessor | HolisticTextProcessor | None:
    """The processor of a checkpoint; None if it has no tokenizer."""
    file = checkpoint.tokenizer_file
    if file is None:
        return None
    if checkpoint.model_type == NATIVE_MODEL_TYPE:
        processor = processor_from_folder(file.parent)
        # The code bundled with an export is this package's own: its references are dropped.
        processor.tokenizer.init_kwargs.pop("auto_map", None)
        return processor
    if checkpoint.config.vision is None:
        return processor_from_language_model(checkpoint.raw_config, file)
    return processor_from_hovle(checkpoint.raw_config, file)
