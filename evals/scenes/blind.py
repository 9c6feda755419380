"""The blind baseline: how well answers can be told from questions alone.

A suite is worth something only if the answer is near 50 %. Logistic regression on words and on runs
of two and three of them learns from some questions and is tested on others; pictures are not drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from mmmamba_cli.errors import DataError
from mmmamba_evals.scenes import questions as say
from mmmamba_evals.scenes.questions import NO, YES
from mmmamba_evals.scenes.sampling import (
    DRAWS,
    SPLITS,
    Asked,
    ask_about_objects,
    ask_count_pair,
    askable,
)
from mmmamba_evals.scenes.scene import Question
from mmmamba_evals.scenes.world import World

# Words of the longest run that is looked at.
LONGEST_RUN = 3
LEVEL = 0.01
WORD = r"\S+"
CONTROL = "leaky control"

Draw = Callable[[Random, World], Asked]


@dataclass(frozen=True)
class Blind:
    """Right answers of `n`; `p` is how often a coin would be as far from a half, two-sided."""

    right: int
    n: int

    @property
    def accuracy(self) -> float:
        return 100 * self.right / self.n

    @property
    def p(self) -> float:
        """Exact, from the binomial distribution."""
        from scipy.stats import binomtest

        return float(binomtest(self.right, self.n, 0.5).pvalue)


def draws_of(world: World) -> dict[str, Draw]:
    """Every category a world can be asked about, the splits of existence among them."""

    def split_draw(split: str) -> Draw:
        return lambda rng, world: ask_about_objects(rng, world, split)

    return {
        **{split: split_draw(split) for split in SPLITS},
        **{name: DRAWS[name] for name in askable(world)},
    }


def blind_accuracy(
    world: World, draw: Draw, name: str, seeds: Sequence[int], questions: int
) -> Blind:
    """For each seed, learn from `questions` and answer as many others; the answers pooled."""
    right = asked = 0
    for seed in seeds:
        learned = collect(world, draw, Random(f"blind {name} {seed} learn"), questions)
        tested = collect(world, draw, Random(f"blind {name} {seed} test"), questions)
        guesses = guess(learned, [one.text for one in tested])
        right += sum(a == one.answer for a, one in zip(guesses, tested, strict=True))
        asked += len(tested)
    return Blind(right, asked)


def collect(world: World, draw: Draw, rng: Random, count: int) -> list[Question]:
    """One question of each of `count` scenes, so that no two of them know of each other."""
    return [rng.choice(draw(rng, world)[1]) for _ in range(count)]


def guess(learned: Sequence[Question], texts: Sequence[str]) -> list[str]:
    """Answers to questions nobody looked up. Raises `DataError` without scikit-learn."""
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise DataError(
            f"the blind baseline needs scikit-learn: {error}", "pip install 'mmmamba[scenes]'"
        ) from error
    words = CountVectorizer(ngram_range=(1, LONGEST_RUN), token_pattern=WORD, binary=True)
    model = LogisticRegression(max_iter=1000)
    model.fit(words.fit_transform([one.text for one in learned]), [one.answer for one in learned])
    return [str(answer) for answer in model.predict(words.transform(texts))]


def ask_leakily(rng: Random, world: World) -> Asked:
    """What a careless generator does: the number asked about is right where it is small."""
    scene, asked = ask_count_pair(rng, world)
    name = scene.things[0].name
    number = rng.choice((1, 1, 1, 2)) if rng.random() < 0.5 else rng.choice((3, 3, 4, 2))
    answer = YES if number <= 2 else NO
    text = say.ask_count(rng, name, number)
    return scene, [Question(asked[0].category, text, answer)]


def blind_table(
    worlds: Mapping[str, World], seeds: Sequence[int], questions: int
) -> Iterator[tuple[str, str, Blind]]:
    """(split, category, result) of each world, and of the control, which must not be near 50 %."""
    for split, world in worlds.items():
        for name, draw in draws_of(world).items():
            yield split, name, blind_accuracy(world, draw, f"{split} {name}", seeds, questions)
    first = next(iter(worlds.values()))
    yield CONTROL, "count", blind_accuracy(first, ask_leakily, "control", seeds, questions)
