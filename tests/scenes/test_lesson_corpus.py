"""The corpus `scenes:lessons`: pure samples, options, lengths, pixels like the suites'."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
import torch
from families import FAMILIES
from preloaded_process import PreloadedProcess
from torch import Tensor

from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.data import Drawing, GeneratedCorpus, SampleEncoder, StepLoader, open_corpus
from mmmamba_cli.data.drawn_pictures import draw_pictures
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import TeacherProcessor, Tiling, TrainingProcessor
from mmmamba_cli.processing.tiling import cut_tiles, stack_tiles
from mmmamba_cli.recipe import load_recipe, recipe_names
from mmmamba_cli.runs import open_processor
from mmmamba_evals import model_folders
from mmmamba_evals.scenes.atlas import Atlas
from mmmamba_evals.scenes.lesson_corpus import log_uniform
from mmmamba_evals.scenes.renderer import render
from mmmamba_evals.scenes.scene import Scene

CPU = torch.device("cpu")
TILING = Tiling(224, 1, 64, use_thumbnail=True)
SMALL = "scenes:lessons?pictures=2-3&sentences=4-8&long=0.5"


@pytest.fixture(scope="module")
def processor() -> TrainingProcessor:
    found = open_processor(open_checkpoint(model_folders()["scenes-teacher"]))
    assert found is not None
    return found


def corpus_of(spec: str, seed: int = 0, stream: str = "train") -> GeneratedCorpus:
    corpus = open_corpus(spec, seed=seed, stream=stream)
    assert isinstance(corpus, GeneratedCorpus)
    return corpus


def drawings_of(corpus: GeneratedCorpus, count: int, largest: int = 6) -> list[Drawing]:
    """The first `count` pictures of at most `largest` times 224 x 224 pixels."""
    found: list[Drawing] = []
    index = 0
    while len(found) < count:
        found += [d for d in corpus[index].images if d.width * d.height <= largest * 224**2]  # type: ignore[union-attr,misc]
        index += 1
    return found[:count]


def pixels_of(
    corpus: GeneratedCorpus, drawings: Sequence[Drawing], tiling: Tiling = TILING
) -> Tensor:
    return corpus.generator.to_pixels(corpus.generator.stack(drawings, tiling), CPU)


def told(corpus: GeneratedCorpus, index: int) -> str:
    """A sample as text: its turns, and the layouts of its pictures."""
    sample = corpus[index]
    return repr((sample.messages, [one.layout for one in sample.images]))  # type: ignore[union-attr]


def _print_samples() -> None:
    corpus = corpus_of(SMALL, 5, "stage1")
    pixels = pixels_of(corpus, drawings_of(corpus, 3))
    print([told(corpus, index) for index in (7, 3)], int(pixels.long().sum()), flush=True)


def test_samples_are_pure(tmp_path_factory: pytest.TempPathFactory) -> None:
    corpus = corpus_of(SMALL, 5, "stage1")
    late = told(corpus, 7)
    early = told(corpus, 3)
    assert told(corpus, 7) == late != early
    assert told(corpus_of(SMALL, 6, "stage1"), 7) != late
    assert told(corpus_of(SMALL, 5, "stage2"), 7) != late
    output = tmp_path_factory.mktemp("pure") / "output"
    process = PreloadedProcess(_print_samples, [], output)
    assert process.wait(60) == 0, process.text()
    pixels = pixels_of(corpus, drawings_of(corpus, 3))
    assert process.text().strip() == f"{[late, early]} {int(pixels.long().sum())}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("scenes:pictures", "scenes has no corpus 'pictures'"),
        ("scenes:lessons?longer=1", "scenes:lessons has no option 'longer'"),
        ("scenes:lessons?alter=2", "alter is '2', expected a number from 0 to 1"),
        ("scenes:lessons?pictures=1-4", "pictures is '1-4', expected A-B, whole numbers from 2"),
        ("scenes:lessons?questions=0", "questions is '0', expected a whole number from 1 to 8"),
        ("scenes:lessons?atlas=/nowhere", "atlas /nowhere does not exist"),
    ],
)
def test_specs_that_are_refused(source: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        open_corpus(source)
    assert message in caught.value.message


def test_kinds_of_lessons() -> None:
    long = corpus_of("scenes:lessons?long=1&lists=0.5&pictures=2-4&sentences=4-8&questions=4")
    samples = [long[index] for index in range(60)]
    several = [s for s in samples if len(s.images) > 1]
    large = [s for s in samples if len(s.images) == 1]
    texts = [s for s in samples if not s.images]
    assert min(len(several), len(large), len(texts)) >= 5
    assert {len(s.images) for s in several} == {2, 3, 4}
    assert all(one.width * one.height > 224**2 for s in large for one in s.images)  # type: ignore[union-attr]
    asked = [s.messages[0]["content"] for s in several]
    listed = [text for text in asked if "List the objects in picture" in text]
    assert 0 < len(listed) < len(asked)
    for sample in several:
        for question, answer in zip(sample.messages[::2], sample.messages[1::2], strict=True):
            if "List the objects in picture" in question["content"]:
                number = int(question["content"].split("in picture ")[1].split()[0])
                scene = sample.images[number - 1].layout.scene  # type: ignore[union-attr]
                names = [t.name for t in sorted(scene.things, key=lambda thing: thing.x)]
                assert answer["content"] == ", ".join(names)
    plain = corpus_of("scenes:lessons?long=1&tiles=0&dense=0&pictures=2-3&sentences=4-8")
    for index in range(20):
        sample = plain[index]
        assert len(sample.images) != 1
        assert sample.messages[-1]["content"] in ("Yes", "No")
        assert len(sample.messages) == 2
    short = corpus_of("scenes:lessons?long=0")
    assert all(len(short[index].images) == 1 for index in range(20))


def test_numbers_are_log_uniform() -> None:
    rng = Random(0)
    drawn = [log_uniform(rng, 2, 64) for _ in range(4000)]
    assert (min(drawn), max(drawn)) == (2, 64)
    below = [sum(number < bound for number in drawn) / len(drawn) for bound in (4, 8, 16, 32)]
    assert np.allclose(below, [0.2, 0.4, 0.6, 0.8], atol=0.03)


def test_long_lessons_fit_into_4096_tokens(processor: TrainingProcessor) -> None:
    encoder = SampleEncoder(processor, 4096, 64)
    corpus = corpus_of("scenes:lessons?long=1")
    lengths = [len(encoder(corpus[index])) for index in range(60)]
    assert max(lengths) > 2048
    assert min(lengths) < 512


def test_recipes_have_room_for_their_lessons(processor: TrainingProcessor) -> None:
    """A lesson that would lose part of a picture is a bad sample; 1 % of them end a training."""
    found = set()
    for name in recipe_names():
        recipe = load_recipe(name)
        sources = {recipe.data.train, *(stage.train for stage in recipe.stages)}
        for source in sources:
            if source is not None and source.startswith("scenes:"):
                # Every lesson is long here; alterations change no length.
                options = source.partition("?")[2].split("&")
                spec = "&".join(one for one in options if not one.startswith(("alter=", "long=")))
                found.add((spec, recipe.data.max_length, recipe.data.max_tiles))
    assert found
    for spec, max_length, max_tiles in found:
        corpus = corpus_of(f"scenes:lessons?alter=0&long=1&{spec}".rstrip("&"))
        encoder = SampleEncoder(processor, max_length, max_tiles)
        for index in range(60):
            encoder(corpus[index])


def test_unaltered_pixels_are_those_of_the_suites(atlas: Atlas) -> None:
    """Single pictures, and large ones with things on the edges of tiles, and thumbnails."""
    corpus = corpus_of("scenes:lessons?long=0.5&alter=0&pictures=2-3&sentences=4-8")
    drawings = drawings_of(corpus, 12)
    assert {(one.width, one.height) for one in drawings} > {(224, 224)}
    drawn = pixels_of(corpus, drawings)
    expected = torch.cat(
        [stack_tiles(cut_tiles(render(one.layout.scene, atlas), TILING)) for one in drawings]
    )
    difference = (drawn.float() - expected.float()).abs()
    assert difference.mean((1, 2, 3)).max() < 4
    assert (difference.amax(1) > 80).float().mean((1, 2)).max() < 0.02
    # A missing or misplaced thing differs by more.
    moved = torch.cat([drawn[1:], drawn[:1]])
    assert (moved.float() - expected.float()).abs().mean() > 20


def test_whole_pictures_for_a_teacher_s_own_processor(atlas: Atlas) -> None:
    corpus = corpus_of("scenes:lessons?long=0.5&alter=0&pictures=2-3&sentences=4-8")
    drawings = drawings_of(corpus, 8)
    for one, drawn in zip(drawings, draw_pictures(corpus.generator, drawings), strict=True):
        expected = render(one.layout.scene, atlas)
        assert drawn.size == expected.size == (one.width, one.height)
        difference = np.abs(np.asarray(drawn, dtype=float) - np.asarray(expected, dtype=float))
        assert difference.mean() < 4
    loader = StepLoader(
        corpus, TeacherProcessor(FAMILIES["gemma3"].processor), batch_size=4, max_length=900
    )
    (batch,) = (step := loader.step(0)).micro_batches
    assert not step.bad and batch.num_samples == 4
    shown = sum(len(corpus[index].images) for index in range(4))
    assert batch.inputs["pixel_values"].shape[0] == shown > 0


def test_tiles_of_another_size(atlas: Atlas) -> None:
    corpus = corpus_of("scenes:lessons?long=0&alter=0")
    drawings = drawings_of(corpus, 2)
    tiling = Tiling(112, 1, 4, use_thumbnail=True)
    drawn = pixels_of(corpus, drawings, tiling)
    expected = torch.cat(
        [stack_tiles(cut_tiles(render(one.layout.scene, atlas), tiling)) for one in drawings]
    )
    assert drawn.shape == expected.shape
    assert (drawn.float() - expected.float()).abs().mean() < 3


def test_alterations_grow_with_alter() -> None:
    def pixels(alter: float) -> Tensor:
        corpus = corpus_of(f"scenes:lessons?long=0&alter={alter}")
        return pixels_of(corpus, drawings_of(corpus, 4)).float()

    plain = pixels(0)
    half, full = ((pixels(alter) - plain).abs().mean() for alter in (0.5, 1))
    assert 1 < half < full < 30


def test_pixels_do_not_depend_on_the_batch() -> None:
    corpus = corpus_of(SMALL)
    drawings = drawings_of(corpus, 8)
    together = pixels_of(corpus, drawings)
    alone = torch.cat([pixels_of(corpus, [one]) for one in drawings])
    assert (together.int() - alone.int()).abs().max() <= 1
    assert (together != alone).float().mean() < 1e-4
    assert torch.equal(pixels_of(corpus, drawings), together)


def test_processes_split_the_pictures(processor: TrainingProcessor) -> None:
    def pixels(rank: int, world_size: int) -> Tensor:
        loader = StepLoader(
            corpus_of(SMALL), processor, batch_size=5, max_length=2048, batching="packed",
            max_tiles=4, rank=rank, world_size=world_size,
        )  # fmt: skip
        (micro,) = loader.step(2).micro_batches
        moved = micro.to("cpu").pixel_values
        return torch.empty(0, 3, 224, 224) if moved is None else moved

    whole, shares = pixels(0, 1), torch.cat([pixels(rank, 2) for rank in range(2)])
    assert shares.shape == whole.shape
    assert len(whole) > 4
    assert (shares - whole).abs().max() < 0.02


def test_layouts_are_small_and_textures_stay_here() -> None:
    corpus = corpus_of("scenes:lessons?long=0.33")
    drawings = drawings_of(corpus, 32, largest=1)
    layouts = corpus.generator.stack(drawings, TILING)
    assert len(pickle.dumps(layouts)) < 1024 * len(drawings)
    corpus.generator.to_pixels(layouts, CPU)
    assert b"BatchRenderer" not in pickle.dumps(corpus.generator)


def test_a_thing_far_outside_of_a_cut_is_drawn() -> None:
    corpus = corpus_of("scenes:lessons?long=1&dense=0&alter=1")
    index = 0
    while not (len(corpus[index].images) == 1 and corpus[index].images[0].width > 600):  # type: ignore[union-attr]
        index += 1
    drawing = corpus[index].images[0]
    assert isinstance(drawing, Drawing)
    assert isinstance(drawing.layout.scene, Scene)
    assert len(pixels_of(corpus, [drawing])) > 3
