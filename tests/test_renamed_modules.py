"""Module names that README or docs/ showed before a rename still work, with a warning."""

from __future__ import annotations

from importlib import import_module

import pytest


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("mmmamba_cli.decoding", "mmmamba_cli.inference", ("Generator", "pack", "quantize")),
        (
            "mmmamba_cli.chatting",
            "mmmamba_cli.chat",
            ("Answer", "Conversation", "Settings", "load_speaker", "locate"),
        ),
    ],
)
def test_old_names_are_the_new_ones(old: str, new: str, names: tuple[str, ...]) -> None:
    for name in names:
        with pytest.warns(DeprecationWarning, match=f"{old} is called {new} now"):
            found = getattr(import_module(old), name)
        assert found is getattr(import_module(new), name)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.warns(DeprecationWarning), pytest.raises(AttributeError, match="no attribute"):
        import_module("mmmamba_cli.decoding").nothing  # noqa: B018
