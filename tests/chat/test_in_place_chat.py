"""Chat with students of transformers' own models: answers are those of `generate`."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, conversation, picture, save_teacher
from PIL import Image
from typer.testing import CliRunner

from mmmamba_cli.chat import (
    ChatAnswer,
    Conversation,
    InPlaceChatModel,
    Settings,
    in_place_chat,
)
from mmmamba_cli.chat.in_place_chat import load_any_chat_model
from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.processing import TextStream
from mmmamba_cli.runs import Run, resolve_model

# Processors that need no torchvision, and a language model.
NAMES = ("gemma3", "qwen3")
QUESTION = "Which colour is it?"
TOKENS = 6


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a seeded run for each of `NAMES`, and a picture."""
    folder = tmp_path_factory.mktemp("chat")
    for name in NAMES:
        save_teacher(FAMILIES[name], folder / "teachers" / name)
        words = ("--dtype", "fp32", "--no-report", "--in-place", "--allow-bidirectional")
        mmmamba("seed", folder / "teachers" / name, "--run", folder / name, *words)
    picture(16, 16).save(folder / "picture.png")
    return folder


def load(runs: Path, name: str) -> InPlaceChatModel:
    found = load_any_chat_model(resolve_model(Run(runs / name), "seed"), device="cpu")
    assert isinstance(found, InPlaceChatModel)
    return found


def say(model: InPlaceChatModel, talk: Conversation, settings: Settings) -> ChatAnswer:
    answer = ChatAnswer()
    assert "".join(model.answer(talk, settings, answer)) == answer.text
    return answer


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_that_of_generate(name: str, runs: Path) -> None:
    model, family = load(runs, name), FAMILIES[name]
    talk, pictures = Conversation((model.name,)), []
    if family.pictures:
        talk.add_picture(runs / "picture.png")
        pictures = [Image.open(runs / "picture.png")]
    talk.ask(QUESTION)
    answer = say(model, talk, Settings(max_new_tokens=TOKENS, eos=()))
    if family.pictures:
        messages = conversation(QUESTION, pictures)
    else:
        messages = [{"role": "user", "content": QUESTION}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = family.processor.apply_chat_template(messages, add_generation_prompt=True, **options)
    ids = model.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    new = ids[0, inputs["input_ids"].shape[1] :]
    # Bytes that are no character decode to other text once more of them follow.
    pieces: list[str] = []
    stream = TextStream(family.tokenizer, pieces.append, skip_prompt=False)
    for token in new:
        stream.put(token)
    stream.end()
    assert answer.text == "".join(pieces).lstrip()
    assert answer.tokens == len(new) == TOKENS and not answer.finished


def test_stop_tokens_end_an_answer_and_sampling_is_seeded(runs: Path) -> None:
    model = load(runs, "qwen3")
    talk = Conversation((model.name,))
    talk.ask(QUESTION)
    drawn = [
        say(model, talk, Settings(TOKENS, temperature=5.0, seed=seed, eos=())).text
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    inputs = model._inputs(talk)
    ids = model.model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=None)
    answer = say(model, talk, Settings(TOKENS, eos=(int(ids[0, -1]),)))
    assert answer.tokens == 1 and answer.finished


def test_models_side_by_side_draw_as_alone(runs: Path) -> None:
    models = [load(runs, "qwen3"), load(runs, "qwen3")]
    settings = Settings(TOKENS, temperature=5.0, seed=3, eos=())
    talks = []
    for model in models:
        talk = Conversation((model.name,))
        talk.ask(QUESTION)
        talks.append(talk)
    alone = say(models[0], talks[0], settings).text
    answers = [ChatAnswer() for _ in models]
    parts = zip(models, talks, answers, strict=True)
    streams = [model.answer(talk, settings, answer) for model, talk, answer in parts]
    pieces: list[list[str]] = [[], []]
    for both in zip_longest(*streams):
        for own, piece in zip(pieces, both, strict=True):
            own.append(piece or "")
    assert ["".join(own) for own in pieces] == [alone, alone]


def test_draws_have_the_probabilities_of_the_logits() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -torch.inf]]).expand(20_000, 4)
    ids = torch.zeros(20_000, 1, dtype=torch.long)
    settings = Settings(1, temperature=0.5, top_k=2)
    scores = in_place_chat._sampling(settings, torch.device("cpu"))(ids, logits)
    shares = scores.argmax(-1).bincount(minlength=4) / 20_000
    expected = torch.tensor([4.0, -torch.inf, 2.0, -torch.inf]).softmax(-1)
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)


def test_a_closed_answer_ends_its_thread(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(runs, "qwen3")
    talk = Conversation((model.name,))
    talk.ask(QUESTION)
    calls = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda **inputs: (calls.append(1), forward(**inputs))[1]
    )
    stream = model.answer(talk, Settings(500, eos=()), ChatAnswer())
    next(stream)
    stream.close()
    assert len(calls) < 100


def test_an_error_of_the_thread_is_raised(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(runs, "qwen3")
    talk = Conversation((model.name,))
    talk.ask(QUESTION)

    def fail(**inputs: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(model.model, "generate", fail)
    with pytest.raises(MmmambaError, match="has no memory left for a conversation of"):
        say(model, talk, Settings(TOKENS))


def test_the_command_answers_with_a_picture(runs: Path) -> None:
    words = ("--image", runs / "picture.png", "--prompt", QUESTION, "--max-new-tokens", 3)
    done = mmmamba(
        "chat", "--run", runs / "gemma3", *words, "--device", "cpu", "--json", "--teacher"
    )
    answers = json.loads(done.stdout)["answers"]
    assert [one["model"] for one in answers] == ["seed", "teacher"]
    assert [one["kind"] for one in answers] == ["linear", "all attention"]
    assert all(one["tokens"] <= 3 for one in answers)


def test_refusals(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(MmmambaError, match="reads text only"):
        words = ("--image", runs / "picture.png", "--prompt", QUESTION)
        mmmamba("chat", "--run", runs / "qwen3", *words, "--device", "cpu")
    teacher = runs / "teachers/qwen3"
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((teacher / name).read_bytes())
    mmmamba("seed", bare, "--run", tmp_path / "run", "--no-report", "--in-place")
    with pytest.raises(MmmambaError, match="has no processor, so it cannot be talked to"):
        mmmamba("chat", "--run", tmp_path / "run", "--prompt", QUESTION, "--device", "cpu")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "run/products/seed" / name).write_bytes((teacher / name).read_bytes())
    with pytest.raises(MmmambaError, match="has no chat template"):
        mmmamba("chat", "--run", tmp_path / "run", "--prompt", QUESTION, "--device", "cpu")
