"""Checks of a teacher's tokenizer, chat template and processor, without the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from mmmamba_cli.errors import name_some
from mmmamba_cli.processing import as_id_set
from mmmamba_cli.teachers import text_config
from mmmamba_cli.verification.processor_parts import ProcessorParts, messages_of
from mmmamba_cli.verification.prompts import QUESTION, Encode, Row, drawn_picture, picture_rows
from mmmamba_cli.verification.report import DIFFERENT, OK, SKIPPED, CheckResult

TOKENIZER, SPECIAL_TOKENS, TEMPLATE = "tokenizer", "special tokens", "chat template"
ONE_PICTURE, TWO_PICTURES, UNEQUAL_ROWS = (
    "processor, one picture",
    "processor, two pictures",
    "processor, batch",
)
PROCESSOR_CHECKS = (ONE_PICTURE, TWO_PICTURES, UNEQUAL_ROWS)
# The last one has letters, a symbol and control characters that vocabularies have as bytes only.
ROUND_TRIPS = (
    "The quick brown fox, 42 times:\n\tdef f(x):\n        return x ** 2",
    "请描述这张图片。图片里有一个红色的正方形。",
    "çığ naïve Ελλάδα русский עברית 日本語",
    "𒀀𓀀🜚 \u0001\u0002 \u00a0ÿ",
)
# Names of the id of an image token in configs.
IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index", "img_context_token_id")
# What looks like a control token in a rendered template: <|name|>, <name>, [NAME].
CONTROL_TOKEN = re.compile(r"<\|[^<>|\s]+\|>|</?[A-Za-z_]+>|\[/?[A-Z_]+\]")
ANSWER = "It is red"


def image_token(config: Any) -> tuple[str, int] | None:
    """The field of the config that has the id of an image token, and the id."""
    for field in IMAGE_TOKEN_FIELDS:
        value = getattr(config, field, None)
        if isinstance(value, int):
            return field, value
    return None


def stop_ids(config: Any, generation_config: Any) -> set[int]:
    """The ids that end an answer, of config.json and generation_config.json."""
    sources = [config, text_config(config), generation_config]
    return set().union(*(as_id_set(getattr(one, "eos_token_id", None)) for one in sources))


def check_tokenizer(tokenizer: Any, vocab_size: int) -> CheckResult:
    """Text to ids and back, and ids within the token table of `vocab_size` rows."""
    for text in ROUND_TRIPS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if back != text:
            return CheckResult(
                TOKENIZER, DIFFERENT, f"{text[:40]!r} becomes {back[:40]!r} by its ids and back"
            )
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        return CheckResult(
            TOKENIZER,
            DIFFERENT,
            f"ids up to {largest}, but the model has {vocab_size} token embeddings",
        )
    return CheckResult(
        TOKENIZER,
        OK,
        f"{len(ROUND_TRIPS)} texts return from their ids (Chinese, code, rare characters); "
        f"{largest + 1} ids for {vocab_size} embeddings",
    )


def check_special_tokens(tokenizer: Any, config: Any, generation_config: Any) -> CheckResult:
    """Special tokens are one id each, and the ids of the configs are the tokenizer's."""
    wrong = []
    special = {
        index: str(token)
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    for index, token in special.items():
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if ids != [index]:
            wrong.append(f"{token} has id {index}, but becomes {ids[:5]}")
    stops = stop_ids(config, generation_config)
    if tokenizer.eos_token_id is not None and stops and tokenizer.eos_token_id not in stops:
        wrong.append(
            f"the end token {tokenizer.eos_token} is {tokenizer.eos_token_id}, but eos_token_id of "
            f"the configs is {name_some(map(str, sorted(stops)))}"
        )
    found = image_token(config)
    if found is not None and found[1] not in tokenizer.added_tokens_decoder:
        at = tokenizer.convert_ids_to_tokens(found[1]) if found[1] < len(tokenizer) else None
        wrong.append(f"{found[0]} of config.json is {found[1]}, which is no added token ({at!r})")
    if wrong:
        return CheckResult(SPECIAL_TOKENS, DIFFERENT, "; ".join(wrong))
    ends = [tokenizer.convert_ids_to_tokens(index) for index in sorted(stops)]
    detail = f"{len(special)} are one id each; answers end with {name_some(map(str, ends))}"
    return CheckResult(SPECIAL_TOKENS, OK, detail + _other_ids(tokenizer, config))


def _other_ids(tokenizer: Any, config: Any) -> str:
    """A note on begin and padding ids that differ, which no computation depends on."""
    notes = []
    for name in ("bos_token_id", "pad_token_id"):
        own, given = getattr(tokenizer, name), getattr(text_config(config), name, None)
        if None not in (own, given) and own != given:
            notes.append(f"; {name} is {given} in config.json and {own} in the tokenizer")
    return "".join(notes)


def check_chat_template(opened: ProcessorParts, config: Any, generation_config: Any) -> CheckResult:
    """The template renders a conversation, pictures included, with tokens that the model has."""
    if opened.template is None:
        return CheckResult(TEMPLATE, SKIPPED, "there is no chat template")
    tokenizer, vocabulary = opened.tokenizer, opened.tokenizer.get_vocab()
    pictures = (drawn_picture(),) if opened.processor is not None else ()
    question = messages_of(opened, Row(QUESTION, pictures))
    prompt = _render(opened, question, add_generation_prompt=True)
    answered = _render(opened, [*question, _answer(opened)], add_generation_prompt=False)
    wrong = []
    for words, text in ((QUESTION, prompt), (ANSWER, answered)):
        if words not in text:
            wrong.append(f"the rendered conversation has no {words!r}")
    wrong += _image_problem(opened, prompt)
    stops, behind = stop_ids(config, generation_config), answered.partition(ANSWER)[2].lstrip()
    end = tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
    if stops and not stops.intersection(end):
        written = repr(tokenizer.decode(end)) if end else "nothing"
        ends = name_some(map(str, tokenizer.convert_ids_to_tokens(sorted(stops))))
        wrong.append(f"it ends an answer with {written}, not with a stop token ({ends})")
    # Templates of some models write them as ordinary text, so they are no fault.
    unknown = {token for token in CONTROL_TOKEN.findall(answered) if token not in vocabulary}
    spelled = f"; {name_some(sorted(unknown))} are ordinary text to the tokenizer"
    if wrong:
        return CheckResult(TEMPLATE, DIFFERENT, "; ".join(wrong) + (spelled if unknown else ""))
    length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return CheckResult(
        TEMPLATE,
        OK,
        f"a question is {length} tokens before pictures are expanded; an answer ends with "
        f"{tokenizer.decode(end)}{spelled if unknown else ''}",
    )


def _answer(opened: ProcessorParts) -> dict[str, Any]:
    if opened.processor is None:
        return {"role": "assistant", "content": ANSWER}
    return {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}


def _render(opened: ProcessorParts, messages: Sequence[Any], *, add_generation_prompt: bool) -> str:
    text: str = opened.render(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return text


def _image_problem(opened: ProcessorParts, prompt: str) -> list[str]:
    """What is wrong with a prompt about one picture; nothing for a language model."""
    if opened.processor is None:
        return []
    mark = getattr(opened.processor, "image_token", None)
    if mark is not None and prompt.count(mark) != 1:
        return [f"it writes {prompt.count(mark)} times {mark} for one picture"]
    return []


def check_processor(encode: Encode, config: Any) -> list[CheckResult]:
    """One picture, two of unequal size, and a padded batch become image tokens and pixels."""
    rows, found = picture_rows(), image_token(config)
    field, index = ("", None) if found is None else found
    alone = [encode([row]) for row in rows]
    counts = [
        None if index is None else int((inputs["input_ids"] == index).sum()) for inputs in alone
    ]
    results = []
    for name, count, inputs in zip((ONE_PICTURE, TWO_PICTURES), counts[:2], alone[:2], strict=True):
        pixels = [value for value in inputs.values() if value.is_floating_point()]
        if count == 0:
            said = f"the prompt has no token {index}, which is {field} of config.json"
            results.append(CheckResult(name, DIFFERENT, said))
        elif not pixels or not all(bool(value.isfinite().all()) for value in pixels):
            results.append(CheckResult(name, DIFFERENT, "there are no finite pixel values"))
        else:
            shapes = ", ".join(str(tuple(value.shape)) for value in pixels)
            tokens = "" if count is None else f"{count} image tokens, "
            results.append(CheckResult(name, OK, f"{tokens}pixels {shapes}"))
    return [*results, _check_batch(encode(rows), alone)]


def _check_batch(batch: dict[str, torch.Tensor], alone: Sequence[dict[str, Any]]) -> CheckResult:
    """Each row of a batch has its ids alone behind the padding."""
    for row, inputs in enumerate(alone):
        length = inputs["input_ids"].shape[1]
        ids, mask = batch["input_ids"][row], batch["attention_mask"][row]
        if int(mask.sum()) != length or not torch.equal(ids[-length:], inputs["input_ids"][0]):
            return CheckResult(
                UNEQUAL_ROWS,
                DIFFERENT,
                f"row {row} of a left-padded batch has other ids than alone",
            )
    lengths = ", ".join(str(inputs["input_ids"].shape[1]) for inputs in alone)
    return CheckResult(
        UNEQUAL_ROWS, OK, f"rows of {lengths} tokens have the ids that they have alone"
    )
