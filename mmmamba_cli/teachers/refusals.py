"""Why a teacher cannot be converted, read from fields of its config. No torch.

Each function takes a transformers config. `anatomy` adds what only the modules show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmmamba_cli.teachers.mixer_plan import teacher_type

# Layer types whose layers have an attention module with keys and values of their own.
SOFTMAX_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})

# Models whose prompt has parts in which tokens see later ones, by model_type.
BIDIRECTIONAL_PARTS = {
    "gemma3": "the tokens of an image attend to each other in both directions",
    "paligemma": "the image and the prompt attend to each other in both directions",
    "molmo2": "the tokens of an image attend to each other in both directions",
    "shieldgemma2": "the tokens of an image attend to each other in both directions",
}
FUSED_PROJECTIONS = "has one fused weight where q_proj, k_proj and v_proj are needed"
# What no other field shows about the attention of a text model, by its model_type.
ATTENTION_OF_TYPE = {
    "gemma4_text": "also normalizes values (v_norm), with another head size in some layers",
    "gpt_neox": FUSED_PROJECTIONS,
    "molmo2_text": FUSED_PROJECTIONS,
    "phi3": FUSED_PROJECTIONS,
    "phi4_multimodal": FUSED_PROJECTIONS,
}


def text_config(config: Any) -> Any:
    """The config of the text decoder, which for a language model is `config` itself."""
    return config.get_text_config(decoder=True)


def refusal(config: Any) -> str | None:
    """The reason why a teacher cannot be converted, as a sentence; None if no field rules it out.

    The sentence names the field of config.json and ends with a remedy where one exists.
    """
    text = text_config(config)
    reasons = (rule(config, text) for rule in _RULES)
    found = next((reason for reason in reasons if reason is not None), None)
    return (
        None if found is None else f"{teacher_type(config.model_type)} cannot be converted: {found}"
    )


def bidirectional_warning(config: Any) -> str | None:
    """Why a causal mixer cannot follow this teacher everywhere, as a sentence; None if it can."""
    name = teacher_type(config.model_type)
    part = BIDIRECTIONAL_PARTS.get(name)
    directions = getattr(text_config(config), "use_bidirectional_attention", None)
    if part is None and directions == "vision":
        part = BIDIRECTIONAL_PARTS["gemma3"]
    if part is None:
        return None
    return f"in {name}, {part}; a recurrent mixer reads them in order"


def _quantized(config: Any, text: Any) -> str | None:
    section = getattr(config, "quantization_config", None)
    if section is None:
        section = getattr(text, "quantization_config", None)
    if section is None:
        return None
    values = section if isinstance(section, dict) else section.to_dict()
    method = getattr(values.get("quant_method"), "value", values.get("quant_method"))
    return (
        f"quantization_config.quant_method is {method}, and quantized weights cannot be trained or "
        "copied into a mixer; take the unquantized checkpoint of the same model"
    )


def _encoder_decoder(config: Any, text: Any) -> str | None:
    if not getattr(config, "is_encoder_decoder", False):
        return None
    return "is_encoder_decoder is true, and the decoder's cross-attention has no causal mixer"


def _cross_attention(config: Any, text: Any) -> str | None:
    for name in ("cross_attention_layers", "cross_layer_interval"):
        if getattr(text, name, None) or getattr(config, name, None):
            return f"{name} is set, and cross-attention to the image has no causal mixer"
    return None


def _linear_layers(config: Any, text: Any) -> str | None:
    for name in ("layer_types", "layers_block_type"):
        for index, kind in enumerate(getattr(text, name, None) or ()):
            if kind not in SOFTMAX_LAYER_TYPES:
                return f"{name}[{index}] is {kind}, and only layers of attention can be replaced"
    return None


def _latent_attention(config: Any, text: Any) -> str | None:
    rank = getattr(text, "kv_lora_rank", None)
    if rank is None:
        return None
    return (
        f"kv_lora_rank is {rank}: keys and values are made from a latent vector "
        "(multi-head latent attention), so there is no k_proj and no v_proj"
    )


def _shared_keys(config: Any, text: Any) -> str | None:
    shared = getattr(text, "num_kv_shared_layers", None)
    if shared:
        return (
            f"num_kv_shared_layers is {shared}: these layers have no keys and values of their own"
        )
    if getattr(text, "attention_k_eq_v", False):
        return "attention_k_eq_v is true: layers have no v_proj"
    if getattr(text, "altup_num_inputs", None):
        return f"altup_num_inputs is {text.altup_num_inputs}: a layer has several residual streams"
    return None


def _output_gate(config: Any, text: Any) -> str | None:
    if not getattr(text, "attn_output_gate", False):
        return None
    return "attn_output_gate is true: q_proj is twice as wide and also makes an output gate"


def _type(config: Any, text: Any) -> str | None:
    name = teacher_type(text.model_type)
    if name not in ATTENTION_OF_TYPE:
        return None
    return f"model_type is {name}, whose attention {ATTENTION_OF_TYPE[name]}"


def _not_causal(config: Any, text: Any) -> str | None:
    if getattr(text, "use_bidirectional_attention", None) not in (True, "all"):
        return None
    # There a prompt's part sees itself, and the answer is causal.
    if teacher_type(config.model_type) in BIDIRECTIONAL_PARTS:
        return None
    return "use_bidirectional_attention is true: tokens see later ones, and a mixer is causal"


_RULES: tuple[Callable[[Any, Any], str | None], ...] = (
    _quantized,
    _encoder_decoder,
    _cross_attention,
    _linear_layers,
    _latent_attention,
    _shared_keys,
    _output_gate,
    _type,
    _not_causal,
)
