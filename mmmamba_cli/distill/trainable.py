"""Trainable parameters of a stage, their weight decay, and low-rank adapters.

Adapters (LoRA, Hu et al., arXiv 2106.09685) apply to matrices of the mixer, through peft.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from mmmamba_cli.architecture import is_fp32_parameter, join_and, mixer_spec
from mmmamba_cli.distill.model_pair import ModelPair
from mmmamba_cli.distill.student_layers import StudentLayers, holistic_layers
from mmmamba_cli.errors import MmmambaError, RecipeError
from mmmamba_cli.model import HolisticVLMConfig
from mmmamba_cli.recipe import LoRA, Stage

OUTPUT = ("o_proj",)
# Name that peft gives the adapter inside a module.
ADAPTER = "default"


def trainable_names(stage: Stage, config: HolisticVLMConfig, names: Collection[str]) -> list[str]:
    """`select_trainable` for a student of class `HolisticVLM`."""
    return select_trainable(stage, holistic_layers(config), names)


def select_trainable(stage: Stage, layers: StudentLayers, names: Collection[str]) -> list[str]:
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
        chosen = [n for n in names if _is_new(n, layers, with_qkv)]
    else:
        chosen = _matching(stage, layers, names)
    if stage.trainable == "paper" and stage.loss == "kl":
        chosen = [n for n in chosen if not _is_decay(n, layers)]
    if not chosen:
        raise _nothing_learns(stage, layers)
    return sorted(chosen)


def _nothing_learns(stage: Stage, layers: StudentLayers) -> RecipeError:
    """Why no parameter of the student was selected."""
    where = f"stages.{stage.name}.learns: nothing learns:"
    if not isinstance(stage.learns, str):
        decays = {d for n in layers.mixers for d in mixer_spec(n).decay_parameters}
        return RecipeError(
            f"{where} trainable: paper leaves out {join_and(sorted(decays))}",
            "name other parameters, or take trainable: default",
        )
    linear = {layers.mixers[layer] for layer in layers.linear}
    if not linear:
        return RecipeError(
            f"{where} the student has no linear layer", "leave fewer layers attention"
        )
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
    """Number of layers that have each trainable parameter, by its name inside the layer."""
    counts: dict[str, int] = {}
    for name in names:
        inner = re.sub(r"^.*?\blayers\.\d+\.", "", name_without_adapter(name))
        counts[inner] = counts.get(inner, 0) + 1
    return counts


def _is_new(name: str, layers: StudentLayers, with_qkv: bool) -> bool:
    layer, inner = layers.mixer_part(name)
    if layer is None or layer not in layers.linear or inner.split(".")[0] in OUTPUT:
        return False
    return with_qkv or inner not in layers.inherited[layer]


def _is_decay(name: str, layers: StudentLayers) -> bool:
    layer, inner = layers.mixer_part(name)
    return layer is not None and inner in mixer_spec(layers.mixers[layer]).decay_parameters


def _matching(stage: Stage, layers: StudentLayers, names: Collection[str]) -> list[str]:
    chosen: set[str] = set()
    for position, pattern in enumerate(stage.learns):
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise RecipeError(
                f"stages.{stage.name}.learns[{position}]: the pattern {pattern!r} matches no "
                "parameter of the student",
                "`mmmamba recipe show` prints the stage; names are like "
                f"{layers.prefix(0)}q_proj.weight",
            )
        chosen |= found
    return list(chosen)


def lora_weight_names(
    stage: Stage, trainable: Collection[str], names: Collection[str], part: str = "mixer"
) -> list[str]:
    """Names of the weights that get an adapter: the targets in mixers with a trainable parameter.

    `part` is the name of the mixer in a layer.

    Raises:
        RecipeError: no such mixer has the target.
    """
    if stage.lora is None:
        return []
    inner = f".{part}."
    mixers = {name.rpartition(inner)[0] + inner for name in trainable if inner in name}
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


def attach_lora(pair: ModelPair, settings: LoRA, weights: Sequence[str]) -> ModelPair:
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
    trainable = set()
    for name, parameter in pair.student.named_parameters():
        parameter.requires_grad_(is_adapter(name) or name_without_adapter(name) in before)
        if is_adapter(name):
            parameter.data = parameter.data.float().to(pair.device)
        if parameter.requires_grad:
            trainable.add(name)
    return pair.with_trainable(trainable)


def lora_deltas(
    pair: ModelPair,
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


def name_without_adapter(name: str) -> str:
    """The name of a parameter without the module that peft puts around an adapted layer."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Whether the parameter belongs to an adapter."""
    return f".{ADAPTER}." in name
