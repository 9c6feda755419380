"""The blind baseline: accuracy of a text-only classifier that does not see the pictures.

A suite is valid only if the baseline is near 50 %. Logistic regression on word 1- to 3-grams is
trained on some questions and tested on others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from mmmamba_cli.errors import DataError
from mmmamba_evals.scenes import questions as templates
from mmmamba_evals.scenes.categories import SPLITS
from mmmamba_evals.scenes.questions import NO, YES
from mmmamba_evals.scenes.sampling import (
    DRAWS,
    SceneQuestions,
    ask_about_objects,
    ask_count_pair,
    available_categories,
)
from mmmamba_evals.scenes.scene import Question
from mmmamba_evals.scenes.world import World

MAX_NGRAM = 3
# Significance level of the binomial test.
LEVEL = 0.01
WORD = r"\S+"
CONTROL = "leaky control"

Draw = Callable[[Random, World], SceneQuestions]


@dataclass(frozen=True)
class BlindResult:
    """Correct answers of `n` questions, and the two-sided binomial test against 50 %."""

    right: int
    n: int

    @property
    def accuracy(self) -> float:
        return 100 * self.right / self.n

    @property
    def p(self) -> float:
        """The exact two-sided p-value."""
        from scipy.stats import binomtest

        return float(binomtest(self.right, self.n, 0.5).pvalue)


def category_draws(world: World) -> dict[str, Draw]:
    """The scene generator of each category that the world supports, existence by split."""

    def split_draw(split: str) -> Draw:
        return lambda rng, world: ask_about_objects(rng, world, split)

    return {
        **{split: split_draw(split) for split in SPLITS},
        **{name: DRAWS[name] for name in available_categories(world)},
    }


def blind_accuracy(
    world: World, draw: Draw, name: str, seeds: Sequence[int], questions: int
) -> BlindResult:
    """Train on `questions` questions and test on as many others, pooled over the seeds."""
    right = asked = 0
    for seed in seeds:
        learned = draw_questions(world, draw, Random(f"blind {name} {seed} learn"), questions)
        tested = draw_questions(world, draw, Random(f"blind {name} {seed} test"), questions)
        guesses = predict_answers(learned, [one.text for one in tested])
        right += sum(a == one.answer for a, one in zip(guesses, tested, strict=True))
        asked += len(tested)
    return BlindResult(right, asked)


def draw_questions(world: World, draw: Draw, rng: Random, count: int) -> list[Question]:
    """One question of each of `count` scenes, so that the questions are independent."""
    return [rng.choice(draw(rng, world)[1]) for _ in range(count)]


def predict_answers(learned: Sequence[Question], texts: Sequence[str]) -> list[str]:
    """Predict answers from the text. Raises `DataError` if scikit-learn is not installed."""
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise DataError(
            f"the blind baseline needs scikit-learn: {error}", "pip install 'mmmamba[scenes]'"
        ) from error
    words = CountVectorizer(ngram_range=(1, MAX_NGRAM), token_pattern=WORD, binary=True)
    model = LogisticRegression(max_iter=1000)
    model.fit(words.fit_transform([one.text for one in learned]), [one.answer for one in learned])
    return [str(answer) for answer in model.predict(words.transform(texts))]


def ask_with_bias(rng: Random, world: World) -> SceneQuestions:
    """Positive control, a biased generator: small numbers are the right answer."""
    scene, asked = ask_count_pair(rng, world)
    name = scene.things[0].name
    number = rng.choice((1, 1, 1, 2)) if rng.random() < 0.5 else rng.choice((3, 3, 4, 2))
    answer = YES if number <= 2 else NO
    text = templates.ask_count(rng, name, number)
    return scene, [Question(asked[0].category, text, answer)]


def blind_table(
    worlds: Mapping[str, World], seeds: Sequence[int], questions: int
) -> Iterator[tuple[str, str, BlindResult]]:
    """(split, category, result) for each world, then the control, which must not be near 50 %."""
    for split, world in worlds.items():
        for name, draw in category_draws(world).items():
            yield split, name, blind_accuracy(world, draw, f"{split} {name}", seeds, questions)
    first = next(iter(worlds.values()))
    yield CONTROL, "count", blind_accuracy(first, ask_with_bias, "control", seeds, questions)
