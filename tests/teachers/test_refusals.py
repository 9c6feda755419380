"""Teachers that cannot be converted are refused by their config, in a sentence that says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_teachers import TEXT, teacher_config
from transformers import AutoConfig, AutoModel

from mmmamba_cli.architecture import MixerConfig
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.teachers import (
    StudentPlan,
    anatomy,
    anatomy_of,
    bidirectional_warning,
    convert,
    refusal,
    student_config,
)

# Families, fields of a config of theirs, and what the sentence names.
BY_FIELD: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_5", {}, r"layer_types\[0\] is linear_attention"),
    (
        "lfm2_vl",
        {"text_config": {"layer_types": ["conv"] * 4, "num_hidden_layers": 4}},
        r"layer_types\[0\] is conv",
    ),
    ("deepseek_v3", {}, "kv_lora_rank is 512.*no k_proj"),
    ("gemma3n", {}, "num_kv_shared_layers is 15"),
    ("gemma4", {}, "model_type is gemma4_text, whose attention also normalizes values"),
    ("mllama", {}, "cross_attention_layers is set"),
    ("phi3", {"pad_token_id": 0}, "model_type is phi3, whose attention has one fused weight"),
    ("phi4_multimodal", {"pad_token_id": 0}, "model_type is phi4_multimodal"),
    ("t5gemma", {}, "is_encoder_decoder is true"),
    ("jamba", {}, r"layer_types\[0\] is linear_attention"),
    ("kimi_k25", {}, "kv_lora_rank is 512"),
    ("minicpmv4_6", {}, r"layer_types\[0\] is linear_attention"),
    (
        "qwen3_5",
        {
            "text_config": {
                "layer_types": ["full_attention"] * 4,
                "num_hidden_layers": 4,
                "attn_output_gate": True,
            }
        },
        "attn_output_gate is true",
    ),
]
BY_MODULE: list[tuple[str, str]] = [
    ("gpt_oss", "text layer 0 has sinks in its attention, which no mixer has"),
    ("moshi", "text layer 0 has a MoshiLinear as q_proj, expected a Linear"),
    ("olmo2", "text layer 0 has a q_norm over 32 channels, expected one over each head's 8"),
    ("opt", "no model|has the modules|has no"),
]


@pytest.mark.parametrize(("family", "fields", "reason"), BY_FIELD)
def test_a_field_of_the_config_rules_a_teacher_out(
    family: str, fields: dict[str, Any], reason: str
) -> None:
    found = refusal(AutoConfig.for_model(family, **fields))
    assert found is not None
    with pytest.raises(MmmambaError, match=reason):
        raise MmmambaError(found)
    assert found.startswith(f"{family} cannot be converted: ")


@pytest.mark.parametrize(("family", "reason"), BY_MODULE)
def test_a_module_of_the_attention_rules_a_teacher_out(family: str, reason: str) -> None:
    config = AutoConfig.for_model(family, **TEXT)
    assert refusal(config) is None
    with pytest.raises(MmmambaError, match=f"{family} cannot be converted: .*({reason})"):
        anatomy_of(config)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_quantized_teachers_are_refused_with_the_remedy(method: str) -> None:
    config = teacher_config("qwen3_vl")
    config.quantization_config = {"quant_method": method}
    with pytest.raises(MmmambaError, match=f"quant_method is {method}.*take the unquantized"):
        student_config(config, StudentPlan.of_layers(4))


@pytest.mark.parametrize("family", ["siglip_vision_model", "pi0"])
def test_configs_without_a_model_that_writes_text_are_refused(family: str) -> None:
    with pytest.raises(MmmambaError, match=f"{family} cannot be converted: transformers has no"):
        anatomy_of(AutoConfig.for_model(family))


def test_a_model_without_its_head_is_refused() -> None:
    config = teacher_config("llama")
    with torch.device("meta"), pytest.raises(MmmambaError, match="the teacher is a LlamaModel"):
        convert(AutoModel.from_config(config), StudentPlan.of_layers(4))


def test_image_tokens_in_both_directions_need_a_flag() -> None:
    config = AutoConfig.for_model("gemma3", text_config={**TEXT, "query_pre_attn_scalar": 16})
    assert "both directions" in (bidirectional_warning(config) or "")
    plan = StudentPlan.of_layers(4, [1])
    with pytest.raises(MmmambaError, match=r"in gemma3, the tokens of an image.*allow_bidirection"):
        student_config(config, plan)
    assert student_config(config, plan, allow_bidirectional=True).mmmamba == plan.to_json()
    prefix = AutoConfig.for_model("paligemma", text_config={**TEXT, "model_type": "gemma"})
    assert "the image and the prompt attend" in (bidirectional_warning(prefix) or "")
    assert refusal(prefix) is None
    prefix.text_config.use_bidirectional_attention = True
    assert refusal(prefix) is None
    text = AutoConfig.for_model("gemma3_text", **TEXT, use_bidirectional_attention=True)
    assert "use_bidirectional_attention is true" in (refusal(text) or "")
    # Attention in all layers changes nothing.
    student_config(config, StudentPlan.of_layers(4, []))
    assert bidirectional_warning(teacher_config("qwen3_vl")) is None


def test_mixers_with_rope_need_a_known_rotary_embedding_and_scale() -> None:
    plan = StudentPlan.of_layers(4, [1], "window")
    config = AutoConfig.for_model("gemma3_text", **{**TEXT, "query_pre_attn_scalar": 16})
    with pytest.raises(MmmambaError, match=r"scales scores by 0\.25, not by head_dim \*\* -0\.5"):
        student_config(config, plan)
    config = AutoConfig.for_model("cohere", **TEXT)
    with pytest.raises(MmmambaError, match="rotary embedding of cohere is not known"):
        student_config(config, plan)
    with_rope = StudentPlan.of_layers(4, [1], "mamba2", MixerConfig(rope=True))
    with pytest.raises(MmmambaError, match="Mamba-2 with RoPE cannot replace the attention of coh"):
        student_config(config, with_rope)
    assert student_config(config, StudentPlan.of_layers(4, [1])).model_type == "mmmamba_cohere"


def test_a_package_that_the_teacher_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = teacher_config("llama")

    def build(config: Any) -> None:
        raise ImportError(
            "\nTimmModel requires the timm library but it was not found. Install\nit."
        )

    monkeypatch.setattr(anatomy, "teacher_class", lambda config_class: build)
    expected = "llama cannot be built: TimmModel requires the timm library but it was not found"
    with pytest.raises(MmmambaError, match=expected):
        anatomy_of(config)
