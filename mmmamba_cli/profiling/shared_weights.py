"""The weight store of a profile, which shares equal tensors between models.

Repeats alternate between the subjects, so all of them are loaded at once. Teacher and student share
MLPs, norms, token embedding and head, which is most of a model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from math import prod
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmmamba_cli.architecture import parameter_shapes
from mmmamba_cli.checkpoint import Checkpoint, InPlaceCheckpoint, load_in_place_model, stored_dtype
from mmmamba_cli.checkpoint.tensor_io import cast
from mmmamba_cli.devices import require_memory, translate_out_of_memory
from mmmamba_cli.distill.in_place_pair import replace_parameters
from mmmamba_cli.model import HolisticVLM, HolisticVLMConfig
from mmmamba_cli.runs import pick_placement

# Bounds of softplus^-1(dt) for which a state decays neither at once nor not at all.
DT_BIAS_RANGE = (-6.0, -2.0)


class WeightStore:
    """Models on one device in one dtype; equal tensors of several models are stored once.

    A tensor is freed with the last model that uses it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        # By owner, name and shape, which depends on the mixer of a layer.
        self._parameters: WeakValueDictionary[tuple[object, ...], nn.Parameter] = (
            WeakValueDictionary()
        )
        # Models of transformers by path.
        self._in_place: WeakValueDictionary[str, PreTrainedModel] = WeakValueDictionary()

    def load(self, checkpoint: Checkpoint) -> HolisticVLM:
        """Load the model of a checkpoint. Raises `OutOfMemory` and `CheckpointError`.

        Tensors that the forward does not use, for example HoVLE's second token embedding, are not
        read.
        """
        return self._build(checkpoint.config, str(checkpoint.path), checkpoint.read)

    def load_in_place(self, checkpoint: InPlaceCheckpoint) -> PreTrainedModel:
        """Load a model of transformers. Raises `OutOfMemory` and `CheckpointError`.

        A parameter that equals one of another model is stored once, after both were in memory.
        """
        key = str(checkpoint.path)
        held = self._in_place.get(key)
        if held is not None:
            return held
        elements = sum(prod(shape) for shape in checkpoint.shapes.values())
        require_memory(self.device, elements * self.dtype.itemsize, f"the model {key}")
        model = translate_out_of_memory(
            lambda: load_in_place_model(
                checkpoint, device=self.device, dtype=self.dtype, frozen=True
            )
        )
        others = [dict(other.named_parameters()) for other in self._in_place.values()]

        def shared(name: str, parameter: nn.Parameter) -> nn.Parameter:
            found = (other[name] for other in others if name in other)
            return next((one for one in found if _are_equal(one, parameter)), parameter)

        replace_parameters(model, shared)
        self._in_place[key] = model
        return model

    def random(self, config: HolisticVLMConfig, family: str, seed: int) -> HolisticVLM:
        """Build a model with random weights that depend on seed and tensor name only.

        Models of one `family` share equal tensors, as teacher and student do. Raises `OutOfMemory`.
        """
        shapes = parameter_shapes(config)
        return self._build(
            config, family, lambda name: self._random_tensor(name, shapes[name], seed)
        )

    def _build(
        self, config: HolisticVLMConfig, owner: str, read: Callable[[str], Tensor]
    ) -> HolisticVLM:
        def build() -> HolisticVLM:
            with torch.device("meta"):
                model = HolisticVLM(config)
            for name, shape in parameter_shapes(config).items():
                place, _, leaf = name.rpartition(".")
                parameter = self._parameter((owner, name, shape), name, read)
                setattr(model.get_submodule(place), leaf, parameter)
            if config.tie_word_embeddings:
                model.tie_weights()
            return model.eval()

        return translate_out_of_memory(build)

    def _parameter(
        self, key: tuple[object, ...], name: str, read: Callable[[str], Tensor]
    ) -> nn.Parameter:
        """The parameter under that key, an equal one of another owner, or a new one."""
        held = self._parameters.get(key)
        if held is not None:
            return held
        tensor = read(name)
        dtype = stored_dtype(name, self.dtype)
        require_memory(self.device, tensor.numel() * dtype.itemsize, name)
        placed = nn.Parameter(cast(tensor, dtype, name, self.device), requires_grad=False)
        for (_, other, _), parameter in list(self._parameters.items()):
            same = other == name and parameter.shape == placed.shape
            if same and torch.equal(parameter, placed):
                placed = parameter
                break
        self._parameters[key] = placed
        return placed

    def _random_tensor(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Random values scaled so that every layer contributes to the logits.

        They are drawn on the device in the final dtype: a CPU would take a minute for billions.
        """
        device, dtype = self.device, stored_dtype(name, self.dtype)
        rng = torch.Generator(device).manual_seed((seed << 32) ^ zlib.crc32(name.encode()))
        if "norm" in name or name.endswith("A_log"):
            return torch.ones(shape, device=device, dtype=dtype)
        values = torch.empty(shape, device=device, dtype=dtype)
        if name.endswith("dt_bias"):
            return values.uniform_(*DT_BIAS_RANGE, generator=rng)
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0]
        return values.normal_(std=fan_in**-0.5, generator=rng)


def _are_equal(a: nn.Parameter, b: nn.Parameter) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def weight_store(device: str | None = None, dtype: str = "auto") -> WeightStore:
    """The weight store of one profile; dtype "auto" is bf16 on CUDA, fp32 on a CPU.

    Raises `MmmambaError` for an unavailable device, `CheckpointError` for an unknown dtype.
    """
    return WeightStore(*pick_placement(device, dtype))
