"""Faults of tokenizer, chat template and processor are named at their check."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from teacher_templates import LLAMA3, QWEN_VL
from verification_teachers import edit_json

from mmmamba_cli.verification import CheckResult, processor_checks
from mmmamba_cli.verification.processor_parts import ProcessorParts, open_processor_parts
from mmmamba_cli.verification.prompts import Inputs, Row

Folders = Callable[[str], Path]


def opened_of(family: str) -> ProcessorParts:
    teacher = FAMILIES[family]
    return ProcessorParts(teacher.tokenizer, teacher.processor if teacher.pictures else None)


def template_result(opened: ProcessorParts, family: str) -> CheckResult:
    return processor_checks.check_chat_template(opened, FAMILIES[family].config(), None)


class Replacing:
    """A tokenizer or processor with some attributes replaced."""

    def __init__(self, original: Any, **values: Any):
        self.original = original
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.original(*args, **options)


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "gemma3", "llama"])
def test_templates_and_special_tokens_of_families_are_right(family: str) -> None:
    opened, config = opened_of(family), FAMILIES[family].config()
    assert template_result(opened, family).status == "ok"
    found = processor_checks.check_special_tokens(opened.tokenizer, config, None)
    assert found.status == "ok", found
    rows = processor_checks.check_tokenizer(opened.tokenizer, len(opened.tokenizer))
    assert rows.status == "ok", rows


def test_a_template_of_another_family_ends_answers_otherwise() -> None:
    tokenizer = FAMILIES["qwen3"].tokenizer

    def render(conversation: Any, **options: Any) -> Any:
        return tokenizer.apply_chat_template(conversation, chat_template=LLAMA3, **options)

    other = Replacing(tokenizer, apply_chat_template=render)
    found = template_result(ProcessorParts(other, None), "qwen3")
    assert found.status == "different"
    assert "it ends an answer with '<', not with a stop token (<|im_end|>)" in found.detail
    assert "<|eot_id|>, <|start_header_id|> are ordinary text" in found.detail


def test_a_template_without_placeholders_of_pictures_is_found() -> None:
    processor = FAMILIES["qwen3_vl"].processor
    without = QWEN_VL.replace("<|image_pad|>", "")

    def render(conversation: Any, **options: Any) -> Any:
        return processor.apply_chat_template(conversation, chat_template=without, **options)

    other = Replacing(processor, apply_chat_template=render)
    found = template_result(ProcessorParts(processor.tokenizer, other), "qwen3_vl")
    assert (found.status, found.detail) == (
        "different",
        "it writes 0 times <|image_pad|> for one picture",
    )


def test_without_a_template_the_check_is_skipped_and_text_is_bare() -> None:
    tokenizer = FAMILIES["qwen3"].tokenizer
    bare = ProcessorParts(Replacing(tokenizer, chat_template=None), None)
    assert template_result(bare, "qwen3").status == "skipped"
    ids = bare.encoder(use_template=False)([Row("How many?")])["input_ids"]
    assert tokenizer.decode(ids[0]) == "How many?"


def test_a_processor_may_leave_the_template_to_its_tokenizer() -> None:
    processor = FAMILIES["qwen3_vl"].processor
    seen = {}

    def render(conversation: Any, **options: Any) -> Any:
        seen.update(options)
        return processor.apply_chat_template(conversation, **options)

    other = Replacing(processor, chat_template=None, apply_chat_template=render)
    opened = ProcessorParts(processor.tokenizer, other)
    assert template_result(opened, "qwen3_vl").status == "ok"
    assert seen["chat_template"] == processor.tokenizer.chat_template


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (
            "eos_token_id",
            7,
            r"the end token <\|im_end\|> is 2, but eos_token_id of the configs is 7",
        ),
        ("image_token_id", 40, "image_token_id of config.json is 40, which is no added token"),
    ],
)
def test_ids_of_a_config_that_the_tokenizer_has_otherwise(
    field: str, value: int, words: str
) -> None:
    config = FAMILIES["qwen3_vl"].config()
    setattr(config, field, value)
    if field == "eos_token_id":
        config.text_config.eos_token_id = value
    found = processor_checks.check_special_tokens(FAMILIES["qwen3_vl"].tokenizer, config, None)
    assert found.status == "different"
    assert re.search(words, found.detail), found.detail


def test_begin_ids_that_differ_are_a_note() -> None:
    config = FAMILIES["llama"].config()
    config.bos_token_id = 9
    found = processor_checks.check_special_tokens(FAMILIES["llama"].tokenizer, config, None)
    assert found.status == "ok"
    assert "bos_token_id is 9 in config.json and 0 in the tokenizer" in found.detail


def test_a_special_token_that_is_cut_into_pieces_is_found() -> None:
    tokenizer = FAMILIES["qwen3"].tokenizer
    index = len(tokenizer) - 1
    extra = {**tokenizer.added_tokens_decoder, index: type("T", (), {"special": True})()}
    other = Replacing(tokenizer, added_tokens_decoder=extra)
    found = processor_checks.check_special_tokens(other, FAMILIES["qwen3"].config(), None)
    assert found.status == "different"
    assert f"has id {index}, but becomes [" in found.detail


def test_text_that_does_not_return_and_ids_without_an_embedding_are_found() -> None:
    tokenizer = FAMILIES["qwen3"].tokenizer
    lossy = Replacing(tokenizer, decode=lambda ids, **options: tokenizer.decode(ids).lower())
    found = processor_checks.check_tokenizer(lossy, len(tokenizer))
    assert found.status == "different"
    assert "'The quick brown fox" in found.detail
    found = processor_checks.check_tokenizer(tokenizer, 100)
    assert found.status == "different"
    assert "but the model has 100 token embeddings" in found.detail


def broken_encode(break_inputs: Callable[[Sequence[Row], Inputs], None]) -> Any:
    encode = opened_of("qwen3_vl").encoder(use_template=True)

    def broken(rows: Sequence[Row]) -> Inputs:
        inputs = encode(rows)
        break_inputs(rows, inputs)
        return inputs

    return broken


def no_image_tokens(rows: Sequence[Row], inputs: Inputs) -> None:
    image = FAMILIES["qwen3_vl"].config().image_token_id
    if len(rows) == 1 and len(rows[0].pictures) == 2:
        inputs["input_ids"][inputs["input_ids"] == image] = 30


def no_finite_pixels(rows: Sequence[Row], inputs: Inputs) -> None:
    if len(rows) == 1 and len(rows[0].pictures) == 1:
        inputs["pixel_values"][0] = float("inf")


def padded_on_the_right(rows: Sequence[Row], inputs: Inputs) -> None:
    if len(rows) > 1:
        inputs["input_ids"] = inputs["input_ids"].roll(1, dims=1)


@pytest.mark.parametrize(
    ("fault", "name", "words"),
    [
        (no_image_tokens, "processor, two pictures", "the prompt has no token"),
        (no_finite_pixels, "processor, one picture", "there are no finite pixel values"),
        (padded_on_the_right, "processor, batch", "row 0 of a left-padded batch has other ids"),
    ],
)
def test_faults_of_a_processor(fault: Any, name: str, words: str) -> None:
    config = FAMILIES["qwen3_vl"].config()
    right = processor_checks.check_processor(broken_encode(lambda rows, inputs: None), config)
    assert {one.status for one in right} == {"ok"}
    found = processor_checks.check_processor(broken_encode(fault), config)
    # Other ids of a row are other ids than in a batch too.
    wrong = next(one for one in found if one.status == "different")
    assert wrong.name == name
    assert words in wrong.detail


def test_files_that_are_missing_or_damaged(copied: Folders) -> None:
    folder = copied("gemma3")
    (folder / "processor_config.json").write_text("{")
    damaged = open_processor_parts(folder, takes_pictures=True)
    assert damaged.is_damaged and damaged.tokenizer is not None
    assert str(damaged.processor_problem).startswith("the processor cannot be opened: ")
    (folder / "processor_config.json").unlink()
    missing = open_processor_parts(folder, takes_pictures=True)
    assert not missing.is_damaged
    assert "neither processor_config.json nor preprocessor_config.json" in str(
        missing.processor_problem
    )
    (folder / "tokenizer.json").write_text("{}")
    broken = open_processor_parts(folder, takes_pictures=True)
    assert broken.is_damaged and broken.tokenizer is None
    assert str(broken.tokenizer_problem).startswith("the tokenizer cannot be opened: ")


def test_a_tokenizer_without_padding_pads_with_its_end(copied: Folders) -> None:
    folder = copied("qwen3")
    edit_json(folder / "tokenizer_config.json", pad_token=None, padding_side="right")
    opened = open_processor_parts(folder, takes_pictures=False)
    assert opened.tokenizer.pad_token == opened.tokenizer.eos_token
    batch = opened.encoder(use_template=True)([Row("a"), Row("a longer one")])
    assert torch.equal(batch["attention_mask"][:, -1], torch.ones(2))
