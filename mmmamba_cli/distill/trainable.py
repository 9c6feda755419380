"""Trainable parameters of a stage, their weight decay, and low-rank adapters.

Adapters (LoRA, Hu et al., arXiv 2106.09685) apply to matrices of the mixer, through peft.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from mmmamba_cli.architecture import (
    ATTENTION,
    LINEAR,
    default_mixer,
    is_fp32_parameter,
    join_and,
    mixer_spec,
)
from mmmamba_cli.distill.teacher_student import TeacherStudent
from mmmamba_cli.errors import MmmambaError, RecipeError
from mmmamba_cli.model import HolisticVLMConfig
from mmmamba_cli.recipe import LoRA, Stage

OUTPUT = ("o_proj",)
# Name that peft gives the adapter inside a module.
ADAPTER = "default"


def trainable_names(stage: Stage, config: HolisticVLMConfig, names: Collection[str]) -> list[str]:
    """Select the trainable parameters of `stage` from all `names` of the student's parameters.

    `learns: new` selects the parameters that a linear mixer has and attention has not; `new+qkv`
    adds W_Q, W_K and W_V with their biases and norms; both in linear layers only. Patterns are
    shell patterns over all names. `trainable: paper` leaves `MixerSpec.decay_parameters` out of
    stages with the KL loss.

    Raises:
        RecipeError: a pattern matches nothing, or no parameter is selected.
    """
    if isinstance(stage.learns, str):
        with_qkv = stage.learns == "new+qkv"
        chosen = [n for n in names if _is_new(n, config, with_qkv)]
    else:
        chosen = _matching(stage, names)
    if stage.trainable == "paper" and stage.loss == "kl":
        chosen = [n for n in chosen if not _is_decay(n, config)]
    if not chosen:
        raise _nothing_learns(stage, config)
    return sorted(chosen)


def _nothing_learns(stage: Stage, config: HolisticVLMConfig) -> RecipeError:
    """Why no parameter of the student was selected."""
    where = f"stages.{stage.name}.learns: nothing learns:"
    if not isinstance(stage.learns, str):
        decays = {d for n in config.mixer_names for d in mixer_spec(n).decay_parameters}
        return RecipeError(
            f"{where} trainable: paper leaves out {join_and(sorted(decays))}",
            "name other parameters, or take trainable: default",
        )
    if LINEAR not in config.layer_types:
        return RecipeError(
            f"{where} the student has no linear layer", "leave fewer layers attention"
        )
    linear = {n for n in config.mixer_names if mixer_spec(n).layer_type == LINEAR}
    titles = join_and(sorted(mixer_spec(name).title for name in linear))
    return RecipeError(
        f"{where} the linear layers are {titles}, which has no parameter that attention lacks",
        f"give --set stages.{stage.name}.learns=new+qkv, or a recipe without this stage",
    )


def has_weight_decay(name: str) -> bool:
    """False for biases, norms and the vectors of the mixers, such as A_log and dt_bias."""
    parts = name.split(".")
    return not (parts[-1].endswith("bias") or is_fp32_parameter(name))


def layers_per_parameter(names: Iterable[str]) -> dict[str, int]:
    """Count the layers that have each parameter, by its name inside the layer."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        inner = ".".join(parts[3:]) if parts[:2] == ["model", "layers"] else name
        counts[inner] = counts.get(inner, 0) + 1
    return counts


def _is_new(name: str, config: HolisticVLMConfig, with_qkv: bool) -> bool:
    layer, inner = _layer_and_parameter(name)
    if layer is None or config.layer_types[layer] != LINEAR or inner.split(".")[0] in OUTPUT:
        return False
    attention = mixer_spec(default_mixer(ATTENTION)).parameter_shapes
    inherited = attention(config.stack_of(layer), config.mixer_config, config.hidden_size)
    return with_qkv or inner not in inherited


def _is_decay(name: str, config: HolisticVLMConfig) -> bool:
    layer, inner = _layer_and_parameter(name)
    if layer is None:
        return False
    return inner in mixer_spec(config.mixer_names[layer]).decay_parameters


def _layer_and_parameter(name: str) -> tuple[int | None, str]:
    """The layer of a mixer's parameter and its name in the mixer; None for other parameters."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"] or parts[3] != "mixer":
        return None, name
    return int(parts[2]), ".".join(parts[4:])


def _matching(stage: Stage, names: Collection[str]) -> list[str]:
    chosen: set[str] = set()
    for position, pattern in enumerate(stage.learns):
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise RecipeError(
                f"stages.{stage.name}.learns[{position}]: the pattern {pattern!r} matches no "
                "parameter of the student",
                "`mmmamba recipe show` prints the stage; names are like "
                "model.layers.0.mixer.q_proj.weight",
            )
        chosen |= found
    return list(chosen)


def lora_weight_names(
    stage: Stage, trainable: Collection[str], names: Collection[str]
) -> list[str]:
    """Names of the weights that get an adapter: the targets in mixers with a trainable parameter.

    Raises:
        RecipeError: no such mixer has the target.
    """
    if stage.lora is None:
        return []
    mixers = {name.rpartition(".mixer.")[0] + ".mixer." for name in trainable if ".mixer." in name}
    found: list[str] = []
    for position, target in enumerate(stage.lora.targets):
        weights = [f"{mixer}{target}.weight" for mixer in sorted(mixers)]
        present = [weight for weight in weights if weight in names]
        if not present:
            raise RecipeError(
                f"stages.{stage.name}.lora.targets[{position}]: is {target!r}, and no mixer that "
                "learns has such a matrix",
                f"matrices are {', '.join(_matrices(mixers, names))}",
            )
        found += present
    return found


def _matrices(mixers: Collection[str], names: Collection[str]) -> list[str]:
    """Projections of the `mixers`, which are prefixes of names, without duplicates."""
    found = {
        name.removeprefix(mixer).removesuffix(".weight")
        for mixer in mixers
        for name in names
        if name.startswith(mixer) and name.endswith("_proj.weight")
    }
    return sorted(found)


def attach_lora(pair: TeacherStudent, settings: LoRA, weights: Sequence[str]) -> TeacherStudent:
    """Return the pair with trainable fp32 adapters on the student's frozen `weights`.

    A new adapter leaves the output unchanged.

    Raises:
        MmmambaError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MmmambaError(
            "stages with lora need the package peft, which is not installed",
            "pip install 'mmmamba[lora]'",
        ) from error
    modules = [weight.removesuffix(".weight") for weight in weights]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=modules,
    )
    # peft freezes all parameters except its adapters.
    before = {name for name, p in pair.student.named_parameters() if p.requires_grad}
    inject_adapter_in_model(config, pair.student, adapter_name=ADAPTER)
    trainable = set(before)
    for name, parameter in pair.student.named_parameters():
        parameter.requires_grad_(is_adapter(name) or name in before)
        if is_adapter(name):
            parameter.data = parameter.data.float().to(pair.device)
            trainable.add(name)
    return replace(pair, trainable=tuple(sorted(trainable)))


def lora_deltas(
    pair: TeacherStudent,
    settings: LoRA,
    weights: Sequence[str],
    full_tensor: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Weight deltas of the adapters, (alpha / rank) B A, fp32 on the CPU.

    `full_tensor` gathers a sharded tensor. Add a delta to the weight of the parent product: the
    frozen weight in memory is rounded to bf16 under `precision: bf16`.
    """
    found = {}
    for weight in weights:
        layer: Any = pair.student.get_submodule(weight.removesuffix(".weight"))
        down, up = (
            full_tensor(part[ADAPTER].weight.detach()).float()
            for part in (layer.lora_A, layer.lora_B)
        )
        found[weight] = (settings.alpha / settings.rank * (up @ down)).cpu()
    return found


def is_adapter(name: str) -> bool:
    """Whether the parameter belongs to an adapter."""
    return f".{ADAPTER}." in name
