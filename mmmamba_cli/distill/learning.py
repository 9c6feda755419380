"""What learns in a stage, and which of it is decayed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from mmmamba_cli.architecture import is_fp32_parameter
from mmmamba_cli.errors import RecipeError
from mmmamba_cli.model import LINEAR, HolisticVLMConfig
from mmmamba_cli.recipe import Stage

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
