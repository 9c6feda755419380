"""Weights of several models in memory at once, every tensor that two of them share held once.

Subjects are measured in turn, so all of them want to be loaded. Teacher and student have the same
MLPs, norms, token table and head, which is most of a model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from mmmamba_cli.checkpoint import Checkpoint, expected_tensors, stored_dtype
from mmmamba_cli.checkpoint.tensors import cast
from mmmamba_cli.model import HolisticVLM, HolisticVLMConfig
from mmmamba_cli.profiling.instruments import or_out_of_memory, require

# Bounds of softplus^-1(dt) that decay neither at once nor never.
STEP_BIAS = (-6.0, -2.0)


class WeightStore:
    """Builds models on one device in one dtype; forgets a tensor when no model has it any more."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._parameters: WeakValueDictionary[tuple[str, str], nn.Parameter] = WeakValueDictionary()

    def load(self, checkpoint: Checkpoint) -> HolisticVLM:
        """The model of a checkpoint. Raises `OutOfMemory`, and `CheckpointError` as reading does.

        Tensors that no forward uses, as a HoVLE's second token table, are not read.
        """
        return self._model(checkpoint.config, str(checkpoint.path), checkpoint.read)

    def random(self, config: HolisticVLMConfig, family: str, seed: int) -> HolisticVLM:
        """A model with random weights that depend on their names alone; raises `OutOfMemory`.

        Models of one `family` share what they have in common, as teacher and student do.
        """
        shapes = expected_tensors(config)
        return self._model(config, family, lambda name: self._noise(name, shapes[name], seed))

    def _model(
        self, config: HolisticVLMConfig, owner: str, read: Callable[[str], Tensor]
    ) -> HolisticVLM:
        def build() -> HolisticVLM:
            with torch.device("meta"):
                model = HolisticVLM(config)
            for name in expected_tensors(config):
                place, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(place), leaf, self._take(owner, name, read))
            if config.tie_word_embeddings:
                model.tie_weights()
            return model.eval()

        return or_out_of_memory(build)

    def _take(self, owner: str, name: str, read: Callable[[str], Tensor]) -> nn.Parameter:
        """The parameter of that name: its owner's, else another's that is equal, else a new one."""
        held = self._parameters.get((owner, name))
        if held is not None:
            return held
        tensor = read(name)
        dtype = stored_dtype(name, self.dtype)
        require(self.device, tensor.numel() * dtype.itemsize, name)
        placed = nn.Parameter(cast(tensor, dtype, name, self.device), requires_grad=False)
        for (_, other), parameter in list(self._parameters.items()):
            same = other == name and parameter.shape == placed.shape
            if same and torch.equal(parameter, placed):
                placed = parameter
                break
        self._parameters[owner, name] = placed
        return placed

    def _noise(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Values of such sizes that every part of a model matters to its logits.

        Drawn on the device, in the dtype they will have: billions would take a CPU a minute.
        """
        device, dtype = self.device, stored_dtype(name, self.dtype)
        rng = torch.Generator(device).manual_seed((seed << 32) ^ zlib.crc32(name.encode()))
        if "norm" in name or name.endswith("A_log"):
            return torch.ones(shape, device=device, dtype=dtype)
        values = torch.empty(shape, device=device, dtype=dtype)
        if name.endswith("dt_bias"):
            return values.uniform_(*STEP_BIAS, generator=rng)
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0]
        return values.normal_(std=fan_in**-0.5, generator=rng)
