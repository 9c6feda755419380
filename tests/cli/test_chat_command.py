"""`mmmamba chat`: one question, lines from a pipe, and a real terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ended import Command, Done
from PIL import Image
from terminals import CTRL_C, CTRL_D, Terminal

import mmmamba_cli
from mmmamba_cli.runs import Run, open_processor

Chat = Callable[..., Done]


def asked(chat: Chat, *words: object) -> dict[str, Any]:
    done = chat(*words, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.linear_gradient("L").resize((90, 60)).save(tmp_path / "a picture.png")
    return tmp_path / "a picture.png"


def test_answer_about_a_picture_equals_generate(
    chat: Chat, student_run: Path, picture: Path
) -> None:
    words = ("--run", student_run, "--prompt", "What is it?", "--max-new-tokens", 9)
    found = asked(chat, *words, "--image", picture)
    assert found["images"] == [str(picture)]
    (answer,) = found["answers"]
    assert (answer["model"], answer["tokens"], answer["finished"]) == ("seed", 9, False)
    assert answer["distilled_end_to_end"] is False
    checkpoint = Run(student_run).open_product("seed")
    processor = open_processor(checkpoint)
    assert processor is not None
    batch = processor.chat("What is it?", [picture])
    model = mmmamba_cli.load(str(checkpoint.path), dtype="fp32")
    tokens = model.generate(**batch, max_new_tokens=9, do_sample=False)
    ids = tokens[0, batch["input_ids"].shape[1] :].tolist()
    said = processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert answer["answer"] == said.strip()
    assert asked(chat, *words)["answers"][0]["answer"] != answer["answer"]


def test_warning_for_a_student_that_was_not_distilled(chat: Chat, student_run: Path) -> None:
    done = chat("--run", student_run, "--prompt", "Hi", "--max-new-tokens", 2)
    assert "seed was never distilled end to end" in done.err
    assert "cut after 2 tokens" in done.err
    words = ("--from", "teacher", "--prompt", "Hi", "--max-new-tokens", 2)
    teacher = chat("--run", student_run, *words)
    assert teacher.code == 0
    assert "never distilled" not in teacher.err


def test_piped_lines_are_one_conversation(chat: Chat, llama: Path) -> None:
    words = ("--model", llama, "--max-new-tokens", 5)
    done = chat(*words, typed="the cat\n\nthe dog\n/history\n/reset\nthe dog\n/quit\nnot asked\n")
    assert done.code == 0, done.err
    first, second, *history, alone = done.out.split("\n")[:-1]
    asked_and_said = (("you", "the cat"), ("small-llama", first), ("you", "the dog"))
    assert history == [f"{who}: {text}" for who, text in (*asked_and_said, ("small-llama", second))]
    # The answer depends on the history.
    assert alone != second
    assert "not asked" not in done.out + done.err
    assert alone == chat(*words, "--prompt", "the dog").out.rstrip("\n")


def test_piped_answers_of_several_models_are_prefixed(
    chat: Chat, student_run: Path, llama: Path
) -> None:
    done = chat(
        "--run",
        student_run,
        "--teacher",
        "--compare",
        llama,
        "--max-new-tokens",
        3,
        "--prompt",
        "a",
    )
    named = [line.partition("]")[0] for line in done.out.splitlines() if line.startswith("[")]
    assert named == ["[seed", "[small-llama", "[teacher"]
    words = ("--compare", "seed", "--compare", "teacher", "--max-new-tokens", 3, "--prompt", "a")
    two = asked(chat, "--run", student_run, *words)
    assert [a["model"] for a in two["answers"]] == ["seed", "teacher"]


def test_sampling_is_seeded(chat: Chat, llama: Path) -> None:
    words = ("--model", llama, "--prompt", "the cat", "--max-new-tokens", 12, "--temperature", 1.5)
    one, same, other = (asked(chat, *words, "--seed", s)["answers"][0]["answer"] for s in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--json",), "--json needs a question"),
        (("--prompt", "a", "--max-new-tokens", 0), "max_new_tokens is 0"),
        (("--prompt", "a", "--temperature", -1), "temperature is -1.0"),
        (("--prompt", "a", "--temperature", "nan"), "temperature is nan"),
        (("--prompt", "a", "--seed", -1), "seed is -1"),
        (("--prompt", "a", "--top-k", 5), "belong to drawing"),
        (("--prompt", "a", "--temperature", 1, "--top-p", 2), "top_p is 2.0"),
        (("--prompt", " "), "the question is empty"),
        (("--prompt", "a", "--image", "nowhere.png"), "nowhere.png"),
        (("--prompt", "a", "--from", "nothing"), "no product 'nothing'"),
        (("--prompt", "a", "--from", "seed", "--compare", "seed"), "called seed"),
        (("--prompt", "a", "--device", "abacus"), "device 'abacus' is not known"),
    ],
)
def test_user_errors_are_one_sentence(
    chat: Chat, student_run: Path, words: tuple[object, ...], said: str
) -> None:
    done = chat("--run", student_run, *words)
    assert done.code == 2
    assert ("--json" in words) == bool(done.out)
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ") and said in last


def test_a_text_only_model_rejects_pictures(chat: Chat, llama: Path, picture: Path) -> None:
    done = chat("--model", llama, "--image", picture, "--prompt", "a")
    # The error comes before the model is loaded.
    assert done.code == 2
    assert done.err.startswith("error: small-llama reads text only, it cannot be shown ")
    later = chat("--model", llama, typed=f"/image {picture}\n")
    assert later.code == 2
    assert "reads text only" in later.err


def test_piped_session_ends_at_the_first_error(chat: Chat, llama: Path) -> None:
    done = chat("--model", llama, "--max-new-tokens", 2, typed="/nothing\nthe cat\n")
    assert "error: there is no /nothing" in done.err
    assert (done.code, done.out) == (2, "")
    done = chat("--model", llama, typed=b"\xff\xfe\n")
    assert (done.code, done.err.splitlines()[-1][:42]) == (
        2,
        "error: the questions are not valid UTF-8 (",
    )


def test_a_saved_conversation_is_training_data(
    chat: Chat, mmmamba: Command, student_run: Path, picture: Path, tmp_path: Path
) -> None:
    file = tmp_path / "talk.jsonl"
    lines = f"/image '{picture}'\nWhat is it?\nAnd why?\n/save {file}\n"
    done = chat("--run", student_run, "--max-new-tokens", 4, typed=lines)
    assert done.code == 0, done.err
    assert "a picture.png, 90 x 60, goes with the next question" in done.err
    (line,) = file.read_text().splitlines()
    record = json.loads(line)
    assert (record["model"], record["images"]) == ("seed", [picture.name])
    assert [m["role"] for m in record["messages"]] == ["user", "assistant"] * 2
    text = {"type": "text", "text": "What is it?"}
    assert record["messages"][0]["content"] == [{"type": "image"}, text]
    checked = mmmamba("data", "check", file, "--run", student_run, "--json")
    assert checked.code == 0, checked.err
    again = chat("--run", student_run, "--max-new-tokens", 1, typed=f"a\n/save {file}\n")
    assert "exists already" in again.err


READY = "> "


def conversation(columns: int, *words: object) -> Terminal:
    """On the CPU: a fork cannot use a GPU that its parent has used."""
    return Terminal(columns, "chat", "--device", "cpu", *words)


def test_interactive_session(llama: Path) -> None:
    terminal = conversation(80, "--model", llama, "--max-new-tokens", 400_000)
    terminal.wait_for("Ctrl-D exits")
    terminal.wait_for(READY)
    terminal.type("the cat\n")
    terminal.wait_for("the cat\r\n")
    # The first lines of a very long answer.
    shown = terminal.wait_for("\n") + terminal.wait_for("\n")
    rows = [row.rpartition("\x1b[K")[2] for row in shown.replace("\r\n", "\n").split("\n")]
    assert rows[0] and max(map(len, rows)) < 80
    terminal.type(CTRL_C)
    terminal.wait_for("stopped; ")
    terminal.wait_for(READY)
    # The session continues after an interrupt.
    terminal.type("the dog\n")
    terminal.wait_for("the dog\r\n")
    terminal.wait_for("\n")
    terminal.type(CTRL_C)
    terminal.wait_for("stopped; ")
    terminal.wait_for(READY)
    terminal.type("/nothing\n")
    terminal.wait_for("there is no /nothing")
    terminal.wait_for(READY)
    terminal.type("/history\n")
    assert "you: the cat" in terminal.wait_for("small-llama: ")
    terminal.wait_for(READY)
    # Python handles no signal between printing the prompt and reading from it.
    terminal.wait_until_it_reads()
    terminal.type(CTRL_C)
    terminal.wait_for("press Ctrl-C again to exit")
    terminal.wait_for(READY)
    terminal.wait_until_it_reads()
    terminal.type(CTRL_C)
    assert terminal.ended() == 130


def test_two_models_side_by_side_in_a_wide_terminal(student_run: Path) -> None:
    terminal = conversation(80, "--run", student_run, "--teacher", "--max-new-tokens", 12)
    terminal.wait_for(READY)
    for columns, beside in ((80, True), (200, True), (60, False)):
        terminal.resize(columns)
        terminal.type("Hello\n")
        shown = terminal.wait_for("tokens/s")
        terminal.wait_for(READY)
        heading = [line for line in shown.splitlines() if "seed" in line and "teacher" in line]
        assert bool([line for line in heading if "│" in line]) == beside
        assert ("── seed ──" in shown) != beside
        if beside:
            (rule,) = [line for line in shown.splitlines() if line.startswith("───")]
            assert len(rule) in (columns - 1, columns - 2)
    terminal.type(CTRL_D)
    assert terminal.ended() == 0


def test_prompt_option_in_a_terminal(llama: Path) -> None:
    terminal = conversation(40, "--model", llama, "--max-new-tokens", 30, "--prompt", "a")
    shown = terminal.wait_for("tokens/s")
    assert terminal.ended() == 0
    # Growing rows are redrawn, and none is wider than the terminal.
    assert "\x1b[K" in shown
    drawn = [part for row in shown.splitlines() for part in row.split("\x1b[K")[1:]]
    assert drawn and max(map(len, drawn)) < 40


def test_piped_output_has_no_control_characters(chat: Chat, llama: Path) -> None:
    done = chat("--model", llama, "--max-new-tokens", 30, typed="the cat\n/help\n")
    assert "\x1b" not in done.out + done.err
    assert "\r" not in done.out
