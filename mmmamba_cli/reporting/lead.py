"""The lead of a page: what the students keep, when they are faster, and three pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmmamba_cli.profiling import Profile
from mmmamba_cli.reporting.charts import Bar, bars
from mmmamba_cli.reporting.examples import Example
from mmmamba_cli.reporting.html import Markup, figure, join_markup, paragraph, section, tag
from mmmamba_cli.reporting.models import ModelDetails
from mmmamba_cli.reporting.retention import Kept, Share, known_suite, retention_table
from mmmamba_cli.reporting.scores import GUESSING, RIGHT, WRONG, example_cards
from mmmamba_cli.reporting.speed import headline, speed_figure

ABOUT = (
    "mmmamba turns a trained vision-language model with attention, the teacher, into students in "
    "which {mixers} replace attention: in all layers (linear) or in most of them (hybrid). This "
    "page shows what students keep of their teacher's answers, and from which length of context on "
    "they are faster."
)
EXAMPLE_CATEGORIES, EXAMPLE_QUESTIONS = 3, 2


@dataclass(frozen=True)
class Lead:
    """Contents of the lead. `source` says where the scores come from, `profile_source` the costs.

    `labels` are the names of the profile's subjects on the page.
    """

    kept: Sequence[Kept]
    source: Markup
    profile: Profile | None
    profile_source: str
    labels: Mapping[str, str]
    details: Mapping[str, ModelDetails]
    examples: Sequence[Example] = ()
    asked_of: str = ""

    @property
    def mixers(self) -> list[str]:
        """The titles of the mixers of the students."""
        names = [*(one.student for one in self.kept), *self.labels.values()]
        known = [self.details[name].mixer for name in names if name in self.details]
        return list(dict.fromkeys(one for one in known if one is not None))

    @property
    def nouns(self) -> dict[str, str]:
        """Students as a sentence names them: "the linear student" where that is unique, else the
        label."""
        kept = list(dict.fromkeys(one.student for one in self.kept))
        found = self._unique(kept, kept)
        others = [name for name in self.labels.values() if name not in found]
        return found | self._unique(others, [*kept, *others])

    def _unique(self, names: Sequence[str], among: Sequence[str]) -> dict[str, str]:
        nouns = [self.details[name].noun for name in among if name in self.details]
        found = {}
        for name in names:
            noun = self.details[name].noun if name in self.details else name
            found[name] = f"the {noun}" if noun != name and nouns.count(noun) == 1 else name
        return found


def summary_sentences(lead: Lead) -> list[str]:
    """What the students keep of the teacher's score, and when they are faster."""
    suites: list[str] = []
    named: list[str] = []
    for suite in dict.fromkeys(one.suite for one in lead.kept):
        known = [one for one in lead.kept if one.suite == suite and one.headline is not None]
        students = [one.student for one in known]
        shares = [_kept_of(one, not suites and one is known[0]) for one in known]
        # Students of the first suite need not be named again.
        if students != named:
            shares = [
                f"{lead.nouns[one.student]} {share}"
                for one, share in zip(known, shares, strict=True)
            ]
        suites += [f"on {suite}, {_listed(shares, students == named)}"] if shares else []
        named = named or students
    found = [f"O{'; '.join(suites)[1:]}."] if suites else []
    if lead.profile is not None:
        faster = headline(lead.profile, subject_nouns(lead))
        found += [] if faster is None else [faster]
    return found


def _kept_of(one: Kept, first: bool) -> str:
    """The retention; the `first` one says of what it is."""
    assert one.headline is not None
    share = f"{one.headline.value:.0f} %"
    if not first:
        return share
    return f"keeps {share} of its teacher's score{'' if one.chance is None else ' above chance'}"


def _listed(shares: Sequence[str], bare: bool) -> str:
    """Shares of students; with "and" where they are numbers alone."""
    return (" and " if bare and len(shares) == 2 else ", ").join(shares)


def subject_nouns(lead: Lead) -> dict[str, str]:
    """The subjects of the profile as a sentence names them."""
    return {name: lead.nouns.get(label, label) for name, label in lead.labels.items()}


def lead_sections(lead: Lead, series: Mapping[str, int]) -> dict[str, Markup]:
    """The sections by the name of their part; empty without scores and costs."""
    parts: dict[str, Markup] = {}
    if lead.kept:
        parts["retention"] = _retention_section(lead, series)
    if lead.profile is not None:
        drawn = speed_figure(
            lead.profile, series, lead.labels, subject_nouns(lead), lead.profile_source
        )
        if drawn is not None:
            title = "When the students are faster, and how much memory they need"
            parts["crossing"] = section("crossing", title, drawn)
    if lead.examples:
        parts["pictures"] = _examples(lead.examples, series, lead.asked_of)
    return parts


def _retention_section(lead: Lead, series: Mapping[str, int]) -> Markup:
    suites = dict.fromkeys(one.suite for one in lead.kept)
    panels = [_panel([one for one in lead.kept if one.suite == suite], series) for suite in suites]
    tables, asked = [], []
    for suite in suites:
        kept = [one for one in lead.kept if one.suite == suite]
        known = known_suite(suite)
        note = "" if known is None or not known.note else f". {known.note}"
        asked.append(f"{suite} has {kept[0].questions:,} {kept[0].title}{note}")
        tables.append(retention_table(f"{suite}, {kept[0].metric} in %", kept))
    return section(
        "retention",
        "What the students keep of their teacher's answers",
        *(paragraph(f"{one.rstrip('.')}.") for one in asked),
        figure(
            tag("div", *panels, class_="panels"),
            join_markup(
                (
                    "Scores in percent; higher is better. Whiskers are 95 % intervals over whole "
                    "pictures; the dashed line is chance. ",
                    lead.source,
                )
            ),
        ),
        join_markup(tables),
        paragraph(
            "Kept above chance is (score - chance) / (teacher's score - chance): a student that "
            "guesses keeps 0. Its intervals are paired: each draw takes the same pictures for "
            "student and teacher.",
            class_="small",
        ),
    )


def _panel(kept: Sequence[Kept], series: Mapping[str, int]) -> Markup:
    first = kept[0]
    scores: list[tuple[str, Share, Share | None]] = [(first.teacher, first.teacher_score, None)]
    scores += [(one.student, one.student_score, one.headline) for one in kept]
    rows = [
        Bar(
            label
            if share is None
            else f"{label}: keeps {share.value:.1f} %"
            + ("" if first.chance is None else " above chance"),
            score.value,
            series[label],
            score.interval,
        )
        for label, score, share in scores
    ]
    high = 100.0 if max(row.value for row in rows) <= 100 else None
    chart = bars(
        f"{first.suite}, {first.metric}",
        rows,
        high=high,
        reference=None if first.chance is None or high is None else (first.chance, GUESSING),
        show=lambda value: f"{value:.1f}",
    )
    return tag("div", tag("h3", first.suite), chart)


def _examples(examples: Sequence[Example], series: Mapping[str, int], asked_of: str) -> Markup:
    return section(
        "pictures",
        "The same questions to teacher and students",
        paragraph(
            f"The first picture of each of {len(examples)} categories{asked_of}. Categories and "
            "pictures were taken by their place in the table of questions, not by the answers. "
            f"{RIGHT} is right, {WRONG} is wrong."
        ),
        example_cards(examples, series),
    )


def about_paragraph(mixers: Sequence[str] = ()) -> Markup:
    """What the page is, in two sentences; `mixers` are those of the students."""
    named = f" ({', '.join(mixers)})" if mixers else ""
    return paragraph(ABOUT.format(mixers=f"mixers of constant memory{named}"))
