"""A student that equals its teacher except in one layer, and samples that the teacher answers."""

from __future__ import annotations

import torch
from small import IMAGE_ID, SIDE, small_model
from small_distillation import RandomLoader, pair_of

from mmmamba_cli.data import IGNORE_INDEX, Batch
from mmmamba_cli.distill.teacher_student import TeacherStudent
from mmmamba_cli.layer_selection.probe_samples import ProbeSamples

LAYERS = 4


def planted_pair(layer: int, learns: bool = False, letter: str = "m") -> TeacherStudent:
    """A teacher, and its copy with a random mixer in `layer`; `learns` trains this mixer."""
    plan = ["a"] * LAYERS
    plan[layer] = letter
    # The embedding stack sees the patches, which are merged between the stacks.
    teacher = small_model("a" * LAYERS, "post")
    student = small_model("".join(plan), "post", seed=1)
    own = f"model.layers.{layer}.mixer."
    shared = {n: t for n, t in teacher.state_dict().items() if not n.startswith(own)}
    student.load_state_dict(shared, strict=False)
    names = [n for n, _ in student.named_parameters() if learns and ".mixer." in n]
    return pair_of(teacher, student, names)


def random_batch(teacher: torch.nn.Module, seed: int, with_image: bool) -> Batch:
    """Four texts of unequal length; the labels of each last five columns are the teacher's."""
    rows = RandomLoader(IMAGE_ID, batch_size=4, seed=seed).samples(0)
    if with_image:
        image = torch.full((4,), IMAGE_ID)
        rows[0] = torch.cat((rows[0][:1], image, rows[0][1:]))
    width = max(map(len, rows))
    ids = torch.zeros(4, width, dtype=torch.long)
    mask = torch.zeros(4, width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=rng) if with_image else None
    with torch.no_grad():
        logits = teacher(ids, pixels, mask.long(), use_cache=False).logits
    labels = torch.full_like(ids, IGNORE_INDEX)
    for i, row in enumerate(rows):
        answer = slice(max(1, len(row) - 5), len(row))
        labels[i, answer] = logits[i, answer.start - 1 : answer.stop - 1].argmax(-1)
    return Batch(ids, labels, mask, None, pixels, num_samples=4, num_tokens=int(mask.sum()))


def planted_probe(layer: int, learns: bool = False, letter: str = "m") -> ProbeSamples:
    """The pair of `planted_pair`, with two batches of which one has a picture."""
    pair = planted_pair(layer, learns, letter)
    batches = [random_batch(pair.teacher, seed, seed == 1) for seed in range(2)]
    return ProbeSamples(pair, tuple(batches), 1.0)
