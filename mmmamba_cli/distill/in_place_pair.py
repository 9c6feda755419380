"""Teacher and student of a transformers class in memory; equal frozen tensors are shared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mmmamba_cli.checkpoint import InPlaceCheckpoint
from mmmamba_cli.checkpoint.in_place_loader import load_in_place_model
from mmmamba_cli.data import ModelBatch
from mmmamba_cli.distill.decoder_attention import override_attention, row_sequences
from mmmamba_cli.distill.feature_cache import cached_features
from mmmamba_cli.distill.host_copies import copy_without_wait
from mmmamba_cli.distill.model_pair import PairPlacement
from mmmamba_cli.distill.module_overrides import override_modules
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.attention import VarlenMetadata, varlen_metadata
from mmmamba_cli.teachers import mixers_of, text_config
from mmmamba_cli.teachers.anatomy import text_decoder
from mmmamba_cli.teachers.call_arguments import MASK, POSITIONS, call_arguments

# Relative difference that rounding may make between the model's logits and those of its head.
HEAD_TOLERANCE = 1e-3


@dataclass(frozen=True)
class PreparedCall:
    """The arguments of a forward pass of both models.

    Attributes:
        inputs: keyword arguments of the base model, on its device but for those whose values are
            read.
        on_host: inputs of the batch on the CPU, where reading values waits for no GPU.
        sequences: of padded or packed rows; None where no row is either, or they are not known.
        features: image features of this batch that one model has computed (`cached_features`).
    """

    inputs: Mapping[str, Any]
    on_host: Mapping[str, Tensor]
    sequences: VarlenMetadata | None = None
    features: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class InPlacePair:
    """A `ModelPair` of a transformers model and its student.

    `prepare` returns the arguments of a forward pass. The tower runs once for both models if it
    is frozen and the teacher's, else each model runs its own. Modules and attention of the text
    decoders are overridden (`override_modules`, `override_attention`).
    """

    teacher: Any
    student: Any
    precision: str = "fp32"
    # Names of the student's trainable parameters.
    trainable: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for model in (self.teacher, self.student):
            override_modules(model)
            override_attention(model)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def mixers(self) -> tuple[nn.Module, ...]:
        return tuple(mixers_of(self.student))

    @property
    def lm_head(self) -> Any:
        return self.student.get_output_embeddings()

    def autocast(self, cache_enabled: bool = True) -> AbstractContextManager[None]:
        """See `ModelPair.autocast`; without a cache no bf16 copy of a weight outlives its use."""
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.precision == "bf16",
            cache_enabled=cache_enabled,
        )

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        parameters = dict(self.student.named_parameters())
        return {name: parameters[name] for name in self.trainable}

    def with_trainable(self, names: Iterable[str]) -> InPlacePair:
        return replace(self, trainable=tuple(sorted(names)))

    @property
    def checkpointable_layers(self) -> tuple[nn.Module, ...]:
        decoder = text_decoder(self.student)
        return tuple(decoder.layers) if decoder.supports_gradient_checkpointing else ()

    def checkpoint_layers(self, count: int) -> None:
        decoder, layers = text_decoder(self.student), self.checkpointable_layers
        if not layers:
            return
        # transformers renamed the methods in 5.23.
        renamed = hasattr(decoder, "activation_checkpointing_enable")
        prefix = "activation_checkpointing" if renamed else "gradient_checkpointing"
        if count == 0:
            getattr(decoder, f"{prefix}_disable")()
            return
        # The reentrant form needs inputs with gradients, which frozen embeddings have not.
        getattr(decoder, f"{prefix}_enable")({"use_reentrant": False})
        for layer in layers[count:]:
            layer.gradient_checkpointing = False  # type: ignore[assignment]

    def prepare(self, batch: ModelBatch) -> PreparedCall:
        """What both models read of a batch; values of inputs are read on the CPU."""
        host = batch if batch.on_host is None else batch.on_host
        device = batch.labels.device
        found = call_arguments(self.teacher, host.inputs, host.seq_idx)
        inputs: dict[str, Any] = {**batch.inputs, **found.on_host}
        inputs |= {name: copy_without_wait(one, device) for name, one in found.to_copy.items()}
        if not found.needs_mask:
            del inputs[MASK]
        for mixer in self.mixers[:1]:
            context: Any = mixer.context
            for name, value in {**host.inputs, **found.to_copy}.items():
                if name in inputs and name in (MASK, POSITIONS):
                    context.remember(inputs[name], value)
        return PreparedCall(inputs, host.inputs, _sequences(host, device))

    @cached_property
    def shares_pictures(self) -> bool:
        """Whether both models have the same image features: all parameters outside of the text
        decoders are frozen and the teacher's.
        """
        theirs, ours = (dict(_outer_parameters(one)) for one in (self.teacher, self.student))
        return theirs.keys() == ours.keys() and all(
            parameter is theirs[name] and not parameter.requires_grad
            for name, parameter in ours.items()
        )

    def last_hidden(self, model: Any, prepared: PreparedCall) -> Tensor:
        shares = self.shares_pictures
        with (
            cached_features(model.base_model, prepared.features) if shares else nullcontext(),
            row_sequences(prepared.sequences),
        ):
            outputs = model.base_model(**prepared.inputs, use_cache=False, return_dict=True)
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    def logits(self, model: Any, hidden: Tensor) -> Tensor:
        logits: Tensor = model.get_output_embeddings()(hidden)
        limit = getattr(text_config(model.config), "final_logit_softcapping", None)
        return logits if not limit else torch.tanh(logits / limit) * limit


def _sequences(host: ModelBatch, device: torch.device) -> VarlenMetadata | None:
    """The sequences of the rows of a batch on the CPU, for kernels on `device`."""
    mask = host.inputs[MASK]
    if host.seq_idx is None and bool(mask.all()):
        return None
    # In packed rows padding is a sequence.
    found = varlen_metadata(mask if host.seq_idx is None else None, host.seq_idx)
    if found is None:
        return None
    return found._replace(cu_seqlens=copy_without_wait(found.cu_seqlens, device))


def _outer_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the base model that are not the text decoder's, with their names."""
    inner = set(text_decoder(model).parameters())
    for name, parameter in model.base_model.named_parameters():
        if parameter not in inner:
            yield name, parameter


def load_in_place_pair(
    teacher: InPlaceCheckpoint,
    student: InPlaceCheckpoint,
    trainable: Collection[str],
    placement: PairPlacement,
) -> InPlacePair:
    """Load both models; the `trainable` parameters become fp32 master weights.

    A frozen parameter of the student is the teacher's object if both are equal after the cast to
    `placement.product_dtype` that seeding made. The models are in eval mode, and only `trainable`
    parameters require gradients.

    Raises:
        CheckpointError: missing, unexpected or misshaped tensors.
        MmmambaError: the logits are not those of the head, so a loss in chunks would be wrong.
    """
    pair = InPlacePair(
        load_in_place_model(teacher, dtype=placement.product_dtype, frozen=True),
        load_in_place_model(student, dtype=placement.product_dtype, frozen=True),
        placement.precision,
    )
    share_equal_parameters(pair, trainable)
    _place(pair, set(trainable), placement)
    check_head(pair)
    return pair.with_trainable(trainable)


def share_equal_parameters(pair: InPlacePair, trainable: Collection[str]) -> None:
    """Make frozen parameters of the student that equal the teacher's the teacher's objects."""
    theirs = dict(pair.teacher.named_parameters())
    shared: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in pair.student.named_parameters():
        other = theirs.get(name)
        if name in trainable or other is None or other.dtype != parameter.dtype:
            continue
        if torch.equal(parameter, other):
            shared[parameter] = other
    replace_parameters(pair.student, lambda _, parameter: shared.get(parameter, parameter))


def _place(pair: InPlacePair, trainable: Collection[str], placement: PairPlacement) -> None:
    """Move both models to the device, frozen parameters in the dtype of the precision.

    Parameters that are not of the product's dtype are small ones that stay fp32.
    """
    frozen, product = placement.frozen_dtype, placement.product_dtype
    masters = {p for n, p in pair.student.named_parameters() if n in trainable}
    placed: dict[nn.Parameter, nn.Parameter] = {}

    def place(_: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter not in placed:
            dtype = frozen if parameter.dtype == product else parameter.dtype
            learns = parameter in masters
            data = parameter.detach().to(placement.device, torch.float32 if learns else dtype)
            placed[parameter] = nn.Parameter(data, requires_grad=learns)
        return placed[parameter]

    for model in (pair.teacher, pair.student):
        replace_parameters(model, place)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(placement.device)


def replace_parameters(model: Any, change: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Replace each parameter under each of its names."""
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._parameters[last] = change(name, parameter)


@torch.no_grad()
def check_head(pair: InPlacePair) -> None:
    """Raise `MmmambaError` unless the teacher's logits are those of `InPlacePair.logits`.

    A family may scale or cap its logits behind the head.
    """
    model = pair.teacher
    ids = torch.arange(4, device=pair.device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pair.autocast():
        expected = model(**inputs, use_cache=False).logits.float()
        found = pair.logits(model, pair.last_hidden(model, PreparedCall(inputs, inputs))).float()
    # Rounding of bf16 is far below a factor or a cap.
    tolerance = HEAD_TOLERANCE if pair.precision == "fp32" else 0.1
    if (found - expected).abs().max() > tolerance * expected.abs().max():
        raise MmmambaError(
            f"{model.config.model_type} cannot be a teacher of distillation: its logits are not "
            "those of its head on the last hidden state",
            "take a teacher whose class does not scale its logits",
        )
