"""Plot of a profile by matplotlib: latency, memory and prefill over the context."""

from __future__ import annotations

import io
from typing import Any

from mmmamba_cli.profiling.interfaces import AS_SHIPPED, EAGER, STATIC_TEACHER, TRANSFORMERS, TUNED
from mmmamba_cli.profiling.report import TITLES, memory_name
from mmmamba_cli.profiling.result import DECODE, OUT_OF_MEMORY, PREFILL, Profile, SubjectPart, Task

MATPLOTLIB_INSTALL = "pip install 'mmmamba[tracking]'"

# Baselines are grey, students in colours for colour-blind readers (Okabe and Ito, 2008).
BASELINE_STYLES = {
    AS_SHIPPED: ("#222222", "-", "s"),
    STATIC_TEACHER: ("#777777", "--", "D"),
    TUNED: ("#777777", "--", "D"),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PANEL_WIDTH, HEIGHT, DPI = 4.6, 4.8, 150
# Units of the axes, in seconds or bytes.
UNITS = {"milliseconds": 1e-3, "seconds": 1, "MiB": 2**20, "GiB": 2**30}
MAX_CONTEXT_TICKS = 6


def render_plot(profile: Profile, kind: str = "png") -> bytes | None:
    """The figure as "png" or "svg" with the comparison as metadata; None without matplotlib."""
    try:
        from matplotlib import rc_context

        figure = make_figure(profile)
    except ImportError:
        return None
    file = io.BytesIO()
    metadata = {"Description": f"{profile.compared}. Memory: {memory_name(profile)}."}
    if kind == "svg":
        metadata |= {"Date": profile.created}
    # A fixed salt makes the SVG reproducible.
    with rc_context({"svg.hashsalt": "mmmamba"}):
        figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
    return file.getvalue()


def make_figure(profile: Profile) -> Any:
    """A matplotlib Figure of latency, memory and prefill over the context, all axes logarithmic."""
    from matplotlib.figure import Figure

    tasks: list[Task] = [DECODE, PREFILL] if profile.plan.prefill else [DECODE]
    panels = len(tasks) + 1
    figure = Figure(figsize=(PANEL_WIDTH * panels, HEIGHT), layout="constrained")
    axes = list(figure.subplots(1, panels))
    axes[0].set(title="next token", ylabel=_draw(axes[0], profile, DECODE, "latency"))
    unit = _draw(axes[1], profile, DECODE, "memory")
    counted = "peak memory" if profile.device.type == "cuda" else "weights and cache"
    axes[1].set(title=f"{counted} while decoding", ylabel=unit)
    if len(tasks) > 1:
        unit = _draw(axes[2], profile, PREFILL, "latency")
        axes[2].set(title=TITLES[PREFILL], ylabel=unit)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False
    )
    ways = {subject.way for subject in profile.subjects if subject.role != AS_SHIPPED}
    how = {EAGER: ", eager", TRANSFORMERS: ", by transformers"}.get(min(ways, default=""), "")
    how = how if len(ways) == 1 else ""
    figure.suptitle(
        f"{profile.device.name}, {profile.dtype}, batch {profile.plan.batch}{how}", fontsize=11
    )
    return figure


def _draw(axes: Any, profile: Profile, task: Task, what: str) -> str:
    """Draw a line per subject up to its out-of-memory context; return the unit of the values."""
    unit = _unit(profile, task, what)
    colours = iter(COLOURS * len(profile.subjects))
    contexts = profile.plan.lengths(task)
    is_empty = True
    for subject in profile.subjects:
        colour, line, marker = BASELINE_STYLES.get(subject.role) or (next(colours), "-", "o")
        points = _points(profile, subject, task, unit)
        is_empty = is_empty and not points
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=4.5,
            linewidth=1.8,
            label=subject.name,
        )
        refused = [
            c
            for c in contexts
            if (found := profile.find(subject.name, task, c)) and found.status == OUT_OF_MEMORY
        ]
        if refused:
            axes.axvline(refused[0], color=colour, linestyle=":", linewidth=1, alpha=0.7)
            axes.annotate(
                f"{subject.name}:\nout of memory",
                (refused[0], 0.03),
                xycoords=("data", "axes fraction"),
                rotation=90,
                fontsize=7,
                color=colour,
                ha="right",
                va="bottom",
            )
    if is_empty:
        # A logarithmic axis needs a value.
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing was measured", ha="center", transform=axes.transAxes)
    else:
        _format_axes(axes, contexts)
    return unit


def _unit(profile: Profile, task: Task, what: str) -> str:
    if what == "latency":
        return "milliseconds" if task == DECODE else "seconds"
    largest = max((m.memory.total for m in profile.measurements if m.memory), default=0)
    return "MiB" if largest < UNITS["GiB"] else "GiB"


def _points(
    profile: Profile, subject: SubjectPart, task: Task, unit: str
) -> list[tuple[int, float]]:
    found = []
    for context in profile.plan.lengths(task):
        one = profile.find(subject.name, task, context)
        if one is None or one.median is None or one.memory is None:
            continue
        value = one.memory.total if unit in ("MiB", "GiB") else one.median
        found.append((context, value / UNITS[unit]))
    return found


def _format_axes(axes: Any, contexts: list[int]) -> None:
    """Set logarithmic axes with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    stride = -(-len(contexts) // MAX_CONTEXT_TICKS)
    shown = contexts[::-1][::stride]
    axes.set_xticks(shown, [_format_tokens(context) for context in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if len(contexts) > 1:
        axes.set_xlim(contexts[0] / 1.15, contexts[-1] * 1.15)
    low, high = axes.get_ylim()
    # An axis spans at least a factor of four, so that a flat line looks flat.
    if high < 4 * low:
        middle = (low * high) ** 0.5
        axes.set_ylim(middle / 2, middle * 2)
    axes.set_xlabel("context, tokens")
    axes.grid(alpha=0.25, which="major")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _format_tokens(context: int) -> str:
    """Format 8192 as 8K, 1048576 as 1M and other numbers in full."""
    for unit, letter in ((2**20, "M"), (2**10, "K")):
        if context % unit == 0:
            return f"{context // unit}{letter}"
    return f"{context:,}"
