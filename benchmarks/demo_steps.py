"""Steps of the demo: commands of mmmamba, in lanes, with the work that each of them is.

Imports no torch: the process that shows the progress of the lanes reads them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import log10
from pathlib import Path

from mmmamba_cli.checkpoint import shipped_models
from mmmamba_cli.recipe import load_recipe

TEACHER, RECIPE = "scenes-teacher", "scenes-demo"
# Folders, of which two are runs; and lanes. Lanes of one group run in parallel.
SCENES, HELD_OUT, SEEDED, UNSEEDED = "scenes", "held-out", "seeded", "unseeded"
DRAWING, MEASURING = "drawing", "measuring"
LANE_GROUPS = ((DRAWING,), (SEEDED, UNSEEDED), (MEASURING,))
LANES = tuple(lane for group in LANE_GROUPS for lane in group)
LINEAR, HYBRID, ATTENTION_LAYERS = "linear-stage3", "hybrid-2-stage3", 2
PAGE = "report.html"
# The command word of the token agreement, which is measured by the demo itself.
COMPARE = "compare"
# From random weights W_O must learn too; the recipe freezes it.
SCRATCH = ("--init", "scratch", "--set", "stages.stage3.learns=[model.layers.*.mixer.*]")
# What the shipped students keep and cost, which leads the page.
RESULTS = Path(__file__).resolve().parent / "results"
LEAD = ("scenes_retention_cpu.json", "profile_scenes_long_cpu.json")
TITLE = "From attention to linear layers: what students keep of their teacher"
NOTE = (
    "What the shipped students keep, and when they are faster, was measured before, as each figure "
    "says. Their answers to the pictures below, and the parts from “What was done in this run” on, "
    "were computed by this demo. Each of its own linear students was trained on {seen:,} short "
    "conversations about drawn pictures; the shipped linear student on {needed:,}, about {times:,} "
    "times as many. The demo's students show how training begins; most of their scores are near "
    "chance."
)
# The recipe of the shipped linear student.
SHIPPED_RECIPE = "scenes-long"


@dataclass(frozen=True)
class Sizes:
    """Amounts of work of the demo. The defaults are those of the recipe and of docs/demo.md."""

    pictures: int = 8
    lessons: int = 160
    held_out_lessons: int = 60
    # Training steps of the stages 1 to 3.
    stage_steps: tuple[int, int, int] = (16, 24, 48)
    # Questions per model.
    questions: int = 224
    contexts: str = "256,1k,4k"
    # Seconds of the profile.
    budget: int = 12

    @classmethod
    def reduced(cls, share: float) -> Sizes:
        """Sizes of about `share` of the default work; the same pictures to ask about."""
        full = cls()
        one, two, three = (max(2, round(share * steps)) for steps in full.stage_steps)
        return cls(
            lessons=max(16, round(share * full.lessons)),
            held_out_lessons=max(8, round(share * full.held_out_lessons)),
            stage_steps=(one, two, three),
            questions=max(32, round(share * full.questions)),
            contexts=full.contexts if share >= 0.5 else "256,1k",
            budget=max(4, round(share * full.budget)),
        )

    def stage_settings(self, stages: Sequence[int] = (1, 2, 3)) -> tuple[str, ...]:
        """Options that change the recipe's steps; none for the recipe's own."""
        if self.stage_steps == Sizes.stage_steps:
            return ()
        steps = ((stage, self.stage_steps[stage - 1]) for stage in stages)
        return tuple(
            word for stage, n in steps for word in ("--set", f"stages.stage{stage}.steps={n}")
        )


@dataclass(frozen=True)
class Work:
    """Seconds of work on one idle core, and seconds that pass on any machine alike.

    The work was measured as CPU time on an Intel Xeon core, as was the speed test of
    `demo_estimate.py`. Only their ratio matters: the demo measures how fast this machine is.
    """

    cpu: float
    fixed: float = 0.0


# Start of a process that imports torch and transformers.
START = 4.0
# Per training step of stages 1 to 3, with an even share of loading, hashing and writing.
STAGE_STEP = (0.6, 0.6, 0.68)
PER_QUESTION, PER_PICTURE = 0.025, 0.01
# The budget of the profile grows up to this factor on a busy machine.
MAX_BUDGET_FACTOR = 8.0


@dataclass(frozen=True)
class Step:
    """A command, its purpose, its lane, and the file that marks it as done; None: always run."""

    what: str
    words: tuple[str, ...]
    lane: str
    done: str | None = None
    work: Work = Work(1.0)


def steps(sizes: Sizes, slowdown: float = 1.0) -> Iterator[Step]:
    """All steps in the order of their numbers, with paths relative to the demo's folder.

    Only the time that the profile may take depends on `slowdown`: in the default time a busy
    machine measures next to nothing.
    """
    yield from drawing_steps(sizes)
    yield from seeded_steps(sizes)
    yield from unseeded_steps(sizes)
    yield from measuring_steps(sizes, slowdown)


def drawing_steps(sizes: Sizes) -> Iterator[Step]:
    size = ("--short", "--pictures", str(sizes.pictures), "--lessons", str(sizes.lessons))
    yield Step(
        "scenes for evaluation, and lessons for training",
        ("scenes", "build", "--out", SCENES, *size),
        DRAWING,
        f"{SCENES}/SCENES.tsv",
        Work(6.5 + PER_PICTURE * (8 * sizes.pictures + sizes.lessons)),
    )
    unseen = ("--short", "--pictures", "1", "--lessons", str(sizes.held_out_lessons), "--seed", "1")
    yield Step(
        "held-out lessons",
        ("scenes", "build", "--out", HELD_OUT, *unseen),
        DRAWING,
        f"{HELD_OUT}/lessons.jsonl",
        Work(0.2 + PER_PICTURE * sizes.held_out_lessons),
    )


def seeded_steps(sizes: Sizes) -> Iterator[Step]:
    yield from linear_steps(
        SEEDED, "a student with mixers initialised from the teacher's attention", sizes
    )
    hybrid = HYBRID.removesuffix("-stage3")
    kept = ("--attn-layers", str(ATTENTION_LAYERS))
    yield Step(
        "hybridize: the teacher's attention back into some layers",
        ("hybridize", "--run", SEEDED, *kept),
        SEEDED,
        product(SEEDED, hybrid),
        Work(0.5),
    )
    only_last = ("--from", hybrid, "--stage", "3")
    yield Step(
        "distill: the hybrid's last stage",
        ("distill", "--run", SEEDED, *only_last, *learning(), *sizes.stage_settings((3,))),
        SEEDED,
        product(SEEDED, HYBRID),
        Work(STAGE_STEP[2] * sizes.stage_steps[2]),
    )
    for name, what in ((LINEAR, "the linear student"), (HYBRID, "the hybrid")):
        words = ("eval", "--run", SEEDED, "--from", name, *asking(sizes))
        yield Step(f"eval: {what}", words, SEEDED, work=asked(sizes))


def unseeded_steps(sizes: Sizes) -> Iterator[Step]:
    """Evaluations in this run; the seeded run belongs to the other lane."""
    begin = (*SCRATCH, "--no-report")
    yield from linear_steps(UNSEEDED, "a student with random initial mixers", sizes, begin)
    words = ("eval", "--run", UNSEEDED, "--from", LINEAR, "--teacher", *asking(sizes))
    what = "eval: the unseeded student and the teacher"
    yield Step(what, words, UNSEEDED, work=asked(sizes, models=2))
    for name in shipped_models():
        if name in ("scenes-linear", "scenes-hybrid"):
            words = ("eval", "--run", UNSEEDED, "--model", name, *asking(sizes))
            yield Step(f"eval: {name}, the shipped student", words, UNSEEDED, work=asked(sizes))


def linear_steps(run: str, what: str, sizes: Sizes, extra: Sequence[str] = ()) -> Iterator[Step]:
    """Seeding and three stages; equal for both runs except for `extra`."""
    seed = ("seed", TEACHER, "--recipe", RECIPE, "--run", run, "--dtype", "fp32")
    yield Step(f"seed: {what}", (*seed, *extra), run, product(run, "seed"), Work(START + 1.0))
    yield Step(
        f"distill: three stages, {run}",
        ("distill", "--run", run, *learning(), *sizes.stage_settings()),
        run,
        product(run, LINEAR),
        Work(sum(one * n for one, n in zip(STAGE_STEP, sizes.stage_steps, strict=True))),
    )


def measuring_steps(sizes: Sizes, slowdown: float) -> Iterator[Step]:
    seconds = round(sizes.budget * min(MAX_BUDGET_FACTOR, max(1.0, slowdown)))
    budget = ("--contexts", sizes.contexts, "--budget", str(seconds))
    yield Step(
        "profile: memory and time against context",
        ("profile", "--run", SEEDED, *budget),
        MEASURING,
        f"{SEEDED}/profile/profile.json",
        Work(START + 4.0, fixed=seconds),
    )
    yield Step(
        "compare with the teacher, token by token",
        (COMPARE,),
        MEASURING,
        work=Work(10.0 + 0.3 * sizes.held_out_lessons),
    )
    lead = (word for name in LEAD for word in ("--results", str(RESULTS / name)))
    read = ("--run", SEEDED, "--beside", UNSEEDED, "--data", SCENES, *lead)
    words = ("report", *read, "--title", TITLE, "--note", note(sizes), "--out", PAGE)
    yield Step("report", words, MEASURING, work=Work(2.0))


def note(sizes: Sizes) -> str:
    """The sentence below the heading, with the conversations of this demo's training."""
    batches = [stage.batch_size for stage in _recipe(RECIPE).stages]
    seen = sum(n * batch for n, batch in zip(sizes.stage_steps, batches, strict=True))
    needed = sum(stage.steps * stage.batch_size for stage in _recipe(SHIPPED_RECIPE).stages)
    # Two digits: more would say nothing.
    digits = 1 - int(log10(needed / seen))
    return NOTE.format(seen=seen, needed=needed, times=int(round(needed / seen, digits)))


_recipe = cache(load_recipe)


def product(run: str, name: str) -> str:
    return f"{run}/products/{name}/manifest.json"


def learning() -> tuple[str, ...]:
    return ("--data", f"{SCENES}/lessons.jsonl", "--image-root", SCENES)


def asking(sizes: Sizes) -> tuple[str, ...]:
    limit = () if sizes.questions == Sizes.questions else ("--limit", str(sizes.questions))
    return ("--suite", "scenes", "--data", SCENES, *limit)


def asked(sizes: Sizes, models: int = 1) -> Work:
    return Work(models * (1.0 + PER_QUESTION * sizes.questions))
