"""Corrupted recipes: YAML pitfalls and typing mistakes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from case import Case, numbers, outcome
from mutations import spoil_bytes, spoil_tree

from mmmamba_cli.recipe import dump_recipe, load_recipe

CaseOf = Callable[[str, int], Case]


def laughs(rng: random.Random, text: str, canary: str) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 30):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return "\n".join([*lines, text])


def tagged(rng: random.Random, text: str, canary: str) -> str:
    tag = rng.choice(
        (
            f"!!python/object/apply:os.system ['touch {canary}']",
            f"!!python/object/apply:builtins.open ['{canary}', 'w']",
            f"!!python/object/new:pathlib.Path ['{canary}']",
            "!!python/name:os.system",
            "!!python/module:antigravity",
            "!!binary gICAgA==",
            "!!set {a, b}",
            "!!timestamp 2026-01-01",
            "!!int x",
            "!!float x",
            "!!bool 3",
            "!!null x",
            "!!omap [a: 1]",
            "!unknown x",
            "!!map [1]",
            "!!seq {a: 1}",
            "!!float 1e999",
            "!!int 0x",
        )
    )
    key = rng.choice(("description", "seed", "mixer", "stages", "extra"))
    return "\n".join(x for x in text.splitlines() if not x.startswith(key)) + f"\n{key}: {tag}\n"


def cycle(rng: random.Random, text: str, canary: str) -> str:
    return rng.choice(
        (
            f"{text}\nextra: &x [*x]\n",
            f"&x\nstages: *x\n{text}",
            "&x {mixer: *x}",
            "&x [*x, *x]",
            f"{text}\nmixer2: &y {{<<: *y}}\n",
            f"{text}\nz: *nothing\n",
            f"{text}\nm: {{<<: [1, 2]}}\n",
            f"{text}\nm: {{<<: 3}}\n",
        )
    )


def odd_text(rng: random.Random, text: str, canary: str) -> str:
    return rng.choice(
        (
            "",
            "---\n---\n",
            "a: b\n---\nc: d\n",
            f"{text}\n{text}",
            f"%YAML 9.9\n---\n{text}",
            "[" * 5000,
            "{a: " * 5000,
            "- " * 3000,
            "? " * 3000,
            f"{text}\n? [a, b]\n: 3\n",
            f"{text}\n3: x\n",
            f"{text}\nnull: x\n",
            f"{text}\nx: {'9' * 6000}\n",
            f"{text}\nseed: 0x{'f' * 5000}\n",
            f"{text}\nx: 1{'0' * 400}.0e999\n",
            f"{text}\n\tx: 1\n",
            f"{text}\nx: '\x00'\n",
            f'{text}\nx: "\\ud800"\n',
            f'{text}\n"\\e[31m": 1\n',
            f"{text}\nx: !!str\n",
            f"{text}\n{'k' * 3000}: 1\n",
            "just words",
            "- a list",
            f"\ufeff{text}",
            text.replace(":", " :", 3),
        )
    )


WAYS = (laughs, tagged, tagged, cycle, odd_text, odd_text)


def dumped(tree: Any) -> str:
    return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)


@pytest.fixture(scope="session")
def shipped() -> dict[str, str]:
    return {name: dump_recipe(load_recipe(name)) for name in ("mmmamba-linear", "mmmamba-hybrid")}


@pytest.mark.parametrize("number", numbers(70))
def test_spoiled(case_of: CaseOf, shipped: dict[str, str], number: int) -> None:
    case = case_of("recipe", number)
    text = case.rng.choice(list(shipped.values()))
    if number % 3 == 0:
        way = case.rng.choice(WAYS)
        case.done.append(way.__name__)
        content = way(case.rng, text, str(case.canary)).encode("utf-8", "surrogatepass")
    elif number % 3 == 1:
        content = dumped(spoil_tree(case.rng, yaml.safe_load(text), case.done)).encode(
            "utf-8", "surrogatepass"
        )
    else:
        content = spoil_bytes(case.rng, text.encode(), case.done)
    file = case.home / "recipe.yaml"
    file.write_bytes(content)
    done = case.command("recipe", "validate", file, "--num-layers", 32)
    if done.code == 0:
        again = case.command("recipe", "show", file)
        assert again.code == 0 and load_recipe(file) is not None


@pytest.mark.parametrize("number", numbers(20))
def test_set(case_of: CaseOf, number: int) -> None:
    """`--set` overrides are validated as strictly as recipes."""
    case = case_of("set", number)
    field = case.rng.choice(
        (
            "seed",
            "stages[0].lr",
            "stages[99].lr",
            "stages.stage1.steps",
            "layers.attention",
            "",
            "a.b.c",
            "stages",
            "mixer[0]",
            "seed.x",
            "..",
            "[0]",
            "data.image_root",
            "x" * 500,
        )
    )
    value = case.rng.choice(
        (
            "1",
            "-1",
            "nan",
            ".inf",
            "[1, 2]",
            "{a: 1}",
            "&x [*x]",
            "!!python/name:os.system",
            "'",
            "9" * 5000,
            "null",
            "1e999",
            "",
            "=",
            "a: b: c",
            "*x",
            "[" * 3000,
            "~",
            "0x10",
        )
    )
    case.done.append(f"{field:.40}={value:.40}")
    case.command("recipe", "show", "mmmamba-linear", "--set", f"{field}={value}")


@pytest.mark.parametrize("number", numbers(6))
def test_the_same(case_of: CaseOf, shipped: dict[str, str], number: int) -> None:
    case = case_of("same-recipe", number)
    text = list(shipped.values())[number % 2]
    tree = yaml.safe_load(text)
    keys = list(tree)
    case.rng.shuffle(keys)
    style = case.rng.choice((None, True, False))
    written = yaml.safe_dump(
        {key: tree[key] for key in keys}, sort_keys=False, default_flow_style=style, indent=4
    )
    files = [case.home / "one.yaml", case.home / "two.yaml"]
    files[0].write_text(text)
    files[1].write_text(f"# a remark\n\n{written}\n# another\n")
    one, two = (outcome(case.command("recipe", "show", file, "--json")) for file in files)
    assert one == two
