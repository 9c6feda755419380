"""Low-rank adapters (Hu et al., arXiv 2106.09685) on matrices of the mixer, through peft."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mmmamba_cli.distill.pair import Pair
from mmmamba_cli.errors import MmmambaError, RecipeError
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
