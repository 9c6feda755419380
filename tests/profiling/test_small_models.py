"""Real small models: the gate, caches filled instead of computed, weights held once, files."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small import small_model
from stand_ins import Bench, StandIn, subject_of
from torch import Tensor

from mmmamba_cli.checkpoint import Checkpoint
from mmmamba_cli.errors import DataError, RunError
from mmmamba_cli.profiling import (
    Plan,
    Profile,
    profile,
    random_subjects,
    read_profile,
    run_subjects,
    weight_store,
    write_profile,
)
from mmmamba_cli.profiling.eager_decoder import EagerDecoder, expected_cache_bytes
from mmmamba_cli.profiling.interfaces import AS_SHIPPED, GROWING, STATIC, TUNED
from mmmamba_cli.profiling.plot import make_figure, render_plot
from mmmamba_cli.profiling.report import format_memory, format_ms, remarks, tables

PLAN = Plan(contexts=(32, 64), repeats=2, rounds=2, warm_up=1)
NTK = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}


@pytest.fixture(scope="module")
def found() -> Profile:
    """The small architecture, as it is profiled."""
    return profile(random_subjects(weight_store("cpu"), "hovle-8m"), PLAN)


@pytest.fixture
def planted() -> Profile:
    """Times and memory of stand-ins, the teacher as shipped too large for the longest context."""
    bench = Bench()
    shipped = StandIn("shipped", bench, lambda n: 0.02 * n, too_long=4000, weight_bytes=17666)
    tuned = StandIn("tuned", bench, lambda n: 0.005 * n, weight_bytes=5000)
    student = StandIn("student", bench, lambda n: 1.0, weight_bytes=5000)
    subjects = [subject_of(shipped, AS_SHIPPED, (0,), GROWING), subject_of(tuned, TUNED, (0,))]
    plan = Plan(contexts=(1024, 2048, 4096), repeats=3, rounds=3, roofline=False, gpu_metrics=False)
    return profile([*subjects, subject_of(student)], plan, timer=bench)


def test_all_numbers_are_there_and_positive(found: Profile) -> None:
    names = [AS_SHIPPED, TUNED, "linear", "hybrid-2"]
    assert [one.name for one in found.subjects] == names
    assert len(found.measurements) == len(names) * 2 * 2
    for one in found.measurements:
        assert one.status == "measured"
        assert [len(part) for part in one.rounds] == [5 if one.task == "prefill" else 1] * 2
        assert all(seconds > 0 for seconds in one.repeats)
        assert one.memory is not None
        assert one.memory.weights > 2**20
        assert one.memory.peak is None
    assert found.gate.green
    assert set(found.gate.distances) == set(names)
    assert all(0 < max(ways.values()) < 1e-4 for ways in found.gate.distances.values())
    assert len(found.ratios) == 2 * 2 * 2 * 2
    assert found.device.type == "cpu"
    assert found.dtype == "float32"
    assert set(found.versions) >= {"mmmamba", "torch", "transformers", "python"}


def test_a_cache_costs_what_its_layers_do(found: Profile) -> None:
    def cache(name: str, context: int) -> int:
        one = found.find(name, "decode", context)
        assert one is not None
        assert one.memory is not None
        return one.memory.cache

    # 8 layers, keys and values, 2 heads of 64, fp32; one warm-up and one timed token on top. The
    # tuned teacher makes room 256 columns at a time.
    assert cache(AS_SHIPPED, 32) == 8 * 2 * 2 * 64 * 4 * 34
    assert cache(TUNED, 32) == cache(TUNED, 64) == 8 * 2 * 2 * 64 * 4 * 256
    # Conv inputs of 512 channels: one as a prompt leaves it, and two in a ring.
    assert cache("linear", 32) == cache("linear", 64) == 8 * (4 * 64 * 64 + 3 * 512) * 4
    assert cache("hybrid-2", 64) == 2 * cache(TUNED, 64) // 8 + 6 * cache("linear", 64) // 8
    parts = {one.name: one for one in found.subjects}
    assert parts[AS_SHIPPED].weight_bytes == parts[TUNED].weight_bytes


@pytest.mark.parametrize("kind", [GROWING, STATIC])
@pytest.mark.parametrize("plan", ["aaaa", "mmmm", "amam"])
@pytest.mark.parametrize("options", [{}, NTK])
def test_a_filled_cache_is_one_that_was_read_but_for_its_contents(
    kind: str, plan: str, options: dict[str, Any]
) -> None:
    decoder = EagerDecoder(small_model(plan, **options), kind)
    rng = torch.Generator().manual_seed(0)

    def seen(fill: bool) -> tuple[Any, ...]:
        decoder.start(2, 40)
        if fill:
            decoder.fill_random(2, 30, rng)
        else:
            decoder.prefill(decoder.random_prompt(2, 30, rng))
        cache = decoder.cache
        assert cache is not None
        held = [
            (name, tuple(value.shape), value.dtype)
            for layer in cache.layers
            for name, value in sorted(vars(layer).items())
            if isinstance(value, Tensor)
        ]
        state = cache.decoding_state
        lengths = (state.embedding.length, state.language.length, decoder.cache_bytes)
        frequencies = (state.embedding.inv_freq, state.language.inv_freq)
        logits = decoder.step(decoder.random_prompt(2, 1, rng))
        assert logits.isfinite().all()
        assert (cache.decoding_state.language.length, logits.shape[0]) == (31, 2)
        return held, lengths, frequencies

    held, lengths, frequencies = seen(fill=True)
    held_read, lengths_read, frequencies_read = seen(fill=False)
    assert (held, lengths) == (held_read, lengths_read)
    for ours, theirs in zip(frequencies, frequencies_read, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_growing_cache_is_copied_with_every_token_and_a_static_one_is_not() -> None:
    for kind, lengths, moves in ((GROWING, (30, 31), True), (STATIC, (40, 40), False)):
        decoder = EagerDecoder(small_model("aaaa"), kind)
        rng = torch.Generator().manual_seed(0)
        decoder.start(1, 40)
        decoder.fill_random(1, 30, rng)
        assert decoder.cache is not None
        before = decoder.cache.layers[0].keys
        decoder.step(decoder.random_prompt(1, 1, rng))
        after = decoder.cache.layers[0].keys
        assert (before.shape[2], after.shape[2]) == lengths
        assert (before.data_ptr() != after.data_ptr()) is moves


def test_the_size_that_is_asked_for_is_the_size_that_is_taken() -> None:
    decoder = EagerDecoder(small_model("amam"), STATIC)
    decoder.start(3, 50)
    decoder.fill_random(3, 50, torch.Generator().manual_seed(0))
    conv_states = 2 * 3 * 64 * 4
    expected = expected_cache_bytes(decoder.model.config, 3, 50, torch.float32) + conv_states
    assert decoder.cache_bytes == expected


def test_noise_that_is_repeated_has_the_length_asked_for() -> None:
    decoder = EagerDecoder(small_model("aa"), GROWING)
    decoder.start(1, 2500)
    decoder.fill_random(1, 2500, torch.Generator().manual_seed(0))
    assert decoder.cache is not None
    keys = decoder.cache.layers[0].keys
    assert keys.shape == (1, 2, 2500, 8)
    torch.testing.assert_close(keys[:, :, :1024], keys[:, :, 1024:2048], rtol=0, atol=0)
    assert keys[:, :, :1024].std() == pytest.approx(1, abs=0.05)


def test_chunks_are_as_asked_for_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("mmmm")
    decoder = EagerDecoder(model, STATIC)
    ids = decoder.random_prompt(1, 30, torch.Generator().manual_seed(0))
    chunks = []
    forward = model.forward

    def watched(*args: Any, **options: Any) -> Any:
        chunks.append(options["prefill_chunk_size"])
        return forward(*args, **options)

    monkeypatch.setattr(model, "forward", watched)
    logits = []
    for chunk in (None, 8):
        decoder.start(1, 30)
        logits.append(decoder.prefill(ids, chunk))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    assert chunks == [None, 8]
    monkeypatch.setattr("mmmamba_cli.profiling.eager_decoder.PREFILL_CHUNK", 16)
    decoder.start(1, 30)
    decoder.prefill(ids)
    assert chunks[-1] == 16


def test_what_models_share_is_held_once() -> None:
    store = weight_store("cpu")
    shipped, tuned, linear, _ = (
        subject.build() for subject in random_subjects(store, "hovle-8m", seed=1)
    )
    ours, theirs = (dict(one.model.named_parameters()) for one in (linear, shipped))  # type: ignore[attr-defined]
    shared = {name for name, value in ours.items() if theirs.get(name) is value}
    assert shared == {name for name in ours if name in theirs}
    assert {"lm_head.weight", "model.layers.3.mixer.q_proj.weight"} <= shared
    assert tuned.weight_bytes == shipped.weight_bytes < linear.weight_bytes
    again = random_subjects(weight_store("cpu"), "hovle-8m", seed=1)[0].build()
    torch.testing.assert_close(
        again.model.lm_head.weight,  # type: ignore[attr-defined]
        theirs["lm_head.weight"],
        rtol=0,
        atol=0,
    )


def test_weights_that_no_model_has_are_let_go() -> None:
    store = weight_store("cpu")
    subject = random_subjects(store, "hovle-8m")[0]
    decoder = subject.build()
    assert len(store._parameters) > 50
    del decoder
    assert len(store._parameters) == 0


def test_a_checkpoint_is_read_once_for_both_baselines(
    profiled_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = Checkpoint.read

    def counted(self: Checkpoint, name: str) -> Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "read", counted)
    subjects = run_subjects(weight_store("cpu"), profiled_run)[:2]
    held = [subject.build() for subject in subjects]
    assert len(held) == 2
    assert len(read) == len(set(read)) > 50


def test_products_share_what_is_equal_in_their_files(profiled_run: Path) -> None:
    store = weight_store("cpu")
    subjects = run_subjects(store, profiled_run)
    assert [one.name for one in subjects] == [AS_SHIPPED, TUNED, "seed", "hybrid-2"]
    teacher, _, linear, hybrid = (subject.build() for subject in subjects)
    models = [one.model for one in (teacher, linear, hybrid)]  # type: ignore[attr-defined]
    assert len({id(model.lm_head.weight) for model in models}) == 1
    assert not any(name.startswith("unused") for name, _ in models[0].named_parameters())
    gates = [model.model.layers[1].mixer.g_proj.weight for model in models[1:]]
    assert gates[0] is gates[1]


def test_a_profile_is_what_its_file_says(found: Profile, tmp_path: Path) -> None:
    files = write_profile(found, tmp_path / "a" / "b")
    assert [file.name for file in files] == ["profile.json", "profile.png", "profile.svg"]
    assert read_profile(files[0]) == found
    raw = json.loads(files[0].read_text())
    assert raw["format"] == 2
    assert len(raw["measurements"][0]["rounds"]) == 2
    (tmp_path / "later.json").write_text(json.dumps({**raw, "format": 3}))
    with pytest.raises(RunError, match="has format 3, this version knows 1 and 2"):
        read_profile(tmp_path / "later.json")
    (tmp_path / "more.json").write_text(json.dumps({**raw, "colour": "red"}))
    with pytest.raises(RunError, match="is damaged: colour"):
        read_profile(tmp_path / "more.json")
    with pytest.raises(RunError, match="run mmmamba profile first"):
        read_profile(tmp_path / "none.json")


def test_the_picture_is_one(planted: Profile) -> None:
    drawn = render_plot(planted)
    assert drawn is not None
    image = Image.open(io.BytesIO(drawn))
    assert image.format == "PNG"
    assert image.size[0] > 1500
    assert planted.compared in image.info["Description"]
    colours = {colour for _, colour in image.convert("RGB").getcolors(2**24) or []}
    # The student's blue, both greys of the teacher, and paper.
    assert {(0, 0x72, 0xB2), (0x22,) * 3, (0x77,) * 3, (255,) * 3} <= colours


def test_the_picture_shows_every_number_on_logarithmic_axes(planted: Profile) -> None:
    latency, memory, prefill = make_figure(planted).axes
    for axes, unit in ((latency, "milliseconds"), (memory, "MiB"), (prefill, "seconds")):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("context, tokens", unit)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4K", "2K", "1K"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in latency.get_lines()}
    shipped = [planted.find("shipped", "decode", n) for n in (1024, 2048)]
    assert lines["shipped"] == [
        [one.context, pytest.approx(1000 * (one.median or 0))] for one in shipped if one
    ]
    colours = {line.get_label(): line.get_color() for line in latency.get_lines()}
    assert len({colours[name] for name in ("shipped", "tuned", "student")}) == 3
    assert lines["student"] == [[n, 1000.0] for n in (1024, 2048, 4096)]
    assert "shipped:\nout of memory" in [text.get_text() for text in latency.texts]


def test_tables_for_people(planted: Profile) -> None:
    shown = {title.partition(":")[0]: (heading, rows) for title, heading, rows in tables(planted)}
    heading, rows = shown["next token, ms"]
    assert heading == ("context", "shipped", "tuned", "student")
    assert rows[0][0] == "1,024"
    assert rows[0][3] == "1,000 ± 0"
    assert rows[2][1] == "out of memory"
    heading, rows = shown["next token"]
    assert heading[1:] == ("student / as shipped", "student / tuned")
    assert shown["memory while decoding, against the teacher"][1][0][1:] == ("-45%", "+0%")
    # 1024 columns and those of the warm-up: 0.02 s a column against 1 s.
    assert rows[0][1:] == ("20.5x", "5.12x")
    assert rows[2][1:] == (None, "20.5x")
    assert "student (0 of 8 layers attention), against the teacher as" in planted.compared
    assert any(line.startswith("shipped (next token at 4,096): out") for line in remarks(planted))


def test_without_matplotlib_no_picture_remains(
    planted: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(write_profile(planted, tmp_path)) == 3
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert write_profile(planted, tmp_path) == [tmp_path / "profile.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["profile.json"]


def test_a_single_repeat_has_no_spread() -> None:
    bench = Bench()
    plan = Plan(contexts=(10,), repeats=1, rounds=1, roofline=False, gpu_metrics=False)
    found = profile([subject_of(StandIn("one", bench))], plan, timer=bench)
    assert tables(found)[0][2] == [("10", "1,000 (once)")]
    assert "against no teacher" in found.compared
    assert found.ratios == ()


def test_noise_is_said_once() -> None:
    bench = Bench()
    # The gate's four tokens come first.
    costs = iter([1.0] * 4 + [1.0, 1.0, 3.0, 3.0, *[1.0, 1.2, 1.0, 1.2] * 2])
    plan = Plan(
        contexts=(10, 20, 30),
        repeats=4,
        rounds=1,
        warm_up=0,
        prefill=False,
        roofline=False,
        gpu_metrics=False,
    )
    shaky = StandIn("shaky", bench, lambda context: next(costs))
    said = remarks(profile([subject_of(shaky)], plan, timer=bench))
    assert len(said) == 1
    assert said[0].startswith(
        "noisy, the quartiles more than 25% of the median apart, are 1 of 3: "
    )
    assert "are 1 of 3: shaky (next token at 10); let nothing" in said[0]


def test_numbers_for_people() -> None:
    shown = [format_ms(seconds) for seconds in (1.2345, 0.012345, 0.0012345, 0.00012345)]
    assert shown == ["1,234", "12.3", "1.23", "0.123"]
    assert (format_memory(3 * 2**20), format_memory(1536 * 2**20)) == ("3.0 MiB", "1.50 GiB")


def test_an_architecture_that_is_not_known() -> None:
    with pytest.raises(DataError, match=r"give hovle-2\.6b or hovle-8m; did you mean hovle-2\.6b"):
        random_subjects(weight_store("cpu"), "hovle-26b")
