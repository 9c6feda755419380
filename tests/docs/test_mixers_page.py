"""docs/mixers.md: every mixer with its parameters, the bytes of its state, and its decoding."""

from __future__ import annotations

import re

import pytest
from pages import ROOT

from mmmamba_cli.architecture import LINEAR, MixerConfig, default_mixer, mixer_spec, mixer_specs
from mmmamba_cli.checkpoint.hovle import ARCHITECTURES, to_architecture

PAGE = (ROOT / "docs" / "mixers.md").read_text(encoding="utf-8")
TEACHER = to_architecture(ARCHITECTURES["hovle-2.6b"], "hovle-2.6b")
# Parameters of the recurrent mixers that the text below the table names.
COMMON = {"conv1d", "g_proj", "g_norm"}
BF16_BYTES = 2
NAME = re.compile(r"`(\w+)`")


def rows(heading: str) -> dict[str, list[str]]:
    """Cells of the table whose heading line begins so, by the name of the mixer."""
    _, _, table = PAGE.partition(f"\n{heading}")
    found = {}
    for line in table.split("\n")[2:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        found[cells[0].strip("| ").split("`")[1]] = cells
    return found


def parts(name: str) -> set[str]:
    """Modules and vectors of a mixer in a layer of HoVLE-2.6B."""
    shapes = mixer_spec(name).parameter_shapes(TEACHER.language, MixerConfig(), TEACHER.hidden_size)
    return {parameter.partition(".")[0] for parameter in shapes}


def test_both_tables_have_every_mixer() -> None:
    for heading in ("| mixer | what", "| mixer | ops"):
        assert set(rows(heading)) == set(mixer_specs())


@pytest.mark.parametrize("name", mixer_specs())
def test_a_row_is_what_the_spec_says(name: str) -> None:
    spec, (_, _, new, state, fast) = mixer_spec(name), rows("| mixer | what")[name]
    cache = [
        spec.cache_bytes(TEACHER.language, MixerConfig(), 1, columns, BF16_BYTES)
        for columns in (1000, 1001)
    ]
    total, more = (one.kv_cache + one.conv_state + one.ssm_state for one in cache)
    expected = f"{total:,} B" if more == total else f"{more - total:,} B a token"
    assert state == expected
    assert fast.rstrip(" |") == ("yes" if spec.is_packed(MixerConfig()) else "no")
    listed = set(NAME.findall(new.partition(";")[0]))
    assert listed == parts(name) - parts("attention") - COMMON


def test_options_and_the_mixers_that_read_them() -> None:
    table = rows("| option of `mixer` | read by")
    found = {
        option: set(NAME.findall(mixers))
        for options, mixers in table.values()
        for option in NAME.findall(options)
    }
    linear = [spec for spec in mixer_specs().values() if spec.layer_type == LINEAR]
    for option in MixerConfig.__dataclass_fields__:
        assert found.pop(option) == {spec.name for spec in linear if option in spec.options}
    assert not found


def test_the_default_is_named() -> None:
    assert f"`{default_mixer(LINEAR)}`, the default" in PAGE


def test_a_further_mixer_has_as_few_lines_as_the_page_says() -> None:
    package = ROOT / "mmmamba_cli"
    mixer = [package / room / "mixers" / "gla.py" for room in ("architecture", "model")]
    op = [*(package / "ops" / "gla").glob("*.py"), ROOT / "tests" / "ops" / "test_gla.py"]
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in (*mixer, *op)}
    said = re.search(
        r"`gla` has fewer than (\d+) lines in steps 2 and 3, and fewer than (\d+)", PAGE
    )
    assert said is not None
    assert sum(lines[file] for file in mixer) < int(said[1])
    assert sum(lines.values()) < int(said[2])
