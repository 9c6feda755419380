"""Processor: golden ids, batches, refused inputs."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_checkpoint import SMALL_MODEL, TOKENS_PER_TILE, oracle_ids
from transformers.image_processing_utils import BaseImageProcessor

from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.processing import (
    HolisticVLMProcessor,
    HolisticVLMTokenizer,
    ImageProcessor,
    ImageSource,
    count_tokens_per_tile,
)
from mmmamba_cli.processing.tiling import Tiling, cut_tiles, normalize, stack_tiles

GOLDEN = json.loads(Path(__file__).with_name("golden_prompts.json").read_text(encoding="utf-8"))


def picture(width: int = 40, height: int = 40, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_prompts(case: dict[str, Any], processor: HolisticVLMProcessor) -> None:
    """The ids were made from `prompt` with sentencepiece alone."""
    images = [picture(*size) for size in case["image_sizes"]]
    batch = processor.chat(case["conversation"], images, system=case["system"])
    assert batch.input_ids.tolist() == [case["ids"]]
    assert batch.attention_mask.tolist() == [[1] * len(case["ids"])]
    counts = [int(count) for count in re.findall(r"<IMG_CONTEXT\*(\d+)>", case["prompt"])]
    prompt = re.sub(r"<IMG_CONTEXT\*\d+>", "<image>", case["prompt"])
    prompt = re.sub("<img><image></img>", "<image>", prompt)
    finished = processor(text=prompt, images=images)
    assert finished.input_ids.tolist() == [case["ids"]]
    tiles = len(batch.get("pixel_values", []))
    assert tiles * TOKENS_PER_TILE == sum(counts) == case["ids"].count(528)


def test_golden_ids_equal_sentencepiece_ids() -> None:
    for case in GOLDEN:
        context = r"<IMG_CONTEXT\*(\d+)>"
        prompt = re.sub(context, lambda m: "<IMG_CONTEXT>" * int(m.group(1)), case["prompt"])
        assert case["ids"] == [1, *oracle_ids(prompt)], case["name"]


def test_a_batch_of_texts_with_and_without_pictures(processor: HolisticVLMProcessor) -> None:
    wide, small = picture(120, 60, 1), picture(30, 30, 2)
    questions = ["What?", "No picture here, only a longer text about nothing.", "And these?"]
    batch = processor.chat(questions, [[wide], None, [small, wide]], return_num_tiles=True)
    assert batch.num_tiles == [3, 1, 3]
    assert batch.pixel_values.shape == (7, 3, 56, 56)
    assert batch.pixel_values.dtype == torch.float32
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    alone = [
        processor.chat(questions[0], wide),
        processor.chat(questions[1]),
        processor.chat(questions[2], [small, wide]),
    ]
    for row, mask, one in zip(batch.input_ids, batch.attention_mask, alone, strict=True):
        length = one.input_ids.shape[1]
        assert row[-length:].tolist() == one.input_ids[0].tolist()
        assert mask.tolist() == [0] * (len(mask) - length) + [1] * length
        assert set(row[:-length].tolist()) <= {2}
    pixels = torch.cat([alone[0].pixel_values, alone[2].pixel_values])
    assert batch.pixel_values.equal(pixels)


def test_pixels_equal_the_tiles_of_the_images(processor: HolisticVLMProcessor) -> None:
    image = picture(100, 70)
    expected = normalize(stack_tiles(cut_tiles(image, Tiling(56, 1, 6))))
    assert len(expected) > 1
    assert processor.chat("?", image).pixel_values.equal(expected)


def test_outputs_are_model_inputs(processor: HolisticVLMProcessor) -> None:
    assert set(processor.chat("hi")) == {"input_ids", "attention_mask"}
    assert set(processor.chat("hi", picture())) == set(processor.model_input_names)
    assert processor.chat("hi", return_num_tiles=True).num_tiles == []


def test_ways_to_pass_pictures(processor: HolisticVLMProcessor) -> None:
    first, second = picture(seed=1), picture(120, 60, 2)
    both = torch.cat(
        [processor.chat("?", first).pixel_values, processor.chat("?", second).pixel_values]
    )
    texts = ["<image> a <image>", "b"]
    for images in ([first, second], [[first, second], []], [[first, second], None]):
        batch = processor(text=texts, images=images)
        assert batch.pixel_values.equal(both)
        assert (batch.input_ids == 528).sum(1).tolist() == [16, 0]
    split = processor(text=["<image>", "<image>"], images=[first, second])
    assert (split.input_ids == 528).sum(1).tolist() == [4, 12]
    # As in transformers: positional first argument, and nested lists.
    assert processor([first], "<image>").pixel_values.equal(both[:1])
    assert processor.chat("?", [[first, second]]).pixel_values.equal(both)


@pytest.mark.parametrize(
    ("text", "images", "problem"),
    [
        ("no place", 1, "text has 0 <image> but 1 images"),
        ("<image>", 0, "text has 1 <image> but 0 images"),
        (["<image>", "<image>"], 3, "text has 2 <image> but 3 images"),
    ],
)
def test_wrong_numbers_of_images(
    text: Any, images: int, problem: str, processor: HolisticVLMProcessor
) -> None:
    with pytest.raises(DataError, match=problem):
        processor(text=text, images=[picture() for _ in range(images)])


def test_wrong_nesting_of_images(processor: HolisticVLMProcessor) -> None:
    # The total matches, but the image belongs to the other text.
    with pytest.raises(DataError, match="prompt has 1 <image> but 0 images"):
        processor(text=["<image>", "a"], images=[[], [picture()]])
    with pytest.raises(DataError, match="2 texts and 1 lists of images"):
        processor(text=["<image>", "a"], images=[[picture()]])
    for images in ([[picture()]], picture()):
        with pytest.raises(DataError, match="2 conversations, but images is not a list of as many"):
            processor.chat(["a", "b"], images)
    with pytest.raises(DataError, match="no conversation"):
        processor.chat([])


def test_the_image_processor_has_the_settings_of_the_processor(
    processor: HolisticVLMProcessor,
) -> None:
    found = processor.image_processor([picture(120, 60), picture()], return_num_tiles=True)
    assert found.num_tiles == [3, 1]
    expected = processor.chat("?", [picture(120, 60), picture()]).pixel_values
    assert found.pixel_values.equal(expected)


def test_a_tokenizer_without_the_special_tokens() -> None:
    tokenizer = HolisticVLMTokenizer(str(SMALL_MODEL))
    with pytest.raises(CheckpointError, match=r"no special tokens <\|im_start\|>, .*<IMG_CONTEXT>"):
        HolisticVLMProcessor(tokenizer, 56, 14, 0.5)


def test_counts_are_checked_before_pictures_are_opened(processor: HolisticVLMProcessor) -> None:
    with pytest.raises(DataError, match="but 2 images"):
        processor.chat("<image>", ["nowhere.png", "nowhere.png"])


def two_with(second: ImageSource) -> list[ImageSource]:
    return [picture(), second]


def test_bad_pictures_are_named(processor: HolisticVLMProcessor, tmp_path: Path) -> None:
    file = tmp_path / "bad.jpg"
    file.write_bytes(b"\xff\xd8\xff\xe0nothing")
    with pytest.raises(DataError, match=re.escape(str(file))):
        processor.chat("?", two_with(file))
    with pytest.raises(DataError, match=r"image 2 \(3 bytes\)"):
        processor.chat("?", two_with(b"bad"))


def test_other_kinds_of_input_are_refused(processor: HolisticVLMProcessor) -> None:
    with pytest.raises(DataError, match="reads text and images"):
        processor(images=picture())
    for wrong in ({"videos": [1]}, {"audio": [1]}, {"videos_kwargs": {"fps": 1}}):
        with pytest.raises(DataError, match=f"reads text and images, not {next(iter(wrong))}"):
            processor(text="a", **wrong)
    assert processor(text="a", videos=None, audio=None).input_ids.shape == (1, 2)  # type: ignore[call-arg]
    for wrong in ({"max_tile": 3}, {"text_kwargs": {"max_len": 3}}, {"images_kwargs": {"tile": 3}}):
        with pytest.raises(TypeError, match=r"'(max_tile|max_len|tile)'"):
            processor(text="a", **wrong)
    with pytest.raises(TypeError, match="max_tile"):
        processor.chat("a", max_tile=3)  # type: ignore[call-arg]
    for wrong in ({"do_resize": False}, {"images_kwargs": {"image_mean": [0.5] * 3}}):
        with pytest.raises(DataError, match="cannot be set for a call"):
            processor(text="<image>", images=picture(), **wrong)
    for wrong in ({"return_offsets_mapping": True}, {"text_kwargs": {"text_pair": "b"}}):
        with pytest.raises(DataError, match="does not support"):
            processor(text="a", **wrong)


def test_numbers_of_tiles_can_be_chosen_for_a_call(processor: HolisticVLMProcessor) -> None:
    image = picture(300, 300)
    assert len(processor.chat("?", image).pixel_values) == 5
    assert len(processor.chat("?", image, max_tiles=9).pixel_values) == 10
    assert len(processor(text="<image>", images=image, max_tiles=1).pixel_values) == 1
    assert len(processor.chat("?", picture(20, 20), min_tiles=4).pixel_values) == 5
    assert processor.max_tiles == 6
    with pytest.raises(DataError, match="max_tiles 0"):
        processor.chat("?", image, max_tiles=0)


def test_lists_begin_token_and_padding(processor: HolisticVLMProcessor) -> None:
    batch = processor(
        text=["a", "a longer text"], padding=False, return_tensors=None, add_special_tokens=False
    )
    assert batch["input_ids"] == [oracle_ids("a"), oracle_ids("a longer text")]
    assert [len(row) for row in batch["attention_mask"]] == [len(row) for row in batch["input_ids"]]


def test_decoding(processor: HolisticVLMProcessor) -> None:
    ids = processor(text=["a<|im_end|>", "图片 🐼"]).input_ids
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a", "图片 🐼"]
    assert processor.decode(ids[0], skip_special_tokens=True) == "a"


def test_stop_and_image_ids(processor: HolisticVLMProcessor) -> None:
    assert processor.stop_token_ids == [2, 524, 525]
    assert processor.image_token_id == 528


def test_a_processor_can_be_sent_to_a_worker(processor: HolisticVLMProcessor) -> None:
    again = pickle.loads(pickle.dumps(processor))
    expected = processor.chat("图片 ?", picture())
    batch = again.chat("图片 ?", picture())
    assert batch.input_ids.equal(expected.input_ids)
    assert batch.pixel_values.equal(expected.pixel_values)


@pytest.mark.parametrize(
    ("image", "patch", "ratio", "tokens"),
    [(448, 14, 0.5, 256), (448, 14, 1.0, 1024), (448, 14, 0.25, 64), (56, 14, 0.5, 4)],
)
def test_tokens_per_tile(image: int, patch: int, ratio: float, tokens: int) -> None:
    assert count_tokens_per_tile(image, patch, ratio) == tokens


@pytest.mark.parametrize(("image", "patch", "ratio"), [(42, 14, 0.5), (126, 14, 0.34), (10, 14, 1)])
def test_sizes_without_a_whole_number_of_tokens(image: int, patch: int, ratio: float) -> None:
    with pytest.raises(CheckpointError, match=f"image_size {image}, patch_size {patch}"):
        count_tokens_per_tile(image, patch, ratio)


LONG = "a longer text about nothing at all"


def test_keywords_work_as_in_transformers(processor: HolisticVLMProcessor) -> None:
    """Flat or grouped keywords act as in a tokenizer's call."""
    texts = ["a", LONG]
    for keywords in (
        {"padding": "max_length", "max_length": 20},
        {"padding": True, "padding_side": "right"},
        {"truncation": True, "max_length": 4},
        {"pad_to_multiple_of": 16},
        {"return_special_tokens_mask": True},
    ):
        theirs = processor.tokenizer(texts, return_tensors="pt", **{"padding": True, **keywords})
        for ours in (
            processor(text=texts, **keywords),
            processor(text=texts, text_kwargs=keywords),
        ):
            assert {key: value.tolist() for key, value in ours.items()} == {
                key: value.tolist() for key, value in theirs.items()
            }, keywords
    assert set(processor(text="a", return_attention_mask=False)) == {"input_ids"}
    assert processor(text=texts, return_length=True).length == [2, len(oracle_ids(LONG)) + 1]
    arrays = processor(text="<image>", images=picture(), return_tensors="np")
    assert {type(value) for value in arrays.values()} == {np.ndarray}
    with pytest.raises(ValueError, match="passed two times"):
        processor(text="a", padding=True, text_kwargs={"padding": False})
    assert len(processor.chat(LONG, truncation=True, max_length=9).input_ids[0]) == 9
    few = processor(text="<image>", images=picture(300, 300), images_kwargs={"max_tiles": 1})
    assert len(few.pixel_values) == 1


def test_truncation_never_cuts_a_picture(processor: HolisticVLMProcessor) -> None:
    """Begin token, `<img>`, four context tokens and `</img>` are seven tokens, then text."""
    text = f"<image>{LONG}"
    whole = processor(text=text, images=picture()).input_ids[0].tolist()
    assert whole.index(processor.image_token_id) == 2
    for length in range(1, 7):
        with pytest.raises(
            DataError, match=f"max_length = {length} it would lose part of an image"
        ):
            processor(text=text, images=picture(), truncation=True, max_length=length)
    for length in (7, 9):
        cut = processor(text=text, images=picture(), truncation=True, max_length=length)
        assert cut.input_ids[0].tolist() == whole[:length]
        assert len(cut.pixel_values) == 1
    processor.tokenizer.truncation_side = "left"
    with pytest.raises(DataError, match="lose part of an image"):
        processor(text=text, images=picture(), truncation=True, max_length=9)
    behind = processor(text=f"{LONG}<image>", images=picture(), truncation=True, max_length=9)
    assert behind.input_ids[0].tolist()[0] == processor.tokenizer.bos_token_id
    assert behind.input_ids.shape == (1, 9)


def test_template_then_call_equals_chat(processor: HolisticVLMProcessor) -> None:
    talk = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "What?"}],
        }
    ]
    options = {"add_generation_prompt": True}
    one = processor.apply_chat_template(talk, tokenize=True, return_dict=True, **options)
    text = processor.apply_chat_template(talk, tokenize=False, **options)
    two = processor(text=text, images=[picture()])
    assert two.input_ids.tolist() == one.input_ids.tolist()
    assert two.pixel_values.equal(one.pixel_values)
    assert two.input_ids.tolist() == processor.chat("What?", [picture()]).input_ids.tolist()
    assert two.input_ids[0].tolist().count(processor.tokenizer.bos_token_id) == 1
    batch = processor(text=[text, text], images=[picture(), picture()])
    assert batch.input_ids.tolist() == [two.input_ids[0].tolist()] * 2


def test_context_tokens_by_type_and_by_size(processor: HolisticVLMProcessor) -> None:
    """The counts for serving engines equal those of a call."""
    sizes = [(40, 40), (60, 120), (300, 300)]
    pictures = [picture(width, height) for height, width in sizes]
    batch = processor(text=["<image> a"] * 3, images=pictures, return_mm_token_type_ids=True)
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert batch.mm_token_type_ids.sum(1).tolist() == counted.num_image_tokens
    assert batch.mm_token_type_ids.bool().equal(batch.input_ids == processor.image_token_id)
    assert sum(counted.num_image_patches) == len(batch.pixel_values)


def test_a_batch_of_pictures_as_one_array(processor: HolisticVLMProcessor) -> None:
    both = np.stack([np.asarray(picture(seed=seed)) for seed in (1, 2)])
    expected = processor.chat("?", [picture(seed=1), picture(seed=2)])
    for images in (both, torch.from_numpy(both).permute(0, 3, 1, 2), list(both)):
        found = processor.chat("?", images)
        assert found.pixel_values.equal(expected.pixel_values)
        assert found.input_ids.equal(expected.input_ids)


def test_the_image_processor_is_saved_and_loaded(
    processor: HolisticVLMProcessor, tmp_path: Path
) -> None:
    ours = processor.image_processor
    assert isinstance(ours, BaseImageProcessor)
    ours.save_pretrained(tmp_path)
    again = ImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == ours.to_dict()
    assert again.tiling == ours.tiling == Tiling(56, 1, 6)
    pictures = [picture(120, 60), picture()]
    one, two = (each(pictures, return_num_tiles=True) for each in (ours, again))
    assert one.pixel_values.equal(two.pixel_values)
    assert one.num_tiles == two.num_tiles == [3, 1]
    assert len(ours(pictures[0], max_tiles=1).pixel_values) == 1
    assert type(ours(pictures, return_tensors="np").pixel_values) is np.ndarray
    with pytest.raises(DataError, match="does not take do_resize"):
        ours(pictures, do_resize=False)
    with pytest.raises(TypeError, match="has no setting 'max_tile'"):
        ImageProcessor(max_tile=3)
    file = tmp_path / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    assert settings["image_processor_type"] == "ImageProcessor"
    file.write_text(json.dumps({**settings, "max_tiles": 0}))
    with pytest.raises(DataError, match="max_tiles 0"):
        ImageProcessor.from_pretrained(tmp_path)
