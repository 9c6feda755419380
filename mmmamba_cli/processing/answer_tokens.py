"""Which tokens of a rendered conversation are answers, for any chat template.

A template that marks answers itself (`{% generation %}`) is believed. For others an answer begins
where the prompt of the turns before it ends, and ends with the special token behind its text.
A processor then replaces each placeholder by the tokens of a picture; `find_answers` finds the
answers again.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from mmmamba_cli.errors import DataError

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Without marks the turns before each answer are rendered: n turns take n * n / 2 of them, about a
# second at this number.
MAX_UNMARKED_TURNS = 512

Messages = Sequence[dict[str, Any]]
Span = tuple[int, int]
# Renders messages; with True it opens the next answer.
Render = Callable[[Messages, bool], str]


def marks_answers(template: str) -> bool:
    """Whether a chat template marks answers by `{% generation %}`."""
    return GENERATION_BLOCK.search(template) is not None


def answer_spans(
    messages: Messages, text: str, render: Render, special_tokens: Iterable[str]
) -> list[Span]:
    """Characters (start, end) of each answer in `text`, the rendered `messages`.

    An answer is what a model writes after the prompt of the turns before it, up to and including
    the special token that ends the turn.

    Raises:
        DataError: the template changes earlier turns or answers, so that they are not found; or
            there are more than `MAX_UNMARKED_TURNS` turns.
    """
    if len(messages) > MAX_UNMARKED_TURNS:
        raise DataError(
            f"there are {len(messages):,} turns, at most {MAX_UNMARKED_TURNS} are possible with a "
            "chat template that does not mark answers",
            "split the conversation, or give the processor a template with {% generation %}",
        )
    longest_first = sorted(special_tokens, key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    end_of_turn = re.compile(rf"\s*(?:{special.pattern})")
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        earlier = messages[:turn]
        before = render(earlier, False).rstrip() if earlier else ""
        found = None
        if text.startswith(before):
            start = _common_length(text, render(earlier, True))
            found = _find(_text_of(message), text, start, len(before), special, end_of_turn)
        if found is None:
            raise DataError(
                f"the chat template does not write turn {turn + 1} as it is, so that its answer is "
                "not found",
                "give the processor a template that marks answers with {% generation %}",
            )
        start, end = found
        ending = end_of_turn.match(text, end)
        spans.append((start, end if ending is None else ending.end()))
    return spans


def _common_length(one: str, other: str) -> int:
    """Number of leading characters in which two texts agree."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _find(
    answer: str,
    text: str,
    start: int,
    first: int,
    special: re.Pattern[str],
    end_of_turn: re.Pattern[str],
) -> Span | None:
    """Where an answer is: from `start`, perhaps with what the template puts before it, to its end.

    Templates may strip an answer. No special token comes before it. What the template puts before
    an answer may have its letters too, as `in` in `<think>`: the answer is where the turn ends, if
    it ends with a special token. Where a prompt opens an answer by more than the text has, both may
    agree in letters of the answer: it then begins before `start`, but behind `first`.
    """
    for written in (answer, answer.strip()):
        places = list(_places(written, text, start, special))
        if places:
            ends = [place + len(written) for place in places]
            return start, next((end for end in ends if end_of_turn.match(text, end)), ends[0])
    for written in (answer, answer.strip()):
        for place in range(start - 1, first, -1):
            if text.startswith(written, place):
                return place, place + len(written)
    return None


def _places(written: str, text: str, start: int, special: re.Pattern[str]) -> Iterator[int]:
    """Where `written` begins in the text from `start` on, before the first special token."""
    place = text.find(written, start)
    while place >= 0 and special.search(text, start, place) is None:
        yield place
        place = text.find(written, place + 1) if written else -1


def _text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def tokens_in(spans: Sequence[Span], offsets: Sequence[Span]) -> list[bool]:
    """Whether each token, at characters (start, end), has a character in one of the spans.

    Spans are in order and do not overlap.
    """
    ends = [end for _, end in spans]
    found = []
    for first, last in offsets:
        number = bisect_right(ends, first)
        found.append(first < last and number < len(spans) and spans[number][0] < last)
    return found


def find_answers(
    ids: Sequence[int], is_answer: Sequence[bool], expanded: Sequence[int]
) -> list[bool] | None:
    """Answer tokens among the `expanded` ids, in which pictures have replaced placeholders.

    Ids that occur equally often in both are those that no picture adds, in the same order. From the
    last of them before an answer up to its end, both have the same ids.

    Returns:
        One bool for each expanded id; None if the ids do not correspond.
    """
    before, after = Counter(ids), Counter(expanded)
    kept = {token for token, count in before.items() if after[token] == count}
    anchors = [i for i, token in enumerate(ids) if token in kept]
    places = [i for i, token in enumerate(expanded) if token in kept]
    if [ids[i] for i in anchors] != [expanded[i] for i in places]:
        return None
    found = [False] * len(expanded)
    for start, end in _runs(is_answer):
        number = bisect_right(anchors, start) - 1
        if number < 0:
            return None
        anchor = anchors[number]
        shift = places[number] - anchor
        if list(ids[anchor:end]) != list(expanded[anchor + shift : end + shift]):
            return None
        found[start + shift : end + shift] = [True] * (end - start)
    return found


def _runs(is_answer: Sequence[bool]) -> Iterator[Span]:
    """Start and end of each run of answer tokens."""
    place = 0
    for value, run in groupby(is_answer):
        length = len(list(run))
        if value:
            yield place, place + length
        place += length
