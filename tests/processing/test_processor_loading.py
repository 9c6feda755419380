"""Loading processors: HoVLE folders, saved folders in a new process, invalid folders."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from isolated_process import ROOT, run_isolated
from PIL import Image
from sentencepiece import sentencepiece_model_pb2
from small_checkpoint import CONFIG, PIECES, SMALL_MODEL, SPECIAL, oracle_ids, write_hovle
from transformers import AutoProcessor

from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.model import HolisticVLMConfig
from mmmamba_cli.processing import HolisticVLMProcessor, processor_from_folder, processor_from_hovle

PROMPT = "<|im_start|>user\n  图片 🐼\n<|im_end|> x"


def changed(path: str, value: Any) -> dict[str, Any]:
    """The config with another value at `a.b`; None removes it."""
    config = copy.deepcopy(CONFIG)
    *outer, last = path.split(".")
    section = config
    for key in outer:
        section = section[key]
    section[last] = value
    if value is None:
        del section[last]
    return config


def save_product(processor: HolisticVLMProcessor, folder: Path) -> Path:
    """A model folder without weights, in the native layout."""
    processor.save_pretrained(folder)
    stack = {
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "intermediate_size": 8,
    }
    vision = {
        "image_size": 56,
        "patch_size": 14,
        "num_channels": 3,
        "downsample_ratio": 0.5,
        "pixel_shuffle": "pre",
        "image_token_id": 528,
    }
    HolisticVLMConfig(
        vocab_size=535,
        hidden_size=8,
        layer_types=["linear_attention"],
        language_stack=stack,
        vision=vision,
    ).save_pretrained(folder)
    return folder


FRESH = """
import json, sys
import mmmamba_cli.model
from transformers import AutoProcessor, AutoTokenizer
processor = AutoProcessor.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = processor.chat(sys.argv[2], sys.argv[3])
print(json.dumps({
    "types": [type(processor).__name__, type(tokenizer).__name__],
    "ids": [processor.tokenizer(sys.argv[2]).input_ids, tokenizer(sys.argv[2]).input_ids],
    "side": tokenizer.padding_side,
    "chat": chat.input_ids.tolist(),
    "pixels": chat.pixel_values.double().sum().item(),
    "skip": tokenizer.decode(tokenizer(sys.argv[2]).input_ids, skip_special_tokens=True),
}))
"""


def test_auto_classes_in_a_new_process_give_the_same(
    processor: HolisticVLMProcessor, tmp_path: Path
) -> None:
    folder = save_product(processor, tmp_path / "product")
    picture = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((120, 60)).save(picture)
    result = json.loads(run_isolated(FRESH, folder, PROMPT, picture, package=ROOT))
    expected = processor.chat(PROMPT, picture)
    assert result == {
        "types": ["HolisticVLMProcessor", "HolisticVLMTokenizer"],
        "ids": [[1, *oracle_ids(PROMPT)]] * 2,
        "side": "left",
        "chat": expected.input_ids.tolist(),
        "pixels": expected.pixel_values.double().sum().item(),
        "skip": "user\n  图片 🐼\n x",
    }


def test_saved_settings_are_loaded(hovle: Path, tmp_path: Path) -> None:
    own = processor_from_hovle(
        {**CONFIG, "min_dynamic_patch": 2, "max_dynamic_patch": 3, "use_thumbnail": False},
        hovle / "tokenizer.model",
    )
    own.save_pretrained(tmp_path / "a")
    again = HolisticVLMProcessor.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert again.to_dict() == own.to_dict()
    assert (again.min_tiles, again.max_tiles, again.use_thumbnail) == (2, 3, False)
    wide = Image.new("RGB", (120, 60))
    assert len(again.chat("?", wide).pixel_values) == 2
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == [
        "added_tokens.json",
        "chat_template.jinja",
        "processor_config.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    settings = [json.loads((tmp_path / x / "tokenizer_config.json").read_text()) for x in "ab"]
    # transformers records how a tokenizer was loaded.
    for one in settings:
        one.pop("is_local", None)
        one.pop("local_files_only", None)
    assert settings[0] == settings[1]
    for name in names[:-1]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_hovle_settings_are_read(hovle: Path) -> None:
    processor = processor_from_folder(hovle)
    assert (processor.image_size, processor.patch_size, processor.downsample_ratio) == (56, 14, 0.5)
    assert (processor.min_tiles, processor.max_tiles, processor.use_thumbnail) == (1, 6, True)
    assert processor.tokens_per_tile == 4


def test_default_image_size_and_one_tile_without_dynamic_size(hovle: Path) -> None:
    file = hovle / "tokenizer.model"
    config = changed("embedding_config.image_size", 112)
    assert processor_from_hovle(config, file).image_size == 56
    config["force_image_size"] = None
    config["dynamic_image_size"] = False
    processor = processor_from_hovle(config, file)
    assert (processor.image_size, processor.min_tiles, processor.max_tiles) == (112, 1, 1)


def test_special_tokens_from_tokenizer_config(tmp_path: Path) -> None:
    folder = write_hovle(tmp_path)
    (folder / "added_tokens.json").unlink()
    described = {
        str(index): {"content": token, "lstrip": False, "special": token != "<box>"}
        for token, index in SPECIAL.items()
    }
    settings = {"added_tokens_decoder": described, "bos_token": {"content": "<s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = processor_from_folder(folder).tokenizer
    assert tokenizer(PROMPT).input_ids == [1, *oracle_ids(PROMPT)]
    assert tokenizer.decode([533, 534], skip_special_tokens=True) == "<box>"


def test_special_tokens_that_are_pieces_of_the_model(tmp_path: Path) -> None:
    folder = write_hovle(tmp_path)
    (folder / "added_tokens.json").unlink()
    proto = sentencepiece_model_pb2.ModelProto.FromString(SMALL_MODEL.read_bytes())
    for token in SPECIAL:
        proto.pieces.add(piece=token, score=0.0, type=4)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = processor_from_folder(folder).tokenizer
    assert len(tokenizer) == 535
    assert tokenizer(PROMPT).input_ids == [1, *oracle_ids(PROMPT)]


def test_internvl_ids_for_an_internvl_vocabulary(tmp_path: Path) -> None:
    folder = write_hovle(tmp_path)
    (folder / "added_tokens.json").unlink()
    proto = sentencepiece_model_pb2.ModelProto.FromString(SMALL_MODEL.read_bytes())
    for index in range(PIECES, 92544):
        proto.pieces.add(piece=f"[{index}]", score=-1e9, type=5)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    config = changed("embedding_config.img_context_token_id", 92546)
    config["llm_config"]["vocab_size"] = 92553
    processor = processor_from_hovle(config, folder / "tokenizer.model")
    text = "<|plugin|><|interpreter|><|action_end|><|action_start|><|im_end|><|im_start|>"
    text += "<img></img><IMG_CONTEXT><quad></quad><ref></ref><box></box>"
    assert processor.tokenizer(text).input_ids == [1, *range(92538, 92553)]
    assert len(processor.tokenizer) == 92553
    assert processor.stop_token_ids == [2, 92542, 92543, 1163]


def test_no_tokenizer(processor: HolisticVLMProcessor, tmp_path: Path) -> None:
    product = save_product(processor, tmp_path / "product")
    hovle = write_hovle(tmp_path / "hovle")
    for folder in (product, hovle):
        (folder / "tokenizer.model").unlink()
        with pytest.raises(CheckpointError, match=f"{folder} has no tokenizer .*--tokenizer FILE"):
            processor_from_folder(folder)
    for file in product.iterdir():
        if file.name != "config.json":
            file.unlink()
    with pytest.raises(CheckpointError, match=f"{product} has no tokenizer"):
        AutoProcessor.from_pretrained(product)
    with pytest.raises(CheckpointError, match="this model has no tokenizer"):
        processor_from_hovle(CONFIG, None)


def test_a_tokenizer_without_processor_settings(
    processor: HolisticVLMProcessor, tmp_path: Path
) -> None:
    folder = save_product(processor, tmp_path)
    (folder / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match="needs image_size, patch_size and downsample_ratio"):
        HolisticVLMProcessor.from_pretrained(folder)


def test_image_token_of_another_checkpoint(
    processor: HolisticVLMProcessor, tmp_path: Path, hovle: Path
) -> None:
    config = changed("embedding_config.img_context_token_id", 530)
    problem = r"embedding_config.img_context_token_id is 530, but .*<IMG_CONTEXT> at 528"
    with pytest.raises(CheckpointError, match=problem):
        processor_from_hovle(config, hovle / "tokenizer.model")
    folder = save_product(processor, tmp_path)
    ours = json.loads((folder / "config.json").read_text())
    ours["vision"]["image_token_id"] = 529
    (folder / "config.json").write_text(json.dumps(ours))
    with pytest.raises(CheckpointError, match=r"vision\.image_token_id is 529"):
        processor_from_folder(folder)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("template", "internvl-zh", "chat template 'internvl-zh' is not known.*internlm2-chat"),
        ("template", None, "template is None, expected str"),
        ("downsample_ratio", "half", "downsample_ratio is 'half', expected float"),
        ("embedding_config.patch_size", None, "embedding_config.patch_size is None, expected int"),
        ("embedding_config", [], "embedding_config.img_context_token_id is None"),
        ("llm_config.vocab_size", 534, "ids up to 534, the model's vocabulary has 534"),
        ("llm_config.vocab_size", True, "vocab_size is True, expected int"),
        ("min_dynamic_patch", "one", "min_dynamic_patch is 'one'"),
        ("min_dynamic_patch", 7, "min_tiles is 7 and max_tiles 6"),
        ("force_image_size", 50, "no whole number of tokens per tile"),
    ],
)
def test_invalid_configs(path: str, value: Any, problem: str, hovle: Path) -> None:
    with pytest.raises(CheckpointError, match=problem):
        processor_from_hovle(changed(path, value), hovle / "tokenizer.model")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("added_tokens.json", "{", "added_tokens.json is not JSON"),
        ("added_tokens.json", "[]", "added_tokens.json is not a JSON object"),
        ("added_tokens.json", "{}", r"no ids are known for special tokens <\|im_start\|>, "),
        ("added_tokens.json", json.dumps({**SPECIAL, "<x>": 520}), "have the same id"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"528": {"content": "<img>"}}}',
            "<img> is 528 in tokenizer_config.json but 526 in added_tokens.json",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"528": "<img>"}}', "not a table of"),
        ("tokenizer.model", "", "tokenizer.model is not a SentencePiece model"),
        ("config.json", "", "config.json is not JSON"),
    ],
)
def test_invalid_tokenizer_files(name: str, content: str, problem: str, tmp_path: Path) -> None:
    folder = write_hovle(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=problem):
        processor_from_folder(folder)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: No such file"):
        processor_from_folder(tmp_path)
