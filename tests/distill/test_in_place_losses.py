"""Layer losses by hooks on transformers' models equal plain transcriptions of their equations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES
from in_place_distillation import gradients, make_batch, make_objective, make_stage
from torch import Tensor

from mmmamba_cli.data import ModelBatch
from mmmamba_cli.distill.in_place_pair import InPlacePair
from mmmamba_cli.model.mixers import mamba2
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.teachers.anatomy import text_decoder

FAMILIES_WITH_PICTURES = ("qwen3_vl", "internvl", "smolvlm")


def record(pair: InPlacePair, batch: ModelBatch) -> list[dict[str, Any]]:
    """Inputs and outputs of each layer of the teacher, by one run with eager attention."""
    decoder, found = text_decoder(pair.teacher), []
    pair.teacher.set_attn_implementation("eager")
    handles = []
    for layer in decoder.layers:
        values: dict[str, Any] = {}
        found.append(values)

        def enter(_: Any, args: Any, kwargs: Any, values: Any = values) -> None:
            values["hidden"] = args[0] if args else kwargs["hidden_states"]

        def attend(_: Any, args: Any, kwargs: Any, out: Any, values: Any = values) -> None:
            values["normed"] = kwargs["hidden_states"]
            values["matrix"] = out[1]

        def project(_: Any, args: Any, values: Any = values) -> None:
            values["mixed"] = args[0]

        def leave(_: Any, args: Any, out: Any, values: Any = values) -> None:
            values["output"] = out[0] if isinstance(out, tuple) else out

        handles += [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.self_attn.register_forward_hook(attend, with_kwargs=True),
            layer.self_attn.o_proj.register_forward_pre_hook(project),
            layer.register_forward_hook(leave),
        ]
    with torch.no_grad():
        pair.teacher(**batch.inputs)
    for handle in handles:
        handle.remove()
    return found


def transcribed(pair: InPlacePair, batch: ModelBatch, loss: str) -> Any:
    """The loss and gradients with one graph over all layers, as mean over tokens and layers."""
    for parameter in pair.trainable_parameters().values():
        parameter.grad = None
    mask = batch.inputs["attention_mask"].bool()
    total: Tensor = torch.zeros((), dtype=torch.float64)
    linear = (0, 2)
    for index, layer in enumerate(record(pair, batch)):
        if index not in linear:
            continue
        student = text_decoder(pair.student).layers[index]
        mixer = student.self_attn
        empty = layer["normed"].new_empty(1, mask.shape[1], 0)
        columns = SequenceLayout(empty, empty, 0, mask, None, mask)
        if loss == "mixer-mse":
            errors = mixer.mix(layer["normed"], columns) - layer["mixed"]
        elif loss == "hidden-alignment":
            hidden = layer["hidden"] + mixer.o_proj(mixer.mix(layer["normed"], columns))
            normed = student.post_attention_layernorm(hidden)
            errors = hidden + student.mlp(normed) - layer["output"]
        else:
            rows = mixer.mixing_matrix(layer["normed"], columns) - layer["matrix"]
            errors = rows.square().sum(-1).transpose(1, 2).sqrt()
        total = total + errors[mask].square().mean() / len(linear)
    total.backward()
    return float(total.detach()), {n: p.grad for n, p in pair.trainable_parameters().items()}


@pytest.mark.parametrize("loss", ["mixer-mse", "hidden-alignment", "matrix-orientation"])
@pytest.mark.parametrize("name", FAMILIES_WITH_PICTURES)
def test_gradients_equal_a_transcription(name: str, loss: str) -> None:
    assert FAMILIES[name].pictures
    objective, pair = make_objective(name, make_stage(loss, loss_scale=1.0))
    batch = make_batch(name)
    value, found = gradients(objective, pair, [batch])
    expected, plain = transcribed(pair, batch, loss)
    assert value == pytest.approx(expected, rel=1e-6)
    for key, gradient in plain.items():
        distance = (found[key] - gradient).norm() / gradient.norm()
        assert distance < 1e-5, (key, float(distance))


def test_the_scan_of_bf16_has_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of q and k that learn are fp32 masters; a scan of fp32 inputs takes much longer."""
    stage = make_stage("mixer-mse", "new+qkv")
    objective, pair = make_objective("qwen3_vl", stage, dtype=torch.bfloat16)
    masters = pair.trainable_parameters()
    assert any("q_norm" in name for name in masters)
    for parameter in masters.values():
        parameter.data = parameter.data.float()
    found: set[tuple[torch.dtype, ...]] = set()
    scan = mamba2.ssd

    def watched(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Any:
        found.add((x.dtype, B.dtype, C.dtype))
        return scan(x, dt, A, B, C, **options)

    monkeypatch.setattr(mamba2, "ssd", watched)
    batch = make_batch("qwen3_vl", dtype=torch.float32)
    gradients(objective, replace(pair, precision="bf16"), [batch])
    assert found == {(torch.bfloat16,) * 3}
