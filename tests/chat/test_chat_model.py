"""`ChatModel`: answers equal `generate`, packed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmmamba_cli.chat import ChatAnswer, ChatModel, Conversation, Settings, load_chat_model
from mmmamba_cli.errors import DataError
from mmmamba_cli.inference import Generator
from mmmamba_cli.runs import Run, resolve_model

SETTINGS = Settings(12)
QUESTIONS = ("What is in the picture?", "Is there a dog? Please answer yes or no.", "And now?")


def load(name: str = "scenes-hybrid") -> ChatModel:
    return load_chat_model(resolve_model(Run(Path("runs/none")), name), device="cpu")


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return load()


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "first.png", tmp_path / "second.png"]
    Image.linear_gradient("L").resize((90, 60)).save(files[0])
    Image.radial_gradient("L").resize((60, 90)).save(files[1])
    return files


def say(model: ChatModel, talk: Conversation, settings: Settings = SETTINGS) -> str:
    found = ChatAnswer()
    said = "".join(model.answer(talk, settings, found))
    assert said == found.text
    assert found.finished == (found.tokens < settings.max_new_tokens)
    return said


def by_generate(model: ChatModel, talk: Conversation) -> str:
    """The same answer from `model.generate`."""
    batch = model.processor.chat(talk.messages(model.name), talk.pictures, padding=False)
    batch.pop("num_tiles", None)
    ends = sorted(set(model.processor.stop_token_ids))
    tokens = model.model.generate(
        **batch, max_new_tokens=SETTINGS.max_new_tokens, do_sample=False, eos_token_id=ends
    )
    ids = tokens[0, batch["input_ids"].shape[1] :].tolist()
    text: str = model.processor.tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()


def compare_with_generate(model: ChatModel, pictures: list[Path]) -> list[str]:
    """Answers of several turns, the first two about pictures."""
    talk = Conversation((model.name,))
    for number, question in enumerate(QUESTIONS):
        for file in pictures[number : number + 1]:
            talk.add_picture(file)
        talk.ask(question)
        said = say(model, talk)
        assert said.rstrip() == by_generate(model, talk)
        talk.add_answer(model.name, said)
    return talk.answers[model.name]


@pytest.mark.parametrize("name", ["scenes-teacher", "scenes-linear", "scenes-hybrid"])
def test_turns_with_pictures_equal_generate(name: str, pictures: list[Path]) -> None:
    model = load(name)
    assert isinstance(model.generator, Generator)
    answers = compare_with_generate(model, pictures)
    assert all(answers)


def test_models_with_adapters(
    model: ChatModel, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    from mmmamba_cli import checkpoint

    plain = checkpoint.load_model

    def adapted(*words: Any, **options: Any) -> Any:
        model = plain(*words, **options)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["o_proj", "v_proj"])
        peft.inject_adapter_in_model(config, model)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.05)
        return model.eval().requires_grad_(False)

    monkeypatch.setattr(checkpoint, "load_model", adapted)
    other = load()
    assert other.generator is None
    answers = compare_with_generate(other, pictures)
    assert answers != compare_with_generate(model, pictures)
    talk = Conversation((other.name,))
    talk.ask(QUESTIONS[1])
    drawn = [say(other, talk, Settings(12, 5.0, top_k=50, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_sampling_is_seeded(model: ChatModel) -> None:
    talk = Conversation((model.name,))
    talk.ask(QUESTIONS[0])
    # The student is sure of its answers: at a lower temperature every seed draws the same.
    drawn = [say(model, talk, Settings(12, 5.0, top_p=0.95, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def break_at(token: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise in the middle of a decode step."""
    from mmmamba_cli.inference import decode_step

    plain, calls = decode_step._layer_step, [0]

    def block(*words: Any) -> Any:
        calls[0] += 1
        if calls[0] == 8 * token + 4:
            raise error
        return plain(*words)

    monkeypatch.setattr(decode_step, "_layer_step", block)


def test_the_conversation_continues_after_ctrl_c(
    model: ChatModel, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Conversation((model.name,))
    talk.add_picture(pictures[0])
    talk.ask(QUESTIONS[0])
    expected = say(model, talk)
    found = ChatAnswer()
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        break_at(1, KeyboardInterrupt(), broken)
        # Without EOS: an answer of one token would end before the interrupt.
        list(model.answer(talk, Settings(12, eos=()), found))
    assert found.tokens == 2 and not found.finished
    talk.undo()
    assert talk.pending == [pictures[0]]
    talk.ask(QUESTIONS[0])
    assert say(model, talk) == expected
    # The part of an answer before an interrupt is kept.
    stopped = ChatAnswer()
    talk.ask(QUESTIONS[1])
    pieces = model.answer(talk, Settings(12, eos=()), stopped)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    talk.add_answer(model.name, stopped.text)
    talk.ask(QUESTIONS[2])
    assert say(model, talk).rstrip() == by_generate(model, talk)


def test_out_of_memory_releases_the_cache(
    model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Conversation((model.name,))
    talk.ask(QUESTIONS[0])
    expected = say(model, talk)
    assert model.generator is not None and model.generator.cache_bytes > 0
    with monkeypatch.context() as broken, pytest.raises(DataError, match="no memory left"):
        break_at(0, torch.OutOfMemoryError(), broken)
        list(model.answer(talk, SETTINGS, ChatAnswer()))
    assert model.generator.cache_bytes == 0
    assert say(model, talk) == expected
