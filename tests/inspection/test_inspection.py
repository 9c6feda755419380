"""Summary, memory, differences and text plots, compared with real models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import small_model
from small_language_models import write

from mmmamba_cli.architecture import Architecture
from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.checkpoint.tensor_info import torch_dtype
from mmmamba_cli.errors import DataError
from mmmamba_cli.inspection import (
    all_attention,
    compare,
    describe,
    format_bytes,
    format_ranges,
    group_by_layer,
    layer_plan,
    marks_for,
    memory_at,
    sparkline,
)
from mmmamba_cli.inspection.diff import compare_tensors
from mmmamba_cli.inspection.summary import ATTENTION_PART, LINEAR_PART
from mmmamba_cli.inspection.text_plots import ASCII, UNICODE
from mmmamba_cli.model import HolisticVLM, new_cache


def cache_bytes(model: HolisticVLM, length: int) -> tuple[int, int, int]:
    """Bytes of keys and values, conv states and SSM states after `length` tokens."""
    cache = new_cache(model.config)
    with torch.no_grad():
        model(torch.full((1, length), 9), past_key_values=cache)
    kv = conv = ssm = 0
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            kv += layer.keys.nbytes + layer.values.nbytes
        if hasattr(layer, "conv_states"):
            conv += layer.conv_states[0].nbytes
            ssm += layer.recurrent_states[0].nbytes
    return kv, conv, ssm


@pytest.mark.parametrize("element", ["float32", "bfloat16"])
def test_memory_equals_that_of_a_real_cache(element: str) -> None:
    for plan in ("amma", "dakg", "mmmm", "aaaa"):
        model = small_model(plan).to(torch_dtype(element))
        found = memory_at("it", model.config, 37, element)
        assert (found.kv_cache, found.conv_state, found.ssm_state) == cache_bytes(model, 37)
        assert found.attention_layers == plan.count("a")
        assert found.total == found.weights + found.state
        assert [bool(layer.kv_cache) for layer in found.layers] == [one == "a" for one in plan]
    linear = Architecture.from_config(small_model("dmkm").config)
    teacher = memory_at("teacher", all_attention(linear), 37, element)
    assert teacher.kv_cache == cache_bytes(model, 37)[0]
    assert (teacher.linear_layers, teacher.ssm_state) == (0, 0)


def test_weight_bytes_equal_those_of_a_loaded_model(tmp_path: Path) -> None:
    model = small_model("mamm")
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    loaded = HolisticVLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    bytes_of = {id(p): p.nbytes for p in loaded.parameters()}
    found = memory_at("it", checkpoint.architecture, 1, "bfloat16")
    assert found.weights == sum(bytes_of.values())
    with pytest.raises(DataError, match="--context is 0"):
        memory_at("it", checkpoint.architecture, 0, "bfloat16")


def test_every_parameter_is_counted_once(tmp_path: Path) -> None:
    model = small_model("amma")
    model.save_pretrained(tmp_path)
    found = describe(open_checkpoint(tmp_path))
    parts = {part.name: part for part in found.parts}
    assert found.parameters == sum(p.numel() for p in model.parameters())
    mixers = [block.mixer for block in model.model.blocks]
    counts = [sum(p.numel() for p in mixer.parameters()) for mixer in mixers]
    assert parts[ATTENTION_PART].parameters == counts[0] + counts[3]
    assert parts[ATTENTION_PART].layers == 2
    assert parts[LINEAR_PART].parameters == sum(counts) - counts[0] - counts[3]
    assert [s.name for s in found.stacks] == ["embedding", "language"]
    assert found.stacks[0].num_layers + found.stacks[1].num_layers == len(mixers)
    assert [i for s in found.stacks for i in s.attention_layers] == [0, 3]
    assert found.kind == "hybrid (2 attention)"
    assert sum(tensors for tensors, _ in found.dtypes.values()) == sum(
        p.tensors for p in found.parts
    )
    assert sum(p.nbytes for p in found.parts) == sum(b for _, b in found.dtypes.values())


def test_mixers_and_their_layers(tmp_path: Path) -> None:
    small_model("kdam", qk_norm=True).save_pretrained(tmp_path)
    found = describe(open_checkpoint(tmp_path))
    assert [(m.name, m.layers, m.is_default, m.is_packed) for m in found.mixers] == [
        ("kda", (0,), False, False),
        ("gated_delta", (1,), False, True),
        ("attention", (2,), True, True),
        ("mamba2", (3,), True, True),
    ]
    assert found.mixer["qk_norm"] is True and "window" not in found.mixer


def test_describe_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "Llama", {})
    checkpoint = open_checkpoint(tmp_path)

    def read(self: object, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(type(checkpoint.source), "read", read)
    found = describe(checkpoint)
    assert (found.layout, found.kind, found.vision) == (
        "language model (llama)",
        "all attention",
        None,
    )


def changed(folder: Path, into: Path, **edits: torch.Tensor | None) -> Path:
    """A copy of a folder with some tensors (dots as __) replaced."""
    state = load_file(folder / "model.safetensors")
    state |= {name.replace("__", "."): t for name, t in edits.items() if t is not None}
    into.mkdir()
    (into / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, into / "model.safetensors")
    return into


def test_a_changed_tensor_is_found_and_measured(tmp_path: Path) -> None:
    write(tmp_path / "a", "Llama", {})
    norm = load_file(tmp_path / "a/model.safetensors")["model.norm.weight"]
    other = norm.clone()
    other[3] += 0.5
    b = changed(tmp_path / "a", tmp_path / "b", model__norm__weight=other)
    done: list[int] = []
    found = compare(open_checkpoint(tmp_path / "a"), open_checkpoint(b), done.append)
    assert sum(done) == len(found)
    assert [one.name for one in found if one.status != "equal"] == ["model.norm.weight"]
    (row,) = [row for row in group_by_layer(found) if row.status != "equal"]
    assert row.largest == pytest.approx(0.5)
    assert row.relative == pytest.approx(0.5 / float(other.norm()))


def test_tensors_of_other_layer_types_are_only_on_one_side(tmp_path: Path) -> None:
    for name, plan in (("hybrid", "amma"), ("linear", "mmmm")):
        small_model(plan).save_pretrained(tmp_path / name)
    here, there = (open_checkpoint(tmp_path / name) for name in ("hybrid", "linear"))
    only = {g.name: g for g in group_by_layer(compare(here, there)) if g.status == "only there"}
    assert only["model.layers.*.mixer.A_log"].layers == (0, 3)
    back = {g.name: g for g in group_by_layer(compare(there, here)) if g.status == "only here"}
    assert set(back) == set(only)


def test_another_dtype_is_rounding() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert compare_tensors("x", x, x.double()).status == "equal"
    rounded = compare_tensors("x", x, x.bfloat16())
    assert (rounded.status, rounded.note) == ("rounded", "in bfloat16")
    assert rounded.relative is not None and 0 < rounded.relative < 2**-8
    assert compare_tensors("x", x, (1.1 * x).bfloat16()).status == "changed"
    assert compare_tensors("x", x, torch.zeros(64)).relative == math.inf
    strange = x.clone()
    strange[5] = math.nan
    assert math.isnan(compare_tensors("x", strange, strange).largest or 0)


def test_long_tensors_are_compared_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmmamba_cli.inspection.diff.COMPARE_ELEMENTS", 10)
    x = torch.zeros(3, 9)
    y = x.clone()
    y[0, 0], y[2, 8] = 3, 4
    found = compare_tensors("x", x.T, y.T)
    assert (found.largest, found.relative) == (4, 1)
    # Changed at its beginning, rounded at its end.
    z = torch.full((27,), 0.1)
    w = z.bfloat16()
    w[0] = 9
    assert compare_tensors("x", z, w).status == "changed"


def test_format_ranges() -> None:
    assert format_ranges([0, 1, 2, 6, 4]) == "0-2, 4, 6"
    assert format_ranges([]) == ""


def test_layer_plans_use_marks_of_the_encoding() -> None:
    assert layer_plan(8, {0, 5}, UNICODE, embedding=2) == "■·│···■··"
    assert layer_plan(4, {3}, ASCII) == "...#"
    assert marks_for("utf-8") == UNICODE
    assert marks_for("ascii") == marks_for("latin-1") == marks_for(None) == ASCII
    assert marks_for("no such encoding") == ASCII


def test_sparklines_go_from_low_to_high() -> None:
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([5, 5]) == "▁▁"
    assert sparkline([1, math.nan, 2]) == "▁×█"
    assert sparkline([math.inf]) == "×"
    assert sparkline([]) == ""


@given(st.lists(st.floats(), max_size=60), st.integers(2, 30))
def test_sparklines_take_any_numbers(values: list[float], width: int) -> None:
    assert len(sparkline(values, width=width)) == min(width, len(values))


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 1.5 * 2**20, 3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "3.00 GiB",
    ]
