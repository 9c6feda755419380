"""Micro batches of transformers' models are queued with few waits for the device.

Those that are left are in transformers, named here and in docs/teachers.md, and their number
depends neither on the layers nor on the pictures.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES
from in_place_distillation import make_batch, make_objective, make_stage
from recorded_device import DEVICE, move_models, moved_batch, recorded_device

from mmmamba_cli.data import ModelBatch
from mmmamba_cli.data.model_batch import pack_conversations
from mmmamba_cli.distill.in_place_pair import InPlacePair, share_equal_parameters

# Whether there are as many features as image tokens.
COUNTS_FEATURES = {"torch_compilable_check": 1}
# Whether there is padding, and again whether there is any behind the queries.
READS_PADDING = {"_ignore_causal_mask_sdpa": 2}
READS_NO_PADDING = {"_ignore_causal_mask_sdpa": 1}
READS_PACKING = {"find_packed_sequence_indices": 1}
# SmolVLM: pictures that are no padding, their masks and their number; the mask of the tower.
SELECTS_PICTURES = {"get_image_features": 3, "_ignore_bidirectional_mask_sdpa": 1}


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has no autocast."""
    monkeypatch.setattr(InPlacePair, "autocast", lambda *_, **__: nullcontext())


def waits_of(name: str, loss: str, batch: ModelBatch) -> Counter[str]:
    """The waits of a micro batch."""
    weights = {} if loss == "kl" else {"loss_weights": "density"}
    objective, pair = make_objective(name, make_stage(loss, **weights), dtype=torch.float32)
    share_equal_parameters(pair, pair.trainable)
    pair.student.train()
    pair.checkpoint_layers(len(pair.checkpointable_layers))
    units = objective.count_units(pair, batch)
    with recorded_device() as recorder:
        move_models(pair.teacher, pair.student)
        sums = objective.loss_sums(pair, moved_batch(batch), objective.term_weights(units))
    assert sums.device == DEVICE and bool(sums.values.isfinite().all())
    assert all(one.grad is not None for one in pair.trainable_parameters().values())
    return recorder.waits


def batches(name: str) -> dict[str, ModelBatch]:
    """Rows of unequal length, one row, and both in one packed row."""
    both = make_batch(name, dtype=torch.float32)
    packed = pack_conversations(both, [[0, 1]], FAMILIES[name].tokenizer.pad_token_id)
    one = make_batch(name, dtype=torch.float32, rows=(0,))
    return {"padded": both, "single": one, "packed": packed}


# Waits of a forward pass of each model, and those of the tower, which runs once for both.
CASES: list[tuple[str, str, dict[str, int], dict[str, int]]] = [
    ("qwen3_vl", "single", COUNTS_FEATURES, {}),
    ("qwen3_vl", "padded", COUNTS_FEATURES | READS_PADDING, {}),
    ("qwen3_vl", "packed", COUNTS_FEATURES | READS_PACKING, {}),
    ("qwen2_5_vl", "single", COUNTS_FEATURES, {}),
    ("internvl", "single", COUNTS_FEATURES | READS_NO_PADDING, {}),
    ("smolvlm", "single", COUNTS_FEATURES | READS_NO_PADDING, SELECTS_PICTURES),
]


@pytest.mark.parametrize("loss", ["mixer-mse", "kl"])
@pytest.mark.parametrize(("name", "rows", "passed", "tower"), CASES)
def test_the_waits_of_a_micro_batch_are_known(
    name: str, rows: str, passed: dict[str, int], tower: dict[str, int], loss: str
) -> None:
    models = 2 if loss == "kl" else 1
    expected = Counter({where: models * number for where, number in passed.items()})
    assert waits_of(name, loss, batches(name)[rows]) == expected + Counter(tower)
