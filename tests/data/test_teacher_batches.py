"""Batches through the teachers' own processors: answers, lengths and inputs of every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, picture

from mmmamba_cli.data import IGNORE_INDEX, ModelBatch, StepLoader, open_corpus, rows_as_text
from mmmamba_cli.data.sample import Sample
from mmmamba_cli.data.teacher_collator import TeacherCollator
from mmmamba_cli.processing import HolisticVLMProcessor, TeacherProcessor

WITH_PICTURES = [name for name, family in FAMILIES.items() if family.pictures]
END_OF_TURN = {
    "smolvlm": "<end_of_utterance>",
    "idefics3": "<end_of_utterance>",
    "mistral3": "</s>",
    "ministral3": "</s>",
    "gemma3": "<end_of_turn>",
    "llama": "<|eot_id|>",
}
SIZES = ((24, 16), (40, 12), (16, 32))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(len(SIZES))]
    for number, (path, size) in enumerate(zip(paths, SIZES, strict=True)):
        picture(*size, seed=number).save(path)
    return paths


def turns(*texts: str) -> tuple[dict[str, Any], ...]:
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))


def conversations(name: str, pictures: list[Path]) -> list[Sample]:
    """Several turns, Chinese, one answer twice and within a question, pictures in later turns."""
    samples = [
        Sample(
            "chinese", turns("一只猫是什么颜色？", "红色。它在一张图片里。", "红色。", "红色。")
        ),
        Sample(
            "repeated", turns("four", "four", "Is it four or four?", "four", "four", "four four")
        ),
        Sample(
            "system",
            ({"role": "system", "content": "Answer in one word."}, *turns("Say yes.", "Yes")),
        ),
    ]
    if name == "gemma3":
        samples.pop()
    if FAMILIES[name].pictures:
        samples += [
            Sample("one", turns("<image>\nWhat is it?", "a red square"), images=(pictures[0],)),
            Sample(
                "later",
                turns(
                    "<image>\nWhat?", "A square.", "And <image> or\n<image>", "四个。", "So?", "So"
                ),
                images=tuple(pictures),
            ),
            Sample("unplaced", turns("Compare.", "They differ."), images=tuple(pictures[:2])),
        ]
    return samples


def masked_texts(tokenizer: Any, batch: ModelBatch, row: int) -> list[str]:
    """The texts of each run of labels."""
    runs: list[list[int]] = [[]]
    for label in batch.labels[row].tolist():
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def collator(name: str, max_length: int = 4096) -> TeacherCollator:
    return TeacherCollator(TeacherProcessor(FAMILIES[name].processor), max_length)


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_exactly_the_answers_and_the_ends_of_their_turns(
    name: str, pictures: list[Path]
) -> None:
    family, make = FAMILIES[name], collator(name)
    samples = conversations(name, pictures)
    batch, bad = make.collate([[make.encode(sample)] for sample in samples])
    assert not bad and batch.names == tuple(sample.name for sample in samples)
    end = END_OF_TURN.get(name, "<|im_end|>")
    for row, sample in enumerate(samples):
        answers = [each["content"] for each in sample.messages if each["role"] == "assistant"]
        # SmolVLM's template writes a space before an answer, which the model writes too.
        before = " " if name in ("smolvlm", "idefics3") else ""
        expected = [f"{before}{answer}{end}" for answer in answers]
        assert masked_texts(family.tokenizer, batch, row) == expected
        labelled = batch.labels[row] != IGNORE_INDEX
        assert torch.equal(batch.labels[row][labelled], batch.inputs["input_ids"][row][labelled])


@pytest.mark.parametrize("name", FAMILIES)
def test_lengths_are_known_before_pictures_are_decoded(name: str, pictures: list[Path]) -> None:
    make = collator(name)
    encoded = [make.encode(sample) for sample in conversations(name, pictures)]
    batch, _ = make.collate([[each] for each in encoded])
    assert batch.inputs["attention_mask"].sum(1).tolist() == [len(each) for each in encoded]
    assert batch.num_tokens == sum(map(len, encoded))
    assert batch.num_samples == len(encoded)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_what_the_family_s_model_takes(name: str, pictures: list[Path]) -> None:
    family, make = FAMILIES[name], collator(name)
    rows = [[make.encode(sample)] for sample in conversations(name, pictures)]
    batch, _ = make.collate(rows)
    model = family.model()
    with torch.no_grad():
        together = model(**batch.inputs).logits
        (alone, _) = make.collate(rows[-1:])
        logits = model(**alone.inputs).logits
    assert torch.allclose(together[-1, : logits.shape[1]], logits[0], atol=1e-5, rtol=0)


def write_lines(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def record(number: int, with_picture: bool = True) -> dict[str, Any]:
    question = "<image>\nWhat?" if with_picture else "What?"
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": f"square {number}"}]
    return {"conversations": said} | ({"image": f"{number % 3}.png"} if with_picture else {})


def equal(one: ModelBatch, two: ModelBatch) -> bool:
    return (
        one.names == two.names
        and set(one.inputs) == set(two.inputs)
        and all(torch.equal(value, two.inputs[key]) for key, value in one.inputs.items())
        and torch.equal(one.labels, two.labels)
        and (one.seq_idx is None) == (two.seq_idx is None)
        and (one.seq_idx is None or torch.equal(one.seq_idx, two.seq_idx))
    )


@pytest.mark.parametrize("batching", ["bucketed", "packed"])
def test_steps_do_not_depend_on_workers_start_or_processes(
    batching: str, pictures: list[Path]
) -> None:
    folder = pictures[0].parent
    source = write_lines(folder, [record(n, n % 3 != 1) for n in range(7)])

    def loader(**overrides: Any) -> StepLoader:
        processor = TeacherProcessor(FAMILIES["qwen3_vl"].processor, packs_rows=True)
        options = {"batch_size": 4, "max_length": 90, "batching": batching, **overrides}
        return StepLoader(open_corpus(source, folder), processor, **options)

    whole = list(loader(accumulation=2).steps(0, 4))
    for again in (list(loader(accumulation=2, workers=1).steps(1, 4)),):
        for one, two in zip(whole[1:], again, strict=True):
            assert all(map(equal, one.micro_batches, two.micro_batches))
    ranks = [loader(rank=rank, world_size=2).step(0) for rank in range(2)]
    # The rows of both processes together are those of the micro batches of one.
    assert [micro.names for step in ranks for micro in step.micro_batches] == [
        micro.names for micro in whole[0].micro_batches
    ]
    packs = [micro.seq_idx is not None for step in whole for micro in step.micro_batches]
    assert any(packs) is (batching == "packed")


def per_token(batch: ModelBatch) -> list[torch.Tensor]:
    return [batch.inputs[name] for name in ("input_ids", "mm_token_type_ids")]


def test_packed_rows_hold_the_conversations_as_they_are_alone(pictures: list[Path]) -> None:
    make = collator("qwen3_vl")
    chinese, repeated, _, one, later, _ = (
        make.encode(sample) for sample in conversations("qwen3_vl", pictures)
    )
    rows = [[later, chinese], [one], [repeated]]
    packed, bad = make.collate(rows)
    alone, _ = make.collate([[sample] for row in rows for sample in row])
    assert not bad and alone.seq_idx is None
    assert packed.names == alone.names == ("later", "chinese", "one", "repeated")
    assert (packed.num_samples, packed.num_tokens) == (4, alone.num_tokens)
    assert torch.equal(packed.token_mask.sum(1), torch.tensor([sum(map(len, r)) for r in rows]))
    # Pixels and grids keep the order of the conversations.
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(packed.inputs[name], alone.inputs[name])
    tokens = [
        [values[batch.token_mask] for values in (batch.labels, *per_token(batch))]
        for batch in (packed, alone)
    ]
    assert all(map(torch.equal, *tokens))
    padding = packed.inputs["input_ids"][~packed.token_mask]
    assert padding.unique().tolist() == [FAMILIES["qwen3_vl"].tokenizer.pad_token_id]
    assert packed.seq_idx is not None
    first = packed.seq_idx[0].tolist()
    assert first == [0] * len(later) + [1] * len(chinese)
    second = packed.seq_idx[1].tolist()
    assert second == [0] * len(one) + [1] * (len(first) - len(one))
    assert packed.to("cpu").seq_idx is not None


def test_a_packed_row_loses_only_the_sample_that_cannot_be_read(pictures: list[Path]) -> None:
    make = collator("qwen3_vl")
    good = [make.encode(sample) for sample in conversations("qwen3_vl", pictures)[3:5]]
    damaged = pictures[0].parent / "damaged.png"
    picture(24, 16).save(damaged)
    lost = make.encode(Sample("lost", turns("<image>\nWhat?", "A cat"), images=(damaged,)))
    damaged.write_bytes(damaged.read_bytes()[:-30])
    batch, bad = make.collate([[good[0], lost, good[1]], [lost]])
    assert [(each.name, each.seen_by_all) for each in bad] == [("lost", False)] * 2
    expected, _ = make.collate([good])
    assert equal(batch, expected) and batch.labels.shape[0] == 1
    assert batch.seq_idx is not None


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_a_process_without_rows_gets_a_batch_without_tokens(name: str) -> None:
    batch, bad = collator(name).collate([])
    assert not bad and batch.num_samples == batch.num_tokens == 0
    assert batch.token_mask.tolist() == [[False]]
    assert batch.labels.unique().tolist() == [IGNORE_INDEX]
    with torch.no_grad():
        FAMILIES[name].model()(**batch.inputs)


def test_a_batch_reads_as_text_with_answers_marked(pictures: list[Path]) -> None:
    make = collator("qwen3_vl")
    samples = conversations("qwen3_vl", pictures)
    batch, _ = make.collate([[make.encode(samples[number])] for number in (0, 3)])
    rows = rows_as_text(batch, FAMILIES["qwen3_vl"].tokenizer)
    end = "<|im_end|>"
    assert rows[0].marked("[", "]") == (
        f"<|im_start|>user\n一只猫是什么颜色？{end}\n<|im_start|>assistant\n[红色。它在一张图片里。{end}]\n"
        f"<|im_start|>user\n红色。{end}\n<|im_start|>assistant\n[红色。{end}]\n"
    )
    grid = batch.inputs["image_grid_thw"][0]
    assert rows[1].marked("[", "]") == (
        f"<|im_start|>user\n<|vision_start|><|image_pad|>x{int(grid.prod()) // 4}<|vision_end|>"
        f"What is it?{end}\n<|im_start|>assistant\n[a red square{end}]\n"
    )
    assert sum(row.num_tokens for row in rows) == batch.num_tokens
    assert [row.num_answer_tokens for row in rows] == (batch.labels != IGNORE_INDEX).sum(1).tolist()


def test_a_batch_of_hovle_reads_as_text(folder: Path, processor: HolisticVLMProcessor) -> None:
    loader = StepLoader(
        open_corpus(folder / "train.jsonl", folder),
        processor,
        batch_size=2,
        max_length=400,
        max_tiles=1,
        shuffle=False,
    )
    (batch,) = loader.step(0).micro_batches
    rows = rows_as_text(batch, processor.tokenizer)
    texts = {row.marked("[", "]") for row in rows}
    for line in (folder / "train.jsonl").read_text().splitlines()[:2]:
        answer = json.loads(line)["conversations"][1]["value"]
        assert any(f"[{answer}<|im_end|>]" in text for text in texts)
    assert any("<IMG_CONTEXT>x" in text for text in texts)
