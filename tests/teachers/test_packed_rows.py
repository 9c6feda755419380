"""Packed rows of every family that is listed for them have the logits of single conversations."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
import transformers
from families import FAMILIES, Family, picture, prompts, right_padded
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, masking_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from mmmamba_cli.data import IGNORE_INDEX, ModelBatch
from mmmamba_cli.data.model_batch import pack_conversations
from mmmamba_cli.teachers import (
    StudentPlan,
    anatomy_of,
    convert,
    packed_position_ids,
    packing_problem,
)
from mmmamba_cli.teachers.packed_rows import PACKED_LANGUAGE_MODELS, PACKED_VISION_FAMILIES

TINY = {
    **families.head_sizes(FAMILIES["llama"].tokenizer),
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 3,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
}
WINDOWS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    # Qwen2 and Qwen3 ignore their windows without it.
    "use_sliding_window": True,
}
ROWS = ((0, 1), (2, 3))


def qwen2_vl(tokenizer: Any) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    tower = {**families.qwen_tower(), "embed_dim": 16, "mlp_ratio": 2, "hidden_size": 32}
    return transformers.Qwen2VLConfig(
        text_config={**families.text_sizes(tokenizer), "rope_parameters": rope},
        vision_config=tower,
        **families.qwen_vl_ids(tokenizer),
        **families.special_ids(tokenizer),
    )


def qwen3_vl_moe(tokenizer: Any) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return transformers.Qwen3VLMoeConfig(
        text_config={**families.head_sizes(tokenizer), "rope_parameters": rope, **experts},
        vision_config=families.qwen_tower()
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **families.qwen_vl_ids(tokenizer),
        **families.special_ids(tokenizer),
    )


# Families with the processor of another one.
MORE = {"qwen2_vl": ("qwen2_5_vl", qwen2_vl), "qwen3_vl_moe": ("qwen3_vl", qwen3_vl_moe)}


def family_of(name: str) -> Family:
    if name in FAMILIES:
        return FAMILIES[name]
    base, make_config = MORE[name]
    return replace(FAMILIES[base], make_config=make_config)


def single_rows(family: Family) -> ModelBatch:
    """Four conversations: one picture, two of unequal size, none, one."""

    def shown(*sizes: tuple[int, int]) -> list[Any]:
        return [picture(*size, seed=i) for i, size in enumerate(sizes)] if family.pictures else []

    rows = [
        ("What is it?", shown((24, 16))),
        ("Count the words of every line in this text.", shown((16, 24), (40, 12))),
        ("Hi", []),
        ("So?", shown((16, 16))),
    ]
    inputs = right_padded(prompts(family, rows))
    labels = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
    return ModelBatch(inputs, labels, len(rows), int(inputs["attention_mask"].sum()))


def packed_logits(model: Any, batch: ModelBatch, pad_id: int) -> tuple[Tensor, Tensor]:
    """Logits of the tokens of packed rows, and of the same conversations in rows of their own."""
    packed = pack_conversations(batch, ROWS, pad_id)
    assert packed.seq_idx is not None and packed.token_mask.sum() == batch.num_tokens
    inputs = {name: value for name, value in packed.inputs.items() if name != "attention_mask"}
    positions = packed_position_ids(model, inputs, packed.seq_idx)
    with torch.no_grad():
        found = model(**inputs, position_ids=positions, use_cache=False).logits
        expected = model(**batch.inputs, use_cache=False).logits
    return found[packed.token_mask], expected[batch.token_mask]


@pytest.mark.parametrize("name", sorted(PACKED_VISION_FAMILIES))
def test_packed_rows_with_pictures_are_single_conversations(name: str) -> None:
    family = family_of(name)
    assert packing_problem(family.config()) is None
    batch = single_rows(family)
    model = family.model()
    pad_id = family.tokenizer.pad_token_id
    found, expected = packed_logits(model, batch, pad_id)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    student = convert(copy.deepcopy(model), StudentPlan.of_layers(4, (1, 2))).eval()
    assert packing_problem(student.config) is None
    found, expected = packed_logits(student, batch, pad_id)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def tiny_language_model(name: str) -> Any:
    """A random model; its windows are shorter than the conversations where it has some."""
    try:
        config = AutoConfig.for_model(name, **TINY, **WINDOWS)
        anatomy_of(config)
        return families.randomize(AutoModelForCausalLM.from_config(config), 0).eval()
    except (TypeError, ValueError):
        config = AutoConfig.for_model(name, **TINY)
        return families.randomize(AutoModelForCausalLM.from_config(config), 0).eval()


@pytest.mark.parametrize("name", sorted(PACKED_LANGUAGE_MODELS))
def test_packed_rows_of_text_are_single_conversations(name: str) -> None:
    assert name in CONFIG_MAPPING_NAMES
    model = tiny_language_model(name)
    assert packing_problem(model.config) is None
    lengths = (9, 13, 4, 6)
    ids = torch.randint(3, 60, (4, max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    inputs = {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
    batch = ModelBatch(inputs, torch.full_like(ids, IGNORE_INDEX), 4, sum(lengths))
    found, expected = packed_logits(model, batch, 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_gemma_3_cannot_be_packed_and_would_be_wrong() -> None:
    """Newer releases look up a picture's columns by position, which packed rows begin again."""
    family = FAMILIES["gemma3"]
    problem = packing_problem(family.config())
    assert problem is not None and problem.startswith("rows of gemma3 hold one conversation each")
    found, expected = packed_logits(
        family.model(), single_rows(family), family.tokenizer.pad_token_id
    )
    is_wrong = float((found - expected).abs().max()) > 0.1
    assert is_wrong is hasattr(masking_utils, "remap_positions_for_packed_sequence")


def named(model_type: str, text: str | None = None) -> Any:
    """A config with these model_types."""
    config = PreTrainedConfig()
    config.model_type = model_type
    if text is not None:
        config.text_config = PreTrainedConfig()
        config.text_config.model_type = text
    return config


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (named("strange"), "rows of strange hold"),
        (named("internvl", "strange"), "rows of internvl with a text decoder strange hold"),
        (named("strange_vl", "llama"), "rows of strange_vl with a text decoder llama hold"),
        (named("mmmamba_strange"), "rows of strange hold"),
    ],
)
def test_other_families_hold_one_conversation_per_row(config: Any, part: str) -> None:
    problem = packing_problem(config)
    assert problem is not None and problem.startswith(part)


def test_packed_rows_of_text_need_no_pictures() -> None:
    """A batch without grids, of a family that counts positions by them elsewhere."""
    family = FAMILIES["qwen3_vl"]
    found, expected = packed_logits(
        family.model(), single_rows(replace(family, pictures=False)), family.tokenizer.pad_token_id
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_positions_of_videos_are_those_of_their_conversation() -> None:
    """Two frames of 1 x 2 tokens and three of 2 x 1, with seconds of their own."""
    model = FAMILIES["qwen2_5_vl"].model()
    grids, seconds = torch.tensor([[2, 2, 4], [3, 4, 2]]), torch.tensor([1.0, 2.0])
    kinds = [torch.tensor([0, 0, *[2] * tokens, 0, 0]) for tokens in (4, 6)]
    alone = [
        model.base_model.get_rope_index(
            input_ids=torch.full((1, len(kind)), 5),
            mm_token_type_ids=kind[None],
            video_grid_thw=grid[None],
            second_per_grid_ts=second[None],
        )[0]
        for kind, grid, second in zip(kinds, grids, seconds, strict=True)
    ]
    row = torch.cat(kinds)[None]
    inputs = {
        "input_ids": torch.full_like(row, 5),
        "mm_token_type_ids": row,
        "video_grid_thw": grids,
        "second_per_grid_ts": seconds,
    }
    found = packed_position_ids(model, inputs, torch.tensor([[0] * 8 + [1] * 10]))
    assert torch.equal(found[1:], torch.cat(alone, dim=2))
    assert found[0].tolist() == [[*range(8), *range(10)]]
    assert float(alone[1].max()) > 10


def positions_of(seq_idx: Sequence[int]) -> list[int]:
    class Plain:
        base_model = object()

    return packed_position_ids(Plain(), {}, torch.tensor([seq_idx]))[0].tolist()


def test_positions_begin_again_in_each_conversation() -> None:
    assert positions_of([0, 0, 0, 1, 2, 2]) == [0, 1, 2, 0, 0, 1]
    assert positions_of([0]) == [0]
