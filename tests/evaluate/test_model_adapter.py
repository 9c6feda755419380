"""HolisticVLMAdapter: batched answers equal single ones; choice likelihoods are exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from sentencepiece import sentencepiece_model_pb2
from suite_tables import mme_rows, write_tsv

from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate import (
    EncodedPrompt,
    EvalOptions,
    EvalPrompt,
    ModelIdentity,
    OutOfMemory,
    find_suite,
)
from mmmamba_cli.evaluate import open_suite as opened
from mmmamba_cli.evaluate.batch_memory import tokens_that_fit
from mmmamba_cli.evaluate.model_adapter import HolisticVLMAdapter, load_eval_model
from mmmamba_cli.evaluate.prompts import build_eval_prompt
from mmmamba_cli.runs import Run, resolve_path, resolve_product, resolve_teacher

MME = find_suite("mme")
LINEAR = Path(__file__).parents[2] / "evals/scenes/models/linear"


@pytest.fixture(scope="module", params=["student", "teacher"])
def model(request: pytest.FixtureRequest, small_run: Path) -> HolisticVLMAdapter:
    run = Run(small_run)
    if request.param == "student":
        return load_eval_model(resolve_product(run), "cpu", "fp32")
    return load_eval_model(resolve_teacher(run), "cpu", "fp32")


@pytest.fixture
def prompts(tmp_path: Path) -> list[EvalPrompt]:
    """Twelve yes/no questions about pictures of one and of four tiles."""
    write_tsv(tmp_path / "MME.tsv", mme_rows(pairs=3, categories=("OCR", "count")))
    table, rows = opened(MME, EvalOptions(data=tmp_path))
    return [build_eval_prompt(row, MME, table, max_tiles=4, by_likelihood=True) for row in rows]


def test_batched_equals_one_by_one(model: HolisticVLMAdapter, prompts: list[EvalPrompt]) -> None:
    encoded = [model.encode(prompt) for prompt in prompts]
    assert len({one.length for one in encoded}) > 3
    together = model.generate(encoded, 6)
    assert together == [answer for one in encoded for answer in model.generate([one], 6)]
    assert len(set(together)) > 3
    scores = model.score_choices(encoded)
    alone = [model.score_choices([one])[0] for one in encoded]
    torch.testing.assert_close(scores, alone, atol=1e-4, rtol=1e-5)
    assert len({round(score, 3) for row in scores for score in row}) > 12


def test_prompt_length_follows_encoded_length(
    model: HolisticVLMAdapter, prompts: list[EvalPrompt]
) -> None:
    constant = {model.encode(prompt).length - model.prompt_length(prompt) for prompt in prompts}
    assert len(constant) == 1
    few = EvalPrompt("0", prompts[4].text, prompts[4].pictures, max_tiles=1)
    # 130 x 40 pixels are three tiles and a thumbnail, of four tokens each.
    assert model.prompt_length(prompts[4]) - model.prompt_length(few) == 3 * 4


def test_likelihoods_equal_those_of_a_plain_forward(
    model: HolisticVLMAdapter, prompts: list[EvalPrompt]
) -> None:
    """Compare with a plain forward over each answered conversation."""
    choices = ("Yes", "No, not at all", "两只猫")
    prompt = EvalPrompt("0", prompts[2].text, prompts[2].pictures, 4, choices)
    encoded = model.encode(prompt)
    (found,) = model.score_choices([encoded])
    for choice, score in zip(choices, found, strict=True):
        talk = [
            {"role": "user", "content": prompt.text},
            {"role": "assistant", "content": choice},
        ]
        ids, is_answer = model.processor.conversation_ids(talk, encoded.value.num_tiles)
        with torch.no_grad():
            logits = model.model(torch.tensor([ids]), encoded.value.pixels).logits[0]
        logs = torch.log_softmax(logits.double(), -1)
        columns = [i for i, answers in enumerate(is_answer) if answers][:-1]
        assert len(columns) >= 1
        expected = float(sum(logs[i - 1, ids[i]] for i in columns))
        assert score == pytest.approx(expected, abs=1e-4)


def test_image_tokens_in_a_question_are_text(
    model: HolisticVLMAdapter, prompts: list[EvalPrompt]
) -> None:
    """Only the first `<image>` is a placeholder; further ones and special tokens are plain text."""
    picture = prompts[0].pictures
    said = "Is the word <image> or <|im_start|>system in the picture?"
    prompt = EvalPrompt("0", f"<image>\n{said}", picture, 4, ("Yes", "No"))
    plain = EvalPrompt("0", "<image>\nIs it?", picture, 4)
    encoded = model.encode(prompt)
    image_token = model.processor.image_token_id
    assert encoded.value.ids.count(image_token) == model.encode(plain).value.ids.count(image_token)
    assert said in model.processor.decode(encoded.value.ids)
    blind = model.encode(EvalPrompt("1", said))
    assert blind.value.ids.count(image_token) == 0
    assert said in model.processor.decode(blind.value.ids)
    assert len(model.score_choices([encoded])[0]) == 2


def test_answer_ends_at_a_stop_token(model: HolisticVLMAdapter, prompts: list[EvalPrompt]) -> None:
    stops = model.processor.stop_token_ids
    ids = model.processor.tokenizer.encode_plain("a red cat")
    assert model._text([*ids, stops[1], *ids]) == "a red cat"
    assert model.model.generation_config.eos_token_id == sorted(stops)


def test_generation_config_of_the_checkpoint_is_ignored(
    small_run: Path, prompts: list[EvalPrompt]
) -> None:
    fresh = load_eval_model(resolve_product(Run(small_run)), "cpu", "fp32")
    expected = fresh.generate([fresh.encode(prompts[0])], 6)
    fresh.model.generation_config.update(repetition_penalty=50.0, do_sample=True, temperature=9.0)
    again = HolisticVLMAdapter(fresh.model, fresh.processor, fresh.identity)
    assert again.generate([again.encode(prompts[0])], 6) == expected


def test_torch_out_of_memory_becomes_out_of_memory(
    model: HolisticVLMAdapter, prompts: list[EvalPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nand so on")

    encoded = [model.encode(prompts[0])]
    monkeypatch.setattr(model.model.lm_head, "forward", full)
    for ask in (lambda: model.generate(encoded, 2), lambda: model.score_choices(encoded)):
        with pytest.raises(OutOfMemory, match=r"Tried to allocate$") as caught:
            ask()
        assert caught.value.__context__ is None


def test_generator_gives_the_answers_of_transformers(
    model: HolisticVLMAdapter, prompts: list[EvalPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = [model.encode(prompt) for prompt in prompts]

    def no_forward(*args: object, **kwargs: object) -> None:
        raise AssertionError("decoded by transformers")

    with monkeypatch.context() as patch:
        patch.setattr(model.model, "generate", no_forward)
        fast = model.generate(encoded, 6)
    monkeypatch.setitem(model.__dict__, "generator", None)
    assert model.generate(encoded, 6) == fast
    assert len(set(fast)) > 3


def test_model_with_adapters_is_decoded_by_transformers(
    small_run: Path, prompts: list[EvalPrompt]
) -> None:
    peft = pytest.importorskip("peft")
    plain = load_eval_model(resolve_product(Run(small_run)), "cpu", "fp32")
    encoded = [plain.encode(prompt) for prompt in prompts]
    expected = plain.generate(encoded, 6)
    # An adapter changes nothing before its first step.
    adapted = peft.get_peft_model(plain.model, peft.LoraConfig(target_modules=["q_proj"]))
    found = HolisticVLMAdapter(adapted.base_model.model, plain.processor, plain.identity)
    assert found.generator is None
    assert found.generate(encoded, 6) == expected


def test_out_of_memory_releases_the_caches(
    model: HolisticVLMAdapter, prompts: list[EvalPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = [model.encode(prompts[0])]
    expected = model.generate(encoded, 4)
    assert model.generator is not None
    assert model.generator.cache_bytes > 0

    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(model.generator, "generate", full)
        with pytest.raises(OutOfMemory):
            model.generate(encoded, 4)
    assert model.generator.cache_bytes == 0
    assert model.generate(encoded, 4) == expected


def test_out_of_memory_makes_no_generator(
    small_run: Path, prompts: list[EvalPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = load_eval_model(resolve_product(Run(small_run)), "cpu", "fp32")

    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(fresh.model.lm_head, "forward", full)
    with pytest.raises(OutOfMemory):
        fresh.score_choices([fresh.encode(prompts[0])])
    assert "generator" not in vars(fresh)


def test_tokens_that_fit() -> None:
    assert tokens_that_fit(100, taken=10, free=1000) == 80 * 100
    assert tokens_that_fit(100, taken=999, free=1000) == 100
    assert tokens_that_fit(100, taken=0, free=10) == 800


def test_cpu_has_no_batch_limit(model: HolisticVLMAdapter, prompts: list[EvalPrompt]) -> None:
    assert model.max_batch_tokens(EncodedPrompt(prompts[0], 10), 5) is None


def test_identity_has_settings_that_change_answers(small_run: Path) -> None:
    run = Run(small_run)
    kinds = [
        load_eval_model(resolve_product(run), "cpu", dtype).identity for dtype in ("fp32", "bf16")
    ]
    assert kinds[0].content_hash == kinds[1].content_hash == run.product("seed").content_hash
    assert kinds[0].answers_depend_on["dtype"] == "float32"
    assert kinds[1].answers_depend_on["dtype"] == "bfloat16"
    assert isinstance(kinds[0], ModelIdentity)


def test_text_model_rejects_pictures(prompts: list[EvalPrompt]) -> None:
    from mmmamba_cli.processing import HolisticTextProcessor

    blind = HolisticVLMAdapter.__new__(HolisticVLMAdapter)
    blind.processor = HolisticTextProcessor.__new__(HolisticTextProcessor)
    blind.identity = ModelIdentity("plain", "hash")
    with pytest.raises(DataError, match="row 0 has a picture, but plain reads text only"):
        blind.encode(prompts[0])


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.model"])
def test_identity_has_tokenizer_and_suppressed_tokens(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(LINEAR, folder)
    before = load_eval_model(resolve_path(folder), "cpu").identity
    file = folder / name
    if name == "tokenizer.model":
        model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
        model.pieces[-1].piece += "x"
        file.write_bytes(model.SerializeToString())
    else:
        settings = json.loads(file.read_text())
        file.write_text(json.dumps({**settings, "suppress_tokens": [7]}))
    after = load_eval_model(resolve_path(folder), "cpu").identity
    assert before.content_hash == after.content_hash
    assert before.answers_depend_on != after.answers_depend_on
