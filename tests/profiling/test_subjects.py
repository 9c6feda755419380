"""Subjects share their weights; int8 copies and decoders of each role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmmamba_cli.checkpoint import Checkpoint
from mmmamba_cli.errors import DataError
from mmmamba_cli.profiling import int8_subjects, random_subjects, run_subjects, weight_store
from mmmamba_cli.profiling.correctness import check_decoder
from mmmamba_cli.profiling.eager_decoder import EagerDecoder
from mmmamba_cli.profiling.interfaces import AS_SHIPPED, STATIC_TEACHER, STUDENT, TUNED


def test_shared_tensors_are_held_once() -> None:
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


def test_eager_and_fast_decoder_share_weights() -> None:
    store = weight_store("cpu")
    decoders = {one.name: one.build() for one in random_subjects(store, "hovle-8m")}
    shipped, tuned = (decoders[name].model for name in (AS_SHIPPED, TUNED))  # type: ignore[attr-defined]
    assert isinstance(decoders[AS_SHIPPED], EagerDecoder)
    ours, theirs = (dict(one.named_parameters()) for one in (tuned, shipped))
    assert all(ours[name] is value for name, value in theirs.items())
    # Decoders with shared weights still agree with the reference.
    for name, decoder in decoders.items():
        assert max(check_decoder(name, decoder).distances.values()) < 1e-5


def test_unused_weights_are_freed() -> None:
    store = weight_store("cpu")
    subject = random_subjects(store, "hovle-8m")[0]
    decoder = subject.build()
    assert len(store._parameters) > 50
    del decoder
    assert len(store._parameters) == 0


def test_checkpoint_is_read_once_for_both_baselines(
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


def test_products_share_equal_tensors(profiled_run: Path) -> None:
    store = weight_store("cpu")
    subjects = run_subjects(store, profiled_run)
    assert [one.name for one in subjects] == [AS_SHIPPED, TUNED, "seed", "hybrid-2"]
    teacher, _, linear, hybrid = (subject.build() for subject in subjects)
    models = [one.model for one in (teacher, linear, hybrid)]  # type: ignore[attr-defined]
    assert len({id(model.lm_head.weight) for model in models}) == 1
    assert not any(name.startswith("unused") for name, _ in models[0].named_parameters())
    gates = [model.model.layers[1].mixer.g_proj.weight for model in models[1:]]
    assert gates[0] is gates[1]


def test_unknown_architecture() -> None:
    with pytest.raises(DataError, match=r"give hovle-2\.6b or hovle-8m; did you mean hovle-2\.6b"):
        random_subjects(weight_store("cpu"), "hovle-26b")


def test_int8_subjects() -> None:
    subjects = random_subjects(weight_store("cpu"), "hovle-8m")
    twins = int8_subjects(subjects)
    assert [one.name for one in twins] == ["linear int8", "hybrid-2 int8"]
    assert {(one.info.role, one.info.precision) for one in twins} == {(STUDENT, "int8")}
    wide, narrow = subjects[2].build(), twins[0].build()
    assert narrow.weight_bytes < 0.4 * wide.weight_bytes
    assert narrow.dtype == torch.float32
    assert narrow.cost(1, 100, False).bytes < 0.4 * wide.cost(1, 100, False).bytes
    check_decoder("narrow", narrow)
    ids = wide.random_prompt(1, 20, torch.Generator().manual_seed(1))
    apart = wide.forward_without_cache(ids, 1) - narrow.forward_without_cache(ids, 1)
    # Unrelated logits are at a distance of about 1.4.
    assert 1e-4 < float(apart.norm() / wide.forward_without_cache(ids, 1).norm()) < 0.3
    with pytest.raises(DataError, match="leave out --int8 or --eager"):
        int8_subjects(random_subjects(weight_store("cpu"), "hovle-8m", eager=True))


def test_students_of_several_mixers() -> None:
    store, names = weight_store("cpu"), ("gated_delta", "mamba2", "kda")
    subjects = random_subjects(store, "hovle-8m", (0, 2, 8), names, teacher=False)
    found = {one.name: (one.info.way, one.info.mixers) for one in subjects}
    assert found == {
        "linear gated_delta": ("generator", ("gated_delta",)),
        "linear": ("generator", ("mamba2",)),
        "linear kda": ("eager", ("kda",)),
        "hybrid-2 gated_delta": ("generator", ("gated_delta",)),
        "hybrid-2": ("generator", ("mamba2",)),
        "hybrid-2 kda": ("eager", ("kda",)),
        "hybrid-8": ("generator", ()),
    }
    reasons = [one.info.eager_reason for one in subjects if one.info.eager_reason is not None]
    assert reasons == ["Kimi delta attention has no fast decoding"] * 2
    # Kept side by side: mixers have parameters of the same name and of other shapes.
    decoders = {one.name: one.build() for one in subjects[:3]}
    for name, decoder in decoders.items():
        assert max(check_decoder(name, decoder).distances.values()) < 1e-5
    with pytest.raises(DataError, match="linear kda cannot have int8 weights: Kimi delta"):
        int8_subjects(subjects)
    with pytest.raises(DataError, match=r"called gated_dleta: give .*; did you mean gated_delta"):
        random_subjects(store, "hovle-8m", mixers=("gated_dleta",))


def test_decoder_of_each_role() -> None:
    def ways(**options: Any) -> dict[str, tuple[str, str]]:
        found = random_subjects(weight_store("cpu"), "hovle-8m", (0,), **options)
        return {one.name: (one.info.way, one.info.cache) for one in found}

    assert ways() == {
        AS_SHIPPED: ("eager", "growing"),
        TUNED: ("generator", "static"),
        "linear": ("generator", "static"),
    }
    assert ways(eager=True) == {
        AS_SHIPPED: ("eager", "growing"),
        STATIC_TEACHER: ("eager", "static"),
        "linear": ("eager", "static"),
    }
