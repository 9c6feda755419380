"""InPlaceAdapter: batched answers equal single ones; likelihoods are those of a plain forward."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, picture
from family_students import student
from PIL import Image

from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate import EvalPrompt, ModelIdentity, OutOfMemory
from mmmamba_cli.evaluate.in_place_adapter import InPlaceAdapter
from mmmamba_cli.processing import TeacherProcessor, takes_max_tiles, with_max_tiles
from mmmamba_cli.processing.prompt_turns import question_turn

# Multimodal RoPE and deepstack; tiles in rows of pictures; tiles behind one another.
NAMES = ("qwen3_vl", "smolvlm", "internvl")
CHOICES = ("Yes", "No, not at all", "两只猫")
NEW_TOKENS = 4


class Drawn:
    """A picture of a suite, in memory."""

    def __init__(self, image: Image.Image):
        self.image = image

    def size(self) -> tuple[int, int]:
        return self.image.size

    def open(self) -> Image.Image:
        return self.image


def question(index: int, words: str, *pictures: Image.Image, **more: Any) -> EvalPrompt:
    text = "".join(["<image>\n"] * len(pictures)) + words
    return EvalPrompt(str(index), text, tuple(map(Drawn, pictures)), **more)


@cache
def adapter(name: str, plan: str = "hybrid mamba2") -> InPlaceAdapter:
    """A student, or with the plan "teacher" the stock model, in float64."""
    family = FAMILIES[name]
    model = family.model().double() if plan == "teacher" else copy.deepcopy(student(name, plan))
    processor = TeacherProcessor(family.processor)
    identity = ModelIdentity(name, "hash", uses_max_tiles=takes_max_tiles(processor.processor))
    return InPlaceAdapter(model, processor, identity)


def questions(choices: tuple[str, ...] = ()) -> list[EvalPrompt]:
    """One picture, two of unequal size, a wide one, and text alone."""
    return [
        question(0, "What is it?", picture(24, 16), choices=choices),
        question(1, "Compare.", picture(40, 12, 1), picture(16, 32, 2), choices=choices),
        question(2, "Count the words of every line.", picture(48, 16, 3), choices=choices[:2]),
        question(3, "请描述红色。", choices=choices),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_batched_equals_one_by_one(name: str) -> None:
    model = adapter(name)
    encoded = [model.encode(one) for one in questions(CHOICES)]
    together = model.generate(encoded, NEW_TOKENS)
    assert together == [model.generate([one], NEW_TOKENS)[0] for one in encoded]
    assert len(set(together)) > 2
    scores = model.score_choices(encoded)
    assert [len(row) for row in scores] == [3, 3, 2, 3]
    alone = [model.score_choices([one])[0] for one in encoded]
    torch.testing.assert_close(scores, alone, atol=1e-9, rtol=0)
    assert len({round(score, 3) for row in scores for score in row}) == 11


@pytest.mark.parametrize("name", NAMES)
def test_lengths_are_those_of_the_inputs(name: str) -> None:
    model = adapter(name)
    for one in questions():
        encoded = model.encode(one)
        columns = model._inputs([encoded])["input_ids"].shape[1]
        assert model.prompt_length(one) == encoded.length == columns


@pytest.mark.parametrize("plan", ["hybrid mamba2", "teacher"])
@pytest.mark.parametrize("name", NAMES)
def test_likelihoods_equal_those_of_a_plain_forward(name: str, plan: str) -> None:
    """Compare with a forward over the answered prompt, without cache, batch and padding."""
    model = adapter(name, plan)
    for one in (questions(CHOICES)[1], questions(CHOICES)[3]):
        encoded = model.encode(one)
        asked = encoded.value
        (found,) = model.score_choices([encoded])
        for choice, score in zip(CHOICES, found, strict=True):
            ids = model.processor.answer_tokens(asked.turn, asked.rendered, choice)
            said = model.tokenizer.decode(ids)
            assert said.strip() == choice and len(ids) >= 1
            whole = model.processor.inputs([asked.rendered.text + said], [asked.pictures])
            whole = {k: v.double() if v.is_floating_point() else v for k, v in whole.items()}
            assert whole["input_ids"][0, -len(ids) :].tolist() == ids
            with torch.no_grad():
                logs = torch.log_softmax(model.model(**whole).logits[0], -1)
            columns = range(logs.shape[0] - len(ids), logs.shape[0])
            expected = float(sum(logs[i - 1, whole["input_ids"][0, i]] for i in columns))
            assert score == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_most_likely_first_token_is_generated(name: str) -> None:
    model = adapter(name)
    asked = model.encode(questions()[0])
    tokens = model.model.generate(**model._inputs([asked]), max_new_tokens=1)
    best = int(tokens[0, -1])
    forbidden = {*model.processor.picture_ids}
    one = [[token] for token in range(len(model.tokenizer)) if token not in forbidden]
    tails = [[best], *one]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_choice_ids", lambda encoded, choice: tails[int(choice)])
        choices = tuple(map(str, range(len(tails))))
        (scores,) = model.score_choices(
            [model.encode(question(0, "What is it?", picture(24, 16), choices=choices))]
        )
    assert scores[0] == max(scores)
    assert sorted(scores)[-3] < scores[0]


def test_generation_config_of_the_checkpoint_is_ignored() -> None:
    fresh = adapter("qwen3_vl")
    asked = [fresh.encode(questions()[0])]
    expected = fresh.generate(asked, NEW_TOKENS)
    other = copy.deepcopy(fresh.model)
    other.generation_config.update(repetition_penalty=50.0, do_sample=True, temperature=9.0)
    again = InPlaceAdapter(other, fresh.processor, fresh.identity)
    assert again.generate([again.encode(questions()[0])], NEW_TOKENS) == expected


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_ends_at_the_end_of_turn(name: str) -> None:
    model = adapter(name)
    end = {"smolvlm": "<end_of_utterance>"}.get(name, "<|im_end|>")
    stop = model.tokenizer.convert_tokens_to_ids(end)
    assert stop in model.processor.end_of_answer_ids
    assert model.model.generation_config.eos_token_id == model.stop_ids
    ids = model.tokenizer(" a red cat", add_special_tokens=False)["input_ids"]
    assert model._text([*ids, stop, *ids]) == "a red cat"


def test_the_end_of_turn_of_the_template_is_a_stop_token() -> None:
    """Whatever tokenizer and generation config say: students learn to write it."""
    tokenizer = copy.deepcopy(FAMILIES["qwen3"].tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = tokenizer.pad_token
    model = copy.deepcopy(adapter("qwen3", "teacher").model)
    model.generation_config.eos_token_id = None
    stops = InPlaceAdapter(model, TeacherProcessor(tokenizer), ModelIdentity("a", "b")).stop_ids
    assert end in stops and tokenizer.pad_token_id in stops


def test_tiles_are_limited_where_the_family_has_them() -> None:
    wide = picture(48, 16)
    tiles = {n: question(0, "?", wide, max_tiles=n) for n in (1, 2, 3)}
    model = adapter("internvl")
    lengths = [model.prompt_length(tiles[n]) for n in (1, 2, 3)]
    # Four tokens for each of three tiles and the thumbnail, or for the only tile.
    assert lengths[2] - lengths[0] == 3 * 4 and lengths[0] < lengths[1] < lengths[2]
    encoded = [model.encode(tiles[n]) for n in (1, 2, 3)]
    assert [one.length for one in encoded] == lengths
    assert model.generate(encoded, 3) == [model.generate([one], 3)[0] for one in encoded]
    smol = adapter("smolvlm")
    assert not smol.identity.uses_max_tiles
    assert smol.prompt_length(tiles[1]) == smol.prompt_length(tiles[3])


def test_pictures_of_qwen_have_the_area_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmmamba_cli.processing.picture_limit.TILE_PIXELS", 320)
    processor = FAMILIES["qwen3_vl"].processor
    before = dict(processor.image_processor.size)
    limited = with_max_tiles(processor, 2)
    assert dict(limited.image_processor.size)["longest_edge"] == 640
    assert dict(processor.image_processor.size) == before
    assert dict(with_max_tiles(processor, 100).image_processor.size) == before
    # The smallest area stays.
    smallest = with_max_tiles(processor, 0).image_processor.size
    assert dict(smallest)["longest_edge"] == before["shortest_edge"]


def test_a_picture_for_a_model_of_text() -> None:
    model = adapter("qwen3", "teacher")
    with pytest.raises(DataError, match="row 0 has a picture, but qwen3 reads text only"):
        model.encode(questions()[0])
    assert model.generate([model.encode(questions()[3])], 3)


def test_control_tokens_in_a_question_are_refused() -> None:
    model = adapter("qwen3_vl")
    with pytest.raises(DataError, match="a token that"):
        model.encode(question(0, "Is <|image_pad|> there?", picture(24, 16)))


def test_thinking_is_off_where_the_template_has_it() -> None:
    tokenizer = copy.deepcopy(FAMILIES["qwen3"].tokenizer)
    closing = "{% if add_generation_prompt and enable_thinking is false %}no thought{% endif %}"
    tokenizer.chat_template += closing
    rendered = TeacherProcessor(tokenizer).question(question_turn("Which?", 0))
    assert rendered.text.endswith("no thought")
    plain = TeacherProcessor(FAMILIES["qwen3"].tokenizer).question(question_turn("Which?", 0))
    assert plain.text + "no thought" == rendered.text


def test_padding_does_not_move_scaled_queries() -> None:
    """Ministral 3 scales queries by their position: that of a padded row is not its column."""
    model = adapter("ministral3", "teacher")
    encoded = [model.encode(one) for one in questions(("Yes", "No"))]
    scores = model.score_choices(encoded)
    alone = [model.score_choices([one])[0] for one in encoded]
    torch.testing.assert_close(scores, alone, atol=1e-9, rtol=0)


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nand so on")

    model = adapter("qwen3_vl")
    encoded = [model.encode(questions(CHOICES)[0])]
    monkeypatch.setattr(model.model.lm_head, "forward", full)
    for ask in (lambda: model.generate(encoded, 2), lambda: model.score_choices(encoded)):
        with pytest.raises(OutOfMemory, match=r"Tried to allocate$"):
            ask()
    assert model.max_batch_tokens(encoded[0], 5) is None
