"""Answers in chat templates of other habits than those of the tiny teachers."""

from __future__ import annotations

from typing import Any

import pytest
from teacher_tokenizers import CHATML_SPECIAL_TOKENS, chatml_tokenizer

from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import TeacherProcessor
from mmmamba_cli.processing.answer_tokens import find_answers

HEADER = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n"
# Spaces around a content are stripped, as in Llama 3.
STRIPPED = HEADER + "{{ m.content | trim }}<|im_end|>\n{% endfor %}" + OPENS + "{% endif %}"
# No special token around turns, as in Vicuna; the end token follows an answer.
BARE = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# An empty thought before the last answer only, as in Qwen3.
THOUGHT = (
    HEADER + "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + OPENS + "{% endif %}"
)
# The thought is opened by the prompt, so the model does not write its mark.
OPENED = THOUGHT.replace(OPENS, OPENS + "<think>\n")
CHANGED = STRIPPED.replace("trim", "upper")
REFUSING = "{{ raise_exception('no system') }}" + STRIPPED
MESSAGES = tuple(
    {"role": role, "content": content}
    for role, content in (
        ("user", "four"),
        ("assistant", "The answer is four."),
        ("user", "four?"),
        ("assistant", "四个，four."),
    )
)
END = "<|im_end|>"


def processor_with(template: str) -> TeacherProcessor:
    return TeacherProcessor(chatml_tokenizer(CHATML_SPECIAL_TOKENS, template))


def answers(template: str, messages: Any = MESSAGES) -> list[str]:
    processor = processor_with(template)
    prompt = processor.render(messages, 0)
    runs: list[list[int]] = [[]]
    for token, is_answer in zip(prompt.ids, prompt.is_answer, strict=True):
        if is_answer:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [processor.tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "before"),
    [
        (STRIPPED, ("", "")),
        (BARE, (" ", " ")),
        (THOUGHT, ("", "<think>\n\n</think>\n\n")),
        (OPENED, ("", "\n</think>\n\n")),
    ],
)
def test_an_answer_is_what_follows_the_prompt(template: str, before: tuple[str, str]) -> None:
    expected = [f"{before[0]}The answer is four.{END}", f"{before[1]}四个，four.{END}"]
    assert answers(template) == expected


def test_an_answer_may_begin_like_what_the_prompt_opens() -> None:
    messages = [dict(message) for message in MESSAGES]
    messages[1]["content"] = "<third>"
    assert answers(OPENED, messages)[0] == f"<third>{END}"


def test_stripped_answers_are_found() -> None:
    spaced = [{**message, "content": f" {message['content']}\n"} for message in MESSAGES]
    assert answers(STRIPPED, spaced) == answers(STRIPPED)


@pytest.mark.parametrize(
    ("template", "message"),
    [(CHANGED, "does not write turn 2 as it is"), (REFUSING, "does not take the conversation")],
)
def test_templates_that_change_or_refuse_a_conversation(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        answers(template)


def test_a_processor_that_changes_more_than_pictures_is_noticed() -> None:
    ids, is_answer = [1, 7, 2, 3, 8, 4], [False, False, False, True, True, True]
    assert find_answers(ids, is_answer, [1, 9, 7, 7, 7, 9, 2, 3, 8, 4]) == [False] * 7 + [True] * 3
    assert find_answers(ids, is_answer, [1, 7, 2, 8, 3, 4]) is None
    assert find_answers(ids, is_answer, [1, 7, 2, 3, 5, 4]) is None


@pytest.mark.parametrize("template", [THOUGHT, OPENED])
@pytest.mark.parametrize("answer", ["in", "k", "think", "<think>", "t"])
def test_an_answer_may_have_letters_of_what_comes_before_it(template: str, answer: str) -> None:
    messages = [*MESSAGES[:3], {"role": "assistant", "content": answer}]
    assert answers(template, messages)[-1].endswith(f"</think>\n\n{answer}{END}")
