"""Batches depend only on seed and step, and hold each sample once for any split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import write_conversations
from small import distance, small_model

from mmmamba_cli.data import (
    IGNORE_INDEX,
    Batch,
    EncodedSample,
    SampleEncoder,
    StepBatches,
    StepLoader,
    open_corpus,
)
from mmmamba_cli.data.holistic_collator import assign_rows, collate, empty_batch, make_rows
from mmmamba_cli.ops.attention import VarlenMetadata, varlen_metadata
from mmmamba_cli.processing import HolisticVLMProcessor

BATCHINGS = ("padded", "bucketed", "packed")
# Mean and standard deviation of ImageNet, per colour.
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
DEVIATION = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)


def loader(folder: Path, processor: HolisticVLMProcessor, **overrides: Any) -> StepLoader:
    options = {"batch_size": 6, "max_length": 400, "max_tiles": 2, **overrides}
    return StepLoader(open_corpus(folder / "train.jsonl", folder), processor, **options)


def equal(one: Batch, two: Batch) -> bool:
    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, VarlenMetadata) and isinstance(b, VarlenMetadata):
            return torch.equal(a.cu_seqlens, b.cu_seqlens) and a.max_seqlen == b.max_seqlen
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return all(alike(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True))


def names(steps: list[StepBatches]) -> list[str]:
    return sorted(name for step in steps for micro in step.micro_batches for name in micro.names)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_pass_takes_every_sample_once(
    batching: str, folder: Path, processor: HolisticVLMProcessor
) -> None:
    source = loader(folder, processor, batching=batching, batch_size=23)
    steps = list(source.steps(0, 2))
    expected = sorted(f"train.jsonl:{n + 1}" for n in range(23))
    assert names(steps[:1]) == names(steps[1:]) == expected
    if batching == "padded":  # the others sort the batch, which is the whole pass here
        assert steps[0].micro_batches[0].names != steps[1].micro_batches[0].names
    assert not steps[0].bad


@pytest.mark.parametrize("batching", BATCHINGS)
def test_workers_and_resuming_change_nothing(
    batching: str, folder: Path, processor: HolisticVLMProcessor
) -> None:
    whole = list(loader(folder, processor, batching=batching, accumulation=2).steps(0, 6))
    for workers, first in ((2, 0), (1, 3), (0, 4)):
        again = list(
            loader(folder, processor, batching=batching, accumulation=2, workers=workers).steps(
                first, 6
            )
        )
        assert [s.step for s in again] == list(range(first, 6))
        for one, two in zip(whole[first:], again, strict=True):
            assert all(
                equal(a, b) for a, b in zip(one.micro_batches, two.micro_batches, strict=True)
            )


@pytest.mark.parametrize("batching", BATCHINGS)
def test_processes_split_the_same_batch(
    batching: str, folder: Path, processor: HolisticVLMProcessor
) -> None:
    alone = list(loader(folder, processor, batching=batching).steps(0, 4))
    parts = [
        list(
            loader(
                folder, processor, batching=batching, rank=rank, world_size=2, accumulation=2
            ).steps(0, 4)
        )
        for rank in range(2)
    ]
    for step, *shares in zip(alone, *parts, strict=True):
        assert names([step]) == names(shares)
        assert all(len(share.micro_batches) == 2 for share in shares)
        tokens = sum(m.num_tokens for share in shares for m in share.micro_batches)
        assert tokens == step.micro_batches[0].num_tokens


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_segments_of_a_batch(
    batching: str, world_size: int, folder: Path, processor: HolisticVLMProcessor
) -> None:
    """Equal to what `varlen_metadata` computes from the masks, also from a worker process."""
    known = 0
    for rank in range(world_size):
        source = loader(
            folder, processor, batching=batching, rank=rank, world_size=world_size, workers=1,
            accumulation=2,
        )  # fmt: skip
        for step in source.steps(0, 3):
            for micro in step.micro_batches:
                if micro.attention_mask is None and micro.seq_idx is None:
                    assert micro.varlen is None
                    continue
                known += 1
                found = varlen_metadata(micro.attention_mask, micro.seq_idx)
                assert found is not None and micro.varlen is not None
                assert torch.equal(micro.varlen.cu_seqlens, found.cu_seqlens)
                assert micro.varlen.max_seqlen == found.max_seqlen
                assert torch.equal(micro.to("cpu").varlen.cu_seqlens, found.cu_seqlens)  # type: ignore[union-attr]
    assert known
    assert empty_batch(0).varlen is not None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_single_pass_ends_with_a_short_step(
    workers: int, folder: Path, processor: HolisticVLMProcessor
) -> None:
    """23 samples in steps of 6: the last step has 5, for any number of processes."""
    for world_size in (1, 2, 7):
        found: list[StepBatches] = []
        for rank in range(world_size):
            source = loader(
                folder, processor, single_pass=True, shuffle=False, workers=workers * (rank == 0),
                rank=rank, world_size=world_size, accumulation=2,
            )  # fmt: skip
            assert source.steps_per_pass == 4
            found += source.steps(0, source.steps_per_pass)
        assert names(found) == sorted(f"train.jsonl:{n + 1}" for n in range(23))
        assert [step.num_planned for step in found[:4]] == [6, 6, 6, 5]


def test_an_endless_stream_has_no_short_step(folder: Path, processor: HolisticVLMProcessor) -> None:
    assert len(names([loader(folder, processor).step(3)])) == 6


def test_pass_length_follows_the_repeats(
    folder: Path, processor: HolisticVLMProcessor, tmp_path: Path
) -> None:
    """With `repeat_time` 0.5, half of the set is taken once."""
    meta = {"half": {"annotation": str(folder / "train.jsonl"), "root": str(folder)}}
    meta["half"]["repeat_time"] = 0.5  # type: ignore[assignment]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    source = StepLoader(
        open_corpus(tmp_path / "meta.json"), processor, batch_size=5, max_length=400,
        shuffle=False, single_pass=True,
    )  # fmt: skip
    found = names(list(source.steps(0, source.steps_per_pass)))
    assert (source.steps_per_pass, len(found), len(set(found))) == (3, 12, 12)


def test_the_seed_decides_the_order(folder: Path, processor: HolisticVLMProcessor) -> None:
    def first(**overrides: Any) -> tuple[str, ...]:
        return (
            next(loader(folder, processor, batching="padded", **overrides).steps(0, 1))
            .micro_batches[0]
            .names
        )

    assert first(seed=1) == first(seed=1) != first(seed=2)
    in_order = tuple(f"train.jsonl:{n}" for n in range(1, 7))
    assert first(shuffle=False) == in_order


def test_ids_and_labels_of_a_conversation(processor: HolisticVLMProcessor) -> None:
    messages = [
        {"role": "user", "content": "What is <image> this?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "assistant\nSure?"},
        {"role": "assistant", "content": "\nYes"},
    ]
    from PIL import Image

    picture = Image.new("RGB", (56, 56))
    ids, is_answer = processor.conversation_ids(messages, [1])
    whole = processor.chat(messages, [picture], add_generation_prompt=False)
    assert ids == whole["input_ids"][0].tolist()
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    runs: list[list[str]] = []
    for i, token in enumerate(tokens):
        if is_answer[i]:
            if i == 0 or not is_answer[i - 1]:
                runs.append([])
            runs[-1].append(token)
    texts = [processor.tokenizer.convert_tokens_to_string(run) for run in runs]
    assert [text.removesuffix("<|im_end|>").strip() for text in texts] == ["A cat.", "Yes"]
    assert all(run[-1] == "<|im_end|>" for run in runs)
    # The generation prompt ends where the answer begins.
    prompt = processor.chat(messages[:1], [picture])["input_ids"][0].tolist()
    assert ids[: len(prompt)] == prompt
    assert not any(is_answer[: len(prompt)])
    assert is_answer[len(prompt)]


def test_every_token_of_plain_text_is_scored(folder: Path, processor: HolisticVLMProcessor) -> None:
    file = folder / "text.jsonl"
    file.write_text(json.dumps({"text": "the old table"}) + "\n")
    batch = next(
        StepLoader(open_corpus(file), processor, batch_size=1, max_length=50).steps(0, 1)
    ).micro_batches[0]
    assert batch.labels[0, 0] == IGNORE_INDEX
    assert torch.equal(batch.labels[0, 1:], batch.input_ids[0, 1:])
    assert batch.attention_mask is None


def test_packing_fills_rows() -> None:
    samples = [EncodedSample(str(n), [1] * n, [True] * n) for n in (3, 9, 5, 2, 6, 1)]
    rows = make_rows(samples, "packed", 10)
    assert [[len(s) for s in row] for row in rows] == [[9, 1], [6, 3], [5, 2]]
    assert [len(row[0]) for row in make_rows(samples, "bucketed", 10)] == [9, 6, 5, 3, 2, 1]
    assert [len(row[0]) for row in make_rows(samples, "padded", 10)] == [3, 9, 5, 2, 6, 1]


def test_every_row_is_assigned_once() -> None:
    rows = [[EncodedSample(str(n), [1], [True])] for n in range(7)]
    for world, parts in ((1, 1), (2, 2), (3, 1), (4, 4)):
        assigned = [assign_rows(rows, rank, world, parts) for rank in range(world)]
        found = sorted(row[0].name for rank in assigned for micro in rank for row in micro)
        assert found == [str(n) for n in range(7)]
        assert all(len(rank) == parts for rank in assigned)


def test_a_process_without_rows_gets_an_empty_batch(
    folder: Path, processor: HolisticVLMProcessor
) -> None:
    shares = [
        next(
            loader(folder, processor, batch_size=1, rank=rank, world_size=2).steps(0, 1)
        ).micro_batches[0]
        for rank in range(2)
    ]
    empty, full = sorted(shares, key=lambda batch: batch.num_samples)
    assert equal(empty, empty_batch(processor.pad_token_id))
    assert full.num_samples == 1


def test_bad_samples_are_reported_once_each(
    tmp_path: Path, processor: HolisticVLMProcessor
) -> None:
    file = write_conversations(tmp_path, 8)
    pictures = sorted((tmp_path / "images").iterdir())
    pictures[0].write_bytes(pictures[0].read_bytes()[:60])
    text = file.read_text().splitlines()
    text[2] = "{broken"
    file.write_text("\n".join(text))
    shares = [
        next(loader(tmp_path, processor, batch_size=8, rank=rank, world_size=2).steps(0, 1))
        for rank in range(2)
    ]
    reported = [sample for share in shares for sample in share.bad]
    counted = [
        s for rank, share in enumerate(shares) for s in share.bad if rank == 0 or not s.seen_by_all
    ]
    assert sorted(s.name for s in counted) == ["train.jsonl:2", "train.jsonl:3"]
    assert len(reported) == 3
    assert len(names(shares)) == 6


@pytest.mark.parametrize("shuffle", ["pre", "post"])
@torch.no_grad()
def test_packed_rows_through_a_model(
    shuffle: str, folder: Path, processor: HolisticVLMProcessor
) -> None:
    """Logits of every sample in a packed row equal those of the sample alone."""
    model = small_model("amam", shuffle)
    vision = {**model.config.vision, "image_token_id": processor.image_token_id}
    model.config.vision = vision
    table = torch.randn(535, 32, generator=torch.Generator().manual_seed(3))
    model.model.text_embedding.weight = torch.nn.Parameter(table, requires_grad=False)
    source = loader(folder, processor, batching="packed", batch_size=5, max_length=900)
    (batch,) = (micro.to("cpu") for micro in next(source.steps(0, 1)).micro_batches)
    assert batch.seq_idx is not None
    together = model(
        batch.input_ids, batch.pixel_values, batch.attention_mask, seq_idx=batch.seq_idx
    ).logits
    encoder = SampleEncoder(processor, 900, 2)
    corpus = source.corpus
    for row in range(batch.input_ids.shape[0]):
        for number in range(int(batch.seq_idx[row].max()) + 1):
            here = batch.seq_idx[row] == number
            if batch.attention_mask is not None:
                here &= batch.attention_mask[row]
            ids = batch.input_ids[row][here].tolist()
            sample = next(
                e for e in map(encoder, (corpus[i] for i in range(len(corpus)))) if e.ids == ids
            )
            alone, _ = collate([[sample]], encoder.images, processor.pad_token_id)
            alone = alone.to("cpu")
            expected = model(alone.input_ids, alone.pixel_values).logits[0]
            assert distance(together[row][here], expected) < 1e-4
            assert torch.equal(batch.labels[row][here], alone.labels[0])


def test_moving_a_batch_normalises_pixels_only(
    folder: Path, processor: HolisticVLMProcessor
) -> None:
    batch = next(loader(folder, processor).steps(0, 1)).micro_batches[0]
    moved = batch.to("cpu")
    assert batch.pixel_values is not None and batch.pixel_values.dtype == torch.uint8
    expected = batch.pixel_values.float().div(255).sub(MEAN).div(DEVIATION)
    assert moved.pixel_values is not None and torch.equal(moved.pixel_values, expected)
    assert equal(replace(moved, pixel_values=batch.pixel_values), batch)
    assert equal(moved.to("cpu"), moved)
    assert replace(batch, num_samples=0).to("cpu").num_samples == 0
