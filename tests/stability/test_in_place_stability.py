"""Stability of students in place: the numbers of the same student of class HolisticVLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, LAYERS, save_teacher
from family_students import HYBRID, student
from torch import nn
from typer.testing import CliRunner

from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.runs import Run, resolve_product
from mmmamba_cli.stability import StabilityOptions, StabilityRecord, measure_stability
from mmmamba_cli.stability.decay_spectrum import (
    DecayObserver,
    certified_exponents,
    observed_mixers,
)
from mmmamba_cli.stability.layer_records import layer_records
from mmmamba_cli.stability.measurement import load_any
from mmmamba_cli.stability.model_layers import TextPass, decaying_layers, input_gain
from mmmamba_cli.teachers import StudentPlan, convert

TOKENS = 192


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same teacher as a student of both kinds, with attention in layer 0."""
    folder = tmp_path_factory.mktemp("stability")
    save_teacher(FAMILIES["qwen3"], folder / "teacher")
    for name, options in (("in-place", ["--in-place"]), ("holistic", [])):
        words = ("--run", folder / name, "--dtype", "fp32", "--no-report")
        mmmamba("seed", folder / "teacher", *words, *options)
        mmmamba("hybridize", "--run", folder / name, "--layers", "0")
    return folder


def measured(run: Path, **options: Any) -> StabilityRecord:
    ids = [(7 * i) % 60 + 3 for i in range(TOKENS)]
    given = StabilityOptions(device="cpu", **options)
    return measure_stability(resolve_product(Run(run)), ids, "numbers", given)


def test_decays_are_those_of_the_other_class(runs: Path) -> None:
    """With the same weights: decays, certificates, and logits over the ends of chunks."""
    opened = [resolve_product(Run(runs / name)) for name in ("in-place", "holistic")]
    mine, theirs = (load_any(one, torch.device("cpu"), torch.float32) for one in opened)
    with torch.no_grad():
        for layer, mixer in decaying_layers(theirs).items():
            # The seeded decays do not depend on the input.
            mixer.dt_proj.weight.normal_()  # type: ignore[union-attr,operator]
            decaying_layers(mine)[layer].load_state_dict(mixer.state_dict())
    found = []
    ids = torch.tensor([[(7 * i) % 60 + 3 for i in range(TOKENS)]])
    for model in (mine, theirs):
        observer, text = DecayObserver(model), TextPass(model, TOKENS)
        with torch.inference_mode(), observed_mixers(model, observer.on_call, observer.on_read_out):
            logits = torch.cat([text.logits(chunk) for chunk in ids.split(80, dim=1)])
        found.append((logits, layer_records(model, observer.totals, {})))
    (logits, layers), (expected, expected_layers) = found
    assert torch.allclose(logits, expected, atol=1e-5)
    assert layers[0] == expected_layers[0] and not layers[0].heads
    assert [layer.mixer for layer in layers[1:]] == ["Mamba-2"] * (len(layers) - 1)
    for here, there in zip(layers[1:], expected_layers[1:], strict=True):
        for one, other in zip(here.heads, there.heads, strict=True):
            assert one.start is None
            numbers, others = (head.model_dump(exclude={"start"}) for head in (one, other))
            assert numbers == pytest.approx(others, rel=1e-3)
            assert one.exponent <= one.certified < 0


def test_precision_over_the_length(runs: Path) -> None:
    found = measured(runs / "in-place", perturb=0)
    assert found.precision is not None and found.not_measured == ()
    assert found.precision.spans[-1].end == TOKENS
    assert 0 < found.precision.median_kl < 1e-2


def test_what_is_left_out_is_said(runs: Path) -> None:
    found = measured(runs / "in-place", tangents=2)
    assert found.not_measured == (
        "deviations after a disturbance: not for models of transformers",
        "exponents by tangents: not for models of transformers",
    )
    assert found.deviations == () and found.tangents is None
    with pytest.raises(DataError, match="--against-dtype is int8, which models of transformers"):
        measured(runs / "in-place", against_dtype="int8")


def test_the_command(runs: Path) -> None:
    result = mmmamba("inspect", "--run", runs / "in-place", "--stability", "--tokens", "128")
    assert result.exit_code == 0, result.output
    assert "stability over 128 tokens of the installed text" in result.stdout
    assert "deviations after a disturbance: not for models of transformers" in result.stdout
    assert list((runs / "in-place" / "stability").glob("*/stability.json"))


@pytest.mark.parametrize(("family", "offset"), [("qwen3", 0.0), ("gemma3", 1.0)])
def test_certificates_bound_the_decays_of_random_weights(family: str, offset: float) -> None:
    """Gemma stores the gain of a norm as its difference from 1."""
    model = student(family, "hybrid mamba2")
    for layer in HYBRID:
        weight = model.get_decoder().layers[layer].input_layernorm.weight
        assert torch.allclose(input_gain(model, layer), weight + offset, rtol=1e-6)
    observer, text = DecayObserver(model), TextPass(model, 64)
    ids = torch.arange(64)[None] % 50
    with torch.inference_mode(), observed_mixers(model, observer.on_call):
        logits = torch.cat([text.logits(chunk) for chunk in ids.split(24, dim=1)])
    with torch.inference_mode():
        assert torch.allclose(logits, model(input_ids=ids).logits[0])
    assert sorted(observer.totals) == list(HYBRID)
    for layer, totals in observer.totals.items():
        assert totals.tokens == 64 and not bool(totals.is_constant.any())
        assert totals.largest is not None
        assert bool((totals.largest <= certified_exponents(model, layer)).all())


def test_another_norm_is_refused() -> None:
    model = convert(FAMILIES["llama"].model(), StudentPlan.of_layers(LAYERS))
    size = model.config.hidden_size
    model.get_decoder().layers[2].input_layernorm = nn.LayerNorm(size)
    with pytest.raises(MmmambaError, match=r"layer 2 of a .*Llama.* has no RMSNorm before its mix"):
        input_gain(model, 2)
