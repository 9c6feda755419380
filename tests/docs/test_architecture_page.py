"""docs/architecture.svg is what the imports are today."""

from __future__ import annotations

import make_architecture
import pytest


def test_the_picture_is_up_to_date() -> None:
    stored = make_architecture.PICTURE.read_text(encoding="utf-8")
    assert stored == make_architecture.picture(), f"run `{make_architecture.COMMAND}`"


def test_edges_that_follow_from_others_are_left_out() -> None:
    edges = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set()}
    assert make_architecture.reduced(edges) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set()}


def test_a_room_without_a_description_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(make_architecture.CONTENTS, "model")
    with pytest.raises(KeyError, match="model"):
        make_architecture.picture()
