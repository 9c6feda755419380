"""`Conversation`: histories, pictures, undo and saving."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmmamba_cli.chat import Conversation
from mmmamba_cli.cli.chat_session import printable
from mmmamba_cli.data import open_corpus
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import image_size


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file in files:
        Image.new("RGB", (4, 3)).save(file)
    return files


def test_every_model_has_its_own_history() -> None:
    talk = Conversation(("a", "b"), system="be brief")
    talk.ask("one?")
    talk.add_answer("a", "yes \n")
    talk.add_answer("b", "no")
    talk.ask("two?")
    assert talk.messages("b") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "two?"},
    ]
    assert talk.messages("a")[2]["content"] == "yes"
    talk.reset()
    assert talk.messages("a") == [{"role": "system", "content": "be brief"}]


def test_pictures_go_with_the_next_question(pictures: list[Path]) -> None:
    talk = Conversation(("a",))
    assert talk.add_picture(pictures[0]) == (4, 3)
    talk.ask("first")
    talk.add_answer("a", "x")
    talk.ask("none")
    talk.add_answer("a", "x")
    talk.add_picture(pictures[1])
    talk.add_picture(pictures[2])
    talk.ask("more")
    assert talk.questions == ["first", "none", "more"]
    assert talk.pictures == pictures
    assert talk.pending == []
    assert [talk.pictures_of(number) for number in range(3)] == [pictures[:1], [], pictures[1:]]
    asked = [m["content"] for m in talk.messages("a") if m["role"] == "user"]
    image = {"type": "image"}
    assert asked == [
        [image, {"type": "text", "text": "first"}],
        "none",
        [
            {"type": "text", "text": "Image-1: "},
            image,
            {"type": "text", "text": "Image-2: "},
            image,
            {"type": "text", "text": "more"},
        ],
    ]


def test_undo_makes_the_pictures_pending_again(pictures: list[Path]) -> None:
    talk = Conversation(("a", "b"))
    talk.add_picture(pictures[0])
    talk.ask("one")
    talk.add_answer("a", "x")
    talk.add_answer("b", "y")
    talk.add_picture(pictures[1])
    talk.ask("two")
    talk.add_answer("a", "half an answer")
    talk.undo()
    assert (talk.pictures, talk.pending) == (pictures[:1], pictures[1:2])
    assert (talk.questions, talk.answers) == (["one"], {"a": ["x"], "b": ["y"]})
    # `<image>` in a question is no picture.
    talk.pending = []
    talk.ask("what is <image>?")
    talk.undo()
    assert (talk.pictures, talk.pending) == (pictures[:1], [])


def test_errors_change_nothing(pictures: list[Path], tmp_path: Path) -> None:
    talk = Conversation(("a",))
    with pytest.raises(DataError, match="nothing to save"):
        talk.save(tmp_path / "file")
    with pytest.raises(DataError, match="empty"):
        talk.ask("  ")
    with pytest.raises(DataError, match="nowhere"):
        talk.add_picture(tmp_path / "nowhere.png")
    talk.add_picture(pictures[0])
    assert (talk.questions, talk.pending) == ([], pictures[:1])
    talk.ask("so?")
    with pytest.raises(DataError, match="no folder that exists"):
        talk.save(tmp_path / "no" / "file")


def test_a_saved_file_is_training_data(pictures: list[Path], tmp_path: Path) -> None:
    """Pictures below the file's folder are referenced, others copied; typed `<image>` is text."""
    (tmp_path / "data").mkdir()
    near = tmp_path / "data" / "near.png"
    Image.new("RGB", (7, 5)).save(near)
    talk = Conversation(("a", "b"))
    talk.add_picture(pictures[0])
    talk.add_picture(near)
    talk.ask("what does <image> mean?")
    talk.add_answer("a", "a tag, <image>")
    talk.add_answer("b", "x")
    talk.add_picture(pictures[0])
    talk.ask("and now?")
    talk.add_answer("a", "y")
    talk.add_answer("b", "y")
    file = tmp_path / "data" / "talk.jsonl"
    talk.save(file)
    corpus = open_corpus(file)
    assert len(corpus) == 2
    first = corpus[0]
    assert [one.name for one in first.images] == ["1-0.png", "near.png", "3-0.png"]
    assert [image_size(one) for one in first.images] == [(4, 3), (7, 5), (4, 3)]
    assert [dict(message) for message in first.messages] == talk.messages("a")
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "near.png",
        "talk-images",
        "talk.jsonl",
    ]
    with pytest.raises(DataError, match=r"talk\.jsonl exists already"):
        talk.save(file)
    file.unlink()
    with pytest.raises(DataError, match="talk-images exists already"):
        talk.save(file)
    pictures[0].unlink()
    with pytest.raises(DataError, match=r"0\.png does not exist any more"):
        talk.save(tmp_path / "data" / "other.jsonl")
    assert not list((tmp_path / "data").glob("*other*"))


def test_control_characters_are_replaced() -> None:
    assert printable("a\x1b[2Jb\rc\td\n\x9b") == "a�[2Jb�c\td\n�"
