"""The tiny teachers themselves: what transformers' own classes guarantee for them.

The tests of conversions rest on these, so a fault found there is not one of a fixture.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, Family, conversation, left_padded, picture, prompts, save_teacher
from refused_families import REFUSED, known_to_transformers, refused_config
from teacher_processors import HAS_SMOLVLM_PROCESSOR, HAS_TORCHVISION, PixtralProcessorOnPil
from teacher_videos import FRAMES, TILE, frames, video_prompt
from transformers import PreTrainedModel

WITH_PICTURES = [name for name, family in FAMILIES.items() if family.pictures]
WITH_VIDEO = [name for name, family in FAMILIES.items() if family.video]
# Logits have a standard deviation of about 1.
ATOL = 1e-5


@cache
def stock_model(name: str) -> PreTrainedModel:
    return FAMILIES[name].model()


def rows_of(family: Family) -> list[tuple[str, list]]:
    """One picture, two of unequal size, and Chinese text alone."""
    if not family.pictures:
        return [("What is it?", []), ("Count the words of every line.", []), ("请描述红色。", [])]
    return [
        ("What is it?", [picture(24, 16)]),
        ("Compare them.", [picture(40, 12, seed=1), picture(16, 32, seed=2)]),
        ("请描述红色。", []),
    ]


@torch.no_grad()
def last_logits(model: PreTrainedModel, inputs: dict) -> torch.Tensor:
    return model(**inputs).logits[:, -1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_of_a_left_padded_batch_equals_the_row_alone(name: str) -> None:
    family, model = FAMILIES[name], stock_model(name)
    rows = rows_of(family)
    alone = torch.cat([last_logits(model, prompts(family, [row])) for row in rows])
    batch = prompts(family, rows)
    assert batch["attention_mask"].sum(1).unique().numel() == len(rows)
    equal = torch.allclose(last_logits(model, batch), alone, atol=ATOL, rtol=0)
    assert equal == family.padding_invariant


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_with_a_cache_equals_generate_without(name: str) -> None:
    family, model = FAMILIES[name], stock_model(name)
    batch = prompts(family, rows_of(family))
    options = family.generation(new_tokens=4)
    cached = model.generate(**batch, **options)
    assert cached.shape[1] == batch["input_ids"].shape[1] + 4
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_a_picture_becomes_tokens_by_its_size_and_content(name: str) -> None:
    family, model = FAMILIES[name], stock_model(name)
    inputs = [
        prompts(family, [("What is it?", [each])])
        for each in (picture(24, 16), picture(24, 16, seed=5), picture(12, 40))
    ]
    first, second, tall = (each["input_ids"] for each in inputs)
    assert torch.equal(first, second)
    # Gemma 3 resizes every picture to a square of 4 tokens.
    assert (first.shape == tall.shape) == (name == "gemma3")
    logits = [last_logits(model, each) for each in inputs[:2]]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_the_processor_renders_and_tokenizes_a_conversation_in_one_call(name: str) -> None:
    """`processor.apply_chat_template` as users call it."""
    family = FAMILIES[name]
    if isinstance(family.processor, PixtralProcessorOnPil):
        pytest.skip("PixtralProcessor needs torchvision")
    made = family.processor.apply_chat_template(
        conversation("请描述。", [picture(24, 16), picture(16, 40)]),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    expected = prompts(family, [("请描述。", [picture(24, 16), picture(16, 40)])])
    assert set(made) == set(expected)
    for key, value in expected.items():
        assert torch.equal(made[key], value), key


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_teacher_loads_by_the_auto_classes(name: str, tmp_path: Path) -> None:
    family, model = FAMILIES[name], stock_model(name)
    batch = prompts(family, rows_of(family)[:1])
    save_teacher(family, tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    # SmolVLM has a processor without video there.
    needs_torchvision = (family.video and name != "smolvlm") or name in ("mistral3", "ministral3")
    if needs_torchvision and not HAS_TORCHVISION:
        pytest.skip("AutoProcessor needs torchvision")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    words, pictures = rows_of(family)[0]
    made = processor.apply_chat_template(
        conversation(words, pictures),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    for key, value in batch.items():
        assert torch.equal(made[key], value), key


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_a_video_changes_the_answer_and_survives_padding(name: str) -> None:
    family, model = FAMILIES[name], stock_model(name)
    video = video_prompt(family, "What happens?")
    logits = last_logits(model, video)
    pixels = "pixel_values_videos" if "pixel_values_videos" in video else "pixel_values"
    other = video | {pixels: video[pixels].flip(0).contiguous() * 0.5}
    assert (logits - last_logits(model, other)).abs().max() > 1e-3
    padded = left_padded(family, video, columns=5)
    assert torch.allclose(last_logits(model, padded), logits, atol=ATOL, rtol=0)


@pytest.mark.skipif(not HAS_TORCHVISION, reason="video processors need torchvision")
@pytest.mark.parametrize("name", WITH_VIDEO)
def test_a_video_prompt_is_what_the_processor_makes(name: str) -> None:
    if name == "smolvlm" and not HAS_SMOLVLM_PROCESSOR:
        pytest.skip("SmolVLMProcessor needs num2words")
    family = FAMILIES[name]
    pixels = (frames() - frames().min()).mul(40).to(torch.uint8)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Hm?"}]}]
    text = family.processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    metadata = {"fps": 1.0, "total_num_frames": FRAMES, "frames_indices": list(range(FRAMES))}
    made = family.processor(
        text=[text],
        videos=[[pixels.numpy()]],
        video_metadata=[metadata],
        do_sample_frames=False,
        padding=True,
        return_tensors="pt",
    )
    ours = video_prompt(family, "Hm?")
    for key in set(ours) - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        assert made[key].shape == ours[key].shape, key
    special = torch.tensor(family.tokenizer.all_special_ids)
    counts = [
        torch.bincount(each["input_ids"][0], minlength=len(family.tokenizer))[special]
        for each in (made, ours)
    ]
    assert torch.equal(*counts)
    assert made["pixel_values" if name in ("internvl", "smolvlm") else "pixel_values_videos"].ndim


@pytest.mark.parametrize("name", FAMILIES)
def test_text_survives_the_tokenizer_and_the_template_writes_special_tokens(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer
    # Neither the cat nor Turkish is in the text that the tokenizer was trained on.
    for text in ("请描述这张图片。", "一只猫", "çığ 42"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)
    ids = prompts(family, rows_of(family)[-1:])["input_ids"][0].tolist()
    assert len(set(ids) & set(family.special_ids)) >= 2


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_depend_on_the_seed_alone_and_none_is_trivial(name: str) -> None:
    model, again, other = stock_model(name), FAMILIES[name].model(), FAMILIES[name].model(seed=1)
    for (key, weight), same, different in zip(
        model.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(weight, same), key
        assert not torch.equal(weight, different), key
        assert weight.unique().numel() > 1, key


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_config_has_the_field_that_rules_it_out(name: str) -> None:
    if not known_to_transformers(name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config, field = refused_config(name), REFUSED[name][1]
    assert config.model_type == name
    assert getattr(config.get_text_config(), field)


def test_a_frame_is_one_tile() -> None:
    assert frames().shape == (FRAMES, 3, TILE, TILE)
