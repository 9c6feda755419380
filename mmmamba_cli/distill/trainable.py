"""What learns in a stage, and which of it is decayed.

Low-rank adapters (Hu et al., arXiv 2106.09685) on matrices of the mixer, through peft.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from mmmamba_cli.architecture import is_fp32_parameter
from mmmamba_cli.distill.teacher_student import Pair
from mmmamba_cli.errors import MmmambaError, RecipeError
from mmmamba_cli.model import LINEAR, HolisticVLMConfig
from mmmamba_cli.recipe import LoRA, Stage

ADAPTER = "default"


def adapted(stage: Stage, learning: Collection[str], names: Collection[str]) -> list[str]:
    """Names of the weights that get an adapter: the targets, in layers where something learns.

    Raises `RecipeError` for a target that no such layer has.
    """
    if stage.lora is None:
        return []
    mixers = {name.rpartition(".mixer.")[0] + ".mixer." for name in learning if ".mixer." in name}
    found: list[str] = []
    for position, target in enumerate(stage.lora.targets):
        weights = [f"{mixer}{target}.weight" for mixer in sorted(mixers)]
        present = [weight for weight in weights if weight in names]
        if not present:
            raise RecipeError(
                f"stages.{stage.name}.lora.targets[{position}]: is {target!r}, and no mixer that "
                "learns has such a matrix",
                "matrices are q_proj, k_proj, v_proj, o_proj, g_proj and dt_proj",
            )
        found += present
    return found


def attach(pair: Pair, settings: LoRA, weights: Sequence[str]) -> Pair:
    """The same pair with adapters on the student's `weights`, which stay frozen below them.

    Adapters are fp32 and begin as no change. Raises `MmmambaError` without peft.
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
    # peft freezes everything but its adapters.
    before = {name for name, p in pair.student.named_parameters() if p.requires_grad}
    inject_adapter_in_model(config, pair.student, adapter_name=ADAPTER)
    learning = set(before)
    for name, parameter in pair.student.named_parameters():
        parameter.requires_grad_(is_adapter(name) or name in before)
        if is_adapter(name):
            parameter.data = parameter.data.float().to(pair.device)
            learning.add(name)
    return replace(pair, learning=tuple(sorted(learning)))


def updates(
    pair: Pair, settings: LoRA, weights: Sequence[str], whole: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """What each adapter adds to its weight, fp32 on the CPU: (alpha / rank) B A.

    `whole` gathers a tensor that is spread over processes. The weight in memory may be rounded to
    bf16, as all that is frozen is under that precision; the sum is made with the parent's own.
    """
    found = {}
    for weight in weights:
        layer: Any = pair.student.get_submodule(weight.removesuffix(".weight"))
        down, up = (
            whole(part[ADAPTER].weight.detach()).float() for part in (layer.lora_A, layer.lora_B)
        )
        found[weight] = (settings.alpha / settings.rank * (up @ down)).cpu()
    return found


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is an adapter's."""
    return f".{ADAPTER}." in name


PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# Attention's too where the teacher has them, and then inherited with W_Q and W_K.
QK_NORMS = ("q_norm", "k_norm")
OUTPUT = ("o_proj",)
LEFT_OUT_BY_PAPER = ("A_log", "dt_bias")


def learning_names(stage: Stage, config: HolisticVLMConfig, names: Collection[str]) -> list[str]:
    """Names, out of all `names` of the student's parameters, that learn in `stage`.

    `new` is what a Mamba-2 mixer has and attention has not, `new+qkv` W_Q, W_K and W_V as well,
    with their biases and norms, both in linear layers only; patterns are of the shell's kind and
    may name anything. Raises `RecipeError` if a pattern matches nothing, or nothing learns.
    """
    if isinstance(stage.learns, str):
        with_qkv = stage.learns == "new+qkv"
        chosen = [n for n in names if _is_new(n, config, with_qkv)]
    else:
        chosen = _matching(stage, names)
    if stage.trainable == "paper" and stage.loss == "kl":
        chosen = [n for n in chosen if not n.endswith(LEFT_OUT_BY_PAPER)]
    if not chosen:
        raise RecipeError(
            f"stages.{stage.name}.learns: nothing learns: the student has no linear layer",
            "leave fewer layers attention",
        )
    return sorted(chosen)


def decays(name: str) -> bool:
    """Whether weight decay applies: not to biases, norms, A_log, dt_bias or D."""
    parts = name.split(".")
    return not (parts[-1].endswith("bias") or is_fp32_parameter(name))


def describe(names: Iterable[str]) -> dict[str, int]:
    """How many layers have each learning parameter, by its name inside the layer."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        inner = ".".join(parts[3:]) if parts[:2] == ["model", "layers"] else name
        counts[inner] = counts.get(inner, 0) + 1
    return counts


def _is_new(name: str, config: HolisticVLMConfig, with_qkv: bool) -> bool:
    parts = name.split(".")
    if parts[:2] != ["model", "layers"] or parts[3] != "mixer":
        return False
    if config.layer_types[int(parts[2])] != LINEAR or parts[4] in OUTPUT:
        return False
    inherits_norms = config.stack_of(int(parts[2])).qk_norm
    inherited = (*PROJECTIONS, *QK_NORMS) if inherits_norms else PROJECTIONS
    return with_qkv or parts[4] not in inherited


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
