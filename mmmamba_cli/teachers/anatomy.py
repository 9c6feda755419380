"""The text decoder of a teacher: where its layers are and what its attention modules hold.

Legend: D hidden size, H query heads, K key/value heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from mmmamba_cli.architecture import StackConfig
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.teachers.mixer_plan import teacher_type
from mmmamba_cli.teachers.refusals import bidirectional_warning, refusal, text_config

ATTENTION_NAME = "self_attn"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
QK_NORMS = ("q_norm", "k_norm")
# Children of attention modules that hold no parameters and that a mixer does without.
UNUSED_CHILDREN = frozenset({"rotary_emb", "rotary_fn"})
# Text models whose RoPE turns the two halves of a head, as `model.rope.apply_rope` does, and whose
# scores have no factor besides `scaling`.
HALVES_ROPE = frozenset(
    {
        "gemma",
        "gemma3_text",
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen2_5_vl_text",
        "qwen2_vl_text",
        "qwen3",
        "qwen3_moe",
        "qwen3_vl_moe_text",
        "qwen3_vl_text",
    }
)


@dataclass(frozen=True)
class AttentionView:
    """Names and sizes of a layer's attention module.

    Attributes:
        num_heads, num_kv_heads, head_dim: H, K and P.
        scaling: factor of the scores; recurrent mixers have their own.
        projections: names of W_Q, W_K, W_V and W_O, Linear modules of the attention module.
        qk_norms: names of the norms of each head of q and k; empty without them.
        qkv_bias, output_bias: whether W_Q, W_K, W_V, and whether W_O have biases.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    projections: tuple[str, ...]
    qk_norms: tuple[str, ...]
    qkv_bias: bool
    output_bias: bool


@dataclass(frozen=True)
class Anatomy:
    """The text decoder of a teacher.

    Attributes:
        model_type: of the teacher's config.
        model_class: the transformers class with the language model head.
        layers_path: path of the text decoder's layers in the model, as in tensor names.
        attention_name: name of the attention module in a layer.
        attention: view of each layer's attention module.
        hidden_size: D.
        rope_problem: why a mixer that turns q and k by RoPE cannot be used, as a sentence; None if
            one can.
        warning: what a causal mixer cannot follow, as a sentence; None in most families.
    """

    model_type: str
    model_class: type[PreTrainedModel]
    layers_path: str
    attention_name: str
    attention: tuple[AttentionView, ...]
    hidden_size: int
    rope_problem: str | None
    warning: str | None

    @property
    def num_layers(self) -> int:
        return len(self.attention)


def teacher_class(config_class: Any) -> type[PreTrainedModel]:
    """The class of the teacher with its language model head, by the class of its config.

    For a student's config it is the teacher's class too.

    Raises:
        MmmambaError: transformers has no model that writes text for this config.
    """
    if config_class.model_type != teacher_type(config_class.model_type):
        config_class = config_class.__bases__[0]
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if config_class in auto._model_mapping:
            found = auto._model_mapping[config_class]
            found = found[0] if isinstance(found, tuple) else found
            # The classes of image-text models include some of robots and of diffusion.
            if issubclass(found, GenerationMixin):
                return found
    raise MmmambaError(
        f"{config_class.model_type} cannot be converted: transformers has no model for it that "
        "reads images or text and writes text",
        "take a vision-language model or a language model",
    )


def meta_model(model_class: Any, config: Any) -> Any:
    """The model without weights, on the meta device.

    Raises:
        MmmambaError: it needs a package that is not installed.
    """
    try:
        with no_init_weights(), torch.device("meta"):
            return model_class(config)
    except ImportError as error:
        # transformers writes several lines, the first of which may be empty.
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise MmmambaError(
            f"{teacher_type(config.model_type)} cannot be built: {reason}", "install the package"
        ) from error


def anatomy_of(config: Any, model: Any = None) -> Anatomy:
    """Describe the text decoder of a teacher by its config; weights are never read.

    `model`, if it exists already, saves making one on the meta device.

    Raises:
        MmmambaError: the teacher cannot be converted; the sentence names the field of config.json
            or the module that rules it out.
    """
    reason = refusal(config)
    if reason is not None:
        raise MmmambaError(reason)
    model_class = teacher_class(type(config)) if model is None else type(model)
    model = meta_model(model_class, config) if model is None else model
    text = text_config(config)
    decoder = text_decoder(model)
    path = next(name for name, module in model.named_modules() if module is decoder.layers)
    views = tuple(
        _attention_view(teacher_type(config.model_type), index, layer)
        for index, layer in enumerate(decoder.layers)
    )
    return Anatomy(
        model_type=teacher_type(config.model_type),
        model_class=model_class,
        layers_path=path,
        attention_name=ATTENTION_NAME,
        attention=views,
        hidden_size=text.hidden_size,
        rope_problem=_rope_problem(text, views),
        warning=bidirectional_warning(config),
    )


def text_decoder(model: Any) -> Any:
    """The module that owns the text decoder's `layers`.

    Raises:
        MmmambaError: it has none.
    """
    decoder = model.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise MmmambaError(
            f"{teacher_type(model.config.model_type)} cannot be converted: its text decoder, "
            f"{type(decoder).__name__}, has no list of layers"
        )
    return decoder


def attention_stack(view: AttentionView, text: Any) -> StackConfig:
    """The sizes that a mixer needs, of a layer."""
    return StackConfig(
        num_layers=text.num_hidden_layers,
        num_heads=view.num_heads,
        num_kv_heads=view.num_kv_heads,
        head_dim=view.head_dim,
        intermediate_size=getattr(text, "intermediate_size", 0) or 0,
        rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
        qkv_bias=view.qkv_bias,
        output_bias=view.output_bias,
        qk_norm=bool(view.qk_norms),
    )


def _attention_view(model_type: str, index: int, layer: nn.Module) -> AttentionView:
    """The view of a layer's attention.

    Raises:
        MmmambaError: the layer has no attention of the known kind.
    """
    attention: Any = getattr(layer, ATTENTION_NAME, None)
    if attention is None:
        problem: str | None = f"has no module {ATTENTION_NAME}"
    else:
        problem = _attention_problem(attention)
    if problem is not None:
        raise MmmambaError(f"{model_type} cannot be converted: text layer {index} {problem}")
    head_dim = attention.head_dim
    norms = tuple(name for name in QK_NORMS if getattr(attention, name, None) is not None)
    return AttentionView(
        num_heads=attention.q_proj.out_features // head_dim,
        num_kv_heads=attention.k_proj.out_features // head_dim,
        head_dim=head_dim,
        scaling=float(getattr(attention, "scaling", head_dim**-0.5)),
        projections=PROJECTIONS,
        qk_norms=norms,
        qkv_bias=attention.q_proj.bias is not None,
        output_bias=attention.o_proj.bias is not None,
    )


def _attention_problem(attention: Any) -> str | None:
    """Why a mixer cannot take the place of an attention module; None if it can."""
    children = dict(attention.named_children())
    missing = [name for name in PROJECTIONS if name not in children]
    if missing:
        return f"has the modules {', '.join(children)} in its attention, but no {missing[0]}"
    unlike = next((n for n in PROJECTIONS if not isinstance(children[n], nn.Linear)), None)
    if unlike is not None:
        return f"has a {type(children[unlike]).__name__} as {unlike}, expected a Linear"
    known = {*PROJECTIONS, *QK_NORMS, *UNUSED_CHILDREN}
    others = [name for name in children if name not in known]
    others += [name for name, _ in attention.named_parameters(recurse=False)]
    if others:
        return f"has {others[0]} in its attention, which no mixer has"
    width, head_dim = attention.q_proj.out_features, getattr(attention, "head_dim", None)
    if head_dim is None or width % head_dim or attention.o_proj.in_features != width:
        return (
            f"has a q_proj of {width} rows and an o_proj of {attention.o_proj.in_features} "
            "columns, expected the same number"
        )
    if attention.k_proj.out_features != attention.v_proj.out_features:
        return "has keys and values of different sizes"
    norms: Sequence[str] = [name for name in QK_NORMS if name in children]
    if len(norms) == 1:
        return f"has {norms[0]}, but not both norms of q and k"
    # A norm without weights divides each head by its own.
    weights = [getattr(children[name], "weight", None) for name in norms]
    sizes = {weight.numel() for weight in weights if weight is not None}
    if sizes - {head_dim}:
        return f"has a q_norm over {max(sizes)} channels, expected one over each head's {head_dim}"
    return None


def _rope_problem(text: Any, views: Sequence[AttentionView]) -> str | None:
    name = teacher_type(text.model_type)
    if name not in HALVES_ROPE:
        return f"the rotary embedding of {name} is not known to turn the two halves of each head"
    if getattr(text, "attn_logit_softcapping", None):
        return "attn_logit_softcapping is set, and a mixer's scores are not capped"
    if any(abs(view.scaling - view.head_dim**-0.5) > 1e-6 for view in views):
        return f"its attention scales scores by {views[0].scaling:.4g}, not by head_dim ** -0.5"
    return None
