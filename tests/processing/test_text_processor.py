"""Text-only processor: ids, padding, answers, Auto classes in a new process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from isolated_process import ROOT, run_isolated
from small_checkpoint import PIECES, SMALL_MODEL, oracle_ids, write_hovle
from small_language_models import SIZES, write_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.model import HolisticVLMConfig
from mmmamba_cli.processing import HolisticTextProcessor, processor_from_language_model

CONFIG = {"model_type": "llama", "vocab_size": 320, "eos_token_id": 2}
TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "too"},
]
# As in Qwen3: the last answer begins with an empty thinking block, earlier answers have none.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADER = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def processor_with(folder: Path, template: str | None) -> HolisticTextProcessor:
    processor = processor_from_language_model(CONFIG, folder / "tokenizer.json")
    processor.tokenizer.chat_template = template
    return processor


def said(processor: HolisticTextProcessor, talk: list[dict[str, str]]) -> list[str]:
    """The text of each run of answer tokens."""
    ids, is_answer = processor.conversation_ids(talk)
    assert ids == processor.chat(talk, add_generation_prompt=False).input_ids[0].tolist()
    found: list[list[int]] = [[]]
    for token, answer in zip(ids, is_answer, strict=True):
        if answer:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [processor.tokenizer.decode(run) for run in found if run]


def test_batches_are_padded_on_the_left(folder: Path) -> None:
    processor = processor_from_language_model(CONFIG, folder / "tokenizer.json")
    batch = processor(text=["the cat sat on", "the"])
    assert batch.input_ids.shape == batch.attention_mask.shape
    first = batch.attention_mask.argmax(1).tolist()
    assert first[0] == 0 and first[1] > 0
    assert batch.input_ids[1, : first[1]].unique().tolist() == [processor.pad_token_id]
    assert batch.input_ids[1, first[1] :].tolist() == processor.text_ids("the")
    assert processor.image_processor is None
    for wrong in ({"images": ["x.png"], "text": "the"}, {"text": None}):
        with pytest.raises(DataError):
            processor(**wrong)
    with pytest.raises(DataError, match="lone surrogate"):
        processor(text="a \ud800")


def test_the_template_is_that_of_the_tokenizer(folder: Path) -> None:
    processor = processor_from_language_model(CONFIG, folder / "tokenizer.json")
    theirs = AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    expected = theirs(text, add_special_tokens=False).input_ids
    assert processor.chat(TALK).input_ids[0].tolist() == expected
    system = [{"role": "system", "content": "a dog"}, *TALK]
    with_system = processor.chat(TALK, system="a dog").input_ids
    assert with_system.tolist() == processor.chat(system).input_ids.tolist()
    assert with_system.shape != processor.chat(TALK).input_ids.shape


def test_the_begin_token_is_in_texts_and_not_twice_in_chats(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    processor = HolisticTextProcessor(tokenizer)
    assert processor.text_ids("the")[0] == 0 and 0 not in processor.text_ids("the")[1:]
    assert processor(text="the").input_ids[0].tolist() == processor.text_ids("the")
    chat = processor.chat("the").input_ids[0].tolist()
    assert chat.count(0) == 1
    talk = [{"role": "user", "content": "the"}]
    options = {"add_generation_prompt": True}
    text = processor.apply_chat_template(talk, tokenize=False, **options)
    one = processor.apply_chat_template(talk, tokenize=True, return_dict=True, **options)
    assert processor(text=text).input_ids[0].tolist() == one.input_ids[0].tolist() == chat
    batch = processor(text=[text, "the"], padding=False, return_tensors=None).input_ids
    assert batch == [chat, processor.text_ids("the")]


def test_thinking_blocks_added_by_a_template_belong_to_the_answer(folder: Path) -> None:
    assert said(processor_with(folder, THINKING), TALK) == [
        "sat on<|im_end|>",
        "<think>\n\n</think>\n\ntoo<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("template", "answer", "message"),
    [
        (HEADER + "{{ m.content }}\n{% endfor %}" + PROMPT, "sat", "with no special token"),
        (
            HEADER + "{{ m.content | upper }}<|im_end|>{% endfor %}" + PROMPT,
            "sat",
            "changes what the answer says",
        ),
        (
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}" + PROMPT,
            "sat",
            "joins the beginning",
        ),
        ("{{ raise_exception('no talk') }}", "sat", "refuses the conversation: no talk"),
    ],
)
def test_answers_that_cannot_be_separated_are_refused(
    folder: Path, template: str, answer: str, message: str
) -> None:
    processor = processor_with(folder, template)
    talk = [TALK[0], {"role": "assistant", "content": answer}]
    with pytest.raises(DataError, match=message):
        processor.conversation_ids(talk)


def test_an_answer_that_shares_a_token_with_the_header_is_refused(folder: Path) -> None:
    """The tokenizer merges the end of the header and the start of the answer into one token."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %} th{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %} th{% endif %}"
    )
    processor = processor_with(folder, template)
    question = {"role": "user", "content": "cat"}
    assert said(processor, [question, {"role": "assistant", "content": "\nx"}]) == ["\nx<|im_end|>"]
    with pytest.raises(DataError, match="joins the beginning"):
        processor.conversation_ids([question, {"role": "assistant", "content": "e"}])


def test_without_a_template_only_plain_text_is_read(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    processor = processor_from_language_model(CONFIG, folder / "tokenizer.json")
    assert processor.text_ids("the cat")
    with pytest.raises(CheckpointError, match="has no chat template"):
        processor.chat("the cat")


def test_stop_ids_come_from_config_generation_config_and_template(folder: Path) -> None:
    file = folder / "tokenizer.json"
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert processor_from_language_model({**CONFIG, "eos_token_id": 9}, file).stop_token_ids == [
        2,
        7,
        9,
    ]
    settings.unlink()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.eos_token = "<|endoftext|>"
    # The end of a turn is found even if the tokenizer's end token differs.
    assert HolisticTextProcessor(tokenizer).stop_token_ids == [0, 2]


def test_tokenizers_that_do_not_match(folder: Path) -> None:
    file = folder / "tokenizer.json"
    largest = len(PreTrainedTokenizerFast.from_pretrained(folder)) - 1
    assert processor_from_language_model({**CONFIG, "vocab_size": largest + 1}, file)
    with pytest.raises(CheckpointError, match=f"ids up to {largest}, .* vocabulary has {largest}"):
        processor_from_language_model({**CONFIG, "vocab_size": largest}, file)
    for broken in ("{", "{}"):
        file.write_text(broken)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
            processor_from_language_model(CONFIG, file)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        HolisticTextProcessor.from_pretrained(folder.parent)


def test_internlm2_ids_equal_sentencepiece_ids(tmp_path: Path) -> None:
    folder = write_hovle(tmp_path)
    (folder / "added_tokens.json").write_text(
        json.dumps({"<|im_end|>": PIECES, "<|im_start|>": PIECES + 1})
    )
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    config = {"model_type": "internlm2", "vocab_size": PIECES + 2, "eos_token_id": 2}
    processor = processor_from_language_model(config, folder / "tokenizer.model")
    text = "  图片 of a cat\n"
    assert processor.text_ids(text) == [1, *oracle_ids(text, SMALL_MODEL)]
    assert processor.chat("a").input_ids[0].tolist() == [521, *oracle_ids("a"), 520]


FRESH = """
import json, sys
import mmmamba_cli.model
from transformers import AutoProcessor, AutoTokenizer
text, talk, *folders = sys.argv[1:]
talk = json.loads(talk)
for folder in folders:
    processor = AutoProcessor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print(json.dumps({
        "type": type(processor).__name__,
        "texts": [processor(text=text).input_ids[0].tolist(), tokenizer(text).input_ids],
        "typed": processor.text_ids(text),
        "chat": processor.chat([text, talk]).input_ids.tolist(),
        "mask": processor.chat([text, talk]).attention_mask.tolist(),
        "talk": processor.conversation_ids(talk),
        "stops": processor.stop_token_ids,
        "side": tokenizer.padding_side,
    }))
"""


def saved_product(folder: Path, product: Path, name: str) -> HolisticTextProcessor:
    """Save a product with the teacher's tokenizer, which its settings give the class `name`."""
    settings: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": name}))
    config = {**CONFIG, "eos_token_id": [2, 5]}
    processor = processor_from_language_model(config, folder / "tokenizer.json")
    processor.save_pretrained(product)
    stack = {"num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
    HolisticVLMConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=8,
        layer_types=["linear_attention"],
        language_stack={**stack, "intermediate_size": 8},
    ).save_pretrained(product)
    return processor


def test_auto_classes_in_a_new_process_give_the_same(folder: Path, tmp_path: Path) -> None:
    """For every class that the teacher's settings name for the same tokenizer.json."""
    names = ("TokenizersBackend", "PreTrainedTokenizerFast", "Qwen2Tokenizer")
    processors = [saved_product(folder, tmp_path / name, name) for name in names]
    text = "  the cat 图 <|im_end|>\n\n12 x"
    words = [text, json.dumps(TALK), *(str(tmp_path / name) for name in names)]
    lines = run_isolated(FRESH, *words, package=ROOT).splitlines()
    for processor, line in zip(processors, lines, strict=True):
        assert_same(processor, text, json.loads(line))


def assert_same(processor: HolisticTextProcessor, text: str, found: dict[str, Any]) -> None:
    batch = processor.chat([text, TALK])
    assert found == {
        "type": "HolisticTextProcessor",
        "texts": [processor(text=text).input_ids[0].tolist()] * 2,
        "typed": processor.text_ids(text),
        "chat": batch.input_ids.tolist(),
        "mask": batch.attention_mask.tolist(),
        "talk": list(processor.conversation_ids(TALK)),
        "stops": [2, 5],
        "side": "left",
    }
