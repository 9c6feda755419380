"""YAML reader and writer, and errors with line numbers."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba_cli.errors import RecipeError
from mmmamba_cli.recipe.yaml_text import read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-5E3", -5000.0),
        ("1.e2", 100.0),
        (".5", 0.5),
        ("1_000.5", 1000.5),
        ("20_000", 20000),
        ("010", 10),
        ("+3", 3),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2025-02-19", "2025-02-19"),
        ("1e", "1e"),
        ("e5", "e5"),
        (".inf", ".inf"),
        ("'1e-5'", "1e-5"),
        ("[1, 2e1]", [1, 20.0]),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    read = read_yaml(text, "x")
    assert read == value
    assert type(read) is type(value)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",)))
    | st.sampled_from(["1e5", "no", "yes", "1_0", "010", "12:30", "0x1f", "<<", "=", "-", "- a"])
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text("ab1e5<", min_size=1), inner)
)


@settings(deadline=None)  # the machine may be busy
@given(trees)
def test_written_text_reads_back_equal(tree: Any) -> None:
    assert read_yaml(write_yaml(tree), "x") == tree


@pytest.mark.parametrize("sign", ["\x85", "\u2028", "\u2029", "\ufeff", "\r", "\t", "\n", "\x00"])
def test_no_character_is_lost(sign: str) -> None:
    for text in (sign, f"a{sign}b", f" a: {sign}"):
        assert read_yaml(write_yaml({"k": text, text: 1}), "x") == {"k": text, text: 1}


@pytest.mark.parametrize("text", ["no", "1e5", "0x1f", "1:30", "010", "null", "2025-02-19"])
def test_written_text_is_text_to_other_readers_too(text: str) -> None:
    assert yaml.safe_load(write_yaml({"a": text})) == {"a": text}


def test_written_numbers_are_numbers_to_other_readers_too() -> None:
    assert yaml.safe_load(write_yaml({"lr": 1e-5, "clip": 5.0})) == {"lr": 1e-5, "clip": 5.0}


def test_an_alias_is_a_separate_value() -> None:
    tree = read_yaml("a: &x {k: [1]}\nb: *x\n", "f")
    tree["a"]["k"].append(2)
    assert tree["b"] == {"k": [1]}


def test_merging_overrides_without_being_a_repeated_key() -> None:
    text = "a: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}\n<<: *x\n"
    tree = {"a": {"k": 1, "l": 2}, "b": {"k": 3, "l": 2}, "k": 1, "l": 2}
    assert read_yaml(text, "f") == tree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f:3: not valid YAML: key a stands on line 1 already"),
        ("a:\n  - {c: 1,\n     c: 2}\n", "f:3: not valid YAML: key c stands on line 2 already"),
        ("b: 1\n2: 1\n", "f:2: not valid YAML: a key must be text"),
        ("b: 1\n? [a]\n: 1\n", "f:2: not valid YAML: a key must be text"),
        ("a: [1\nb: 2\n", "f:2: not valid YAML: "),
        ("a: 1\n\tb: 2\n", "f:2: not valid YAML: "),
        ("a: 1\nb: *c\n", "f:2: not valid YAML: found undefined alias 'c'"),
        ("a: 1\n---\nb: 1\n", "f:2: not valid YAML: expected a single document"),
        ("a: 1\nb: !!python/object/apply:os.getcwd []\n", "f:2: not valid YAML: "),
        ("a: 1\nb: \x01\n", "f:2: not valid YAML: character #x0001 is not allowed"),
        ("a: &a [*a]\n", "f: holds more than 20000 values, or an anchor that contains itself"),
        ("[" * 5000, "f: is nested too deeply"),
    ],
)
def test_invalid_yaml_names_file_and_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_yaml(text, "f")
    assert str(caught.value).startswith(message)


def test_exponential_anchors_are_refused() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(RecipeError, match="more than 20000 values"):
        read_yaml("\n".join(lines), "f")
