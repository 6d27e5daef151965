"""The front page's figure and its three sentences: what basis convolutions give, what they cost, and when to use them.

Both are computed from records: accuracies of the study ``headline`` (chapters 3 and 5), and the measured training
steps that the study ``speed`` judges (chapter 10).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from basis import figures
from basis.experiments.runs import Record
from basis.experiments.studies import headline as study
from basis.experiments.studies.cost import load_benches
from basis.experiments.studies.speed import step_rows
from basis.figures import Theme
from basis.statistics import Estimate, mean_estimate

RULES = ("selected", "largest first", "uniform", study.NARROWER)
BUDGETS = (study.HALF, study.QUARTER)


@dataclass(frozen=True)
class Headline:
    """What the records say in brief.

    Attributes:
        profile: whose records these are.
        runs: a row a run of dense and of the :data:`RULES`, see :func:`basis.experiments.studies.headline.frame`; ``rule`` is the
            variant without its budget.
        steps: ratio r -> the measured row of a training step, see :func:`basis.experiments.studies.speed.step_rows`.
        device: what the steps were measured on.
    """

    profile: str
    runs: pd.DataFrame
    steps: Mapping[float, Mapping[str, Any]]
    device: str

    def lost(self, rule: str) -> Estimate:
        """Percentage points lost against dense at half of the parameters."""
        return study.difference(self.runs, "dense", study.variant(rule, study.HALF))


def collect(records: Sequence[Record], profile: str) -> Headline | None:
    """The headline of ``profile`` from records of the study ``headline``; None where none can be drawn yet."""
    rules = {"dense": "dense"} | {study.variant(rule, budget): rule for budget in BUDGETS for rule in RULES}
    runs = study.frame(records)
    runs = runs.assign(rule=runs["variant"].map(rules)).dropna(subset="rule")
    if (
        not {"dense", *RULES} <= set(runs["rule"])
        or not study.difference(runs, "dense", study.variant("selected", study.HALF)).n
    ):
        return None
    # Times belong to a device, not to the profile that was trained: those of a GPU where there are any.
    benches = [load_benches(device_of, kind="bench-train") for device_of in ("paper", "cpu")]
    reports = next((found for found in benches if step_rows(found)), [])
    steps = step_rows(reports)
    device = next((r.environment["device"] for r in reports if any(row in steps.values() for row in r.rows)), "")
    return Headline(profile, runs, dict(sorted(steps.items())), str(device))


def draw(theme: Theme, headline: Headline) -> Figure:
    """Left: what it costs, accuracy against size. Right: what it gives, the speed-up of a training step."""
    figure = figures.canvas(3.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    runs = figures.side_by_side(headline.runs, "parameters", by="rule")
    look = {"x": "parameters", "y": "accuracy", "hue": "rule", "palette": {r: theme.colour(r) for r in runs["rule"]}}
    bars = {"errorbar": figures.student, "err_style": "bars", "err_kws": {"capsize": 3}, "markeredgewidth": 0}
    sns.lineplot(runs, **look, **bars, marker="o", ax=left)
    sns.scatterplot(runs, **look, alpha=0.35, s=14, legend=False, ax=left)
    left.xaxis.set_major_formatter("{x:.0%}")
    left.set(xlabel="parameters, share of the dense network", ylabel="test accuracy, %")
    left.set_title("What it costs", fontsize=12)
    left.legend(loc="lower right", fontsize=9.5)
    names = {1.0: "dense", **{r: f"r = {_fraction(r)}" for r in sorted(headline.steps, reverse=True)}}
    for i, ratio in enumerate(names):
        row = headline.steps.get(ratio)
        speed = 1.0 if row is None else row["speedup"]
        error = None if row is None else [[speed - row["speedup_q1"]], [row["speedup_q3"] - speed]]
        colour = theme.colour("uniform" if row else "dense")
        right.barh(i, speed, xerr=error, color=colour, height=0.62, error_kw={"ecolor": theme.text, "capsize": 3})
        memory = "" if row is None or not row["peak_mib"] else f"{row['peak_mib'] / row['dense_peak_mib']:.0%} memory"
        right.annotate(memory, (0.06, i), va="center", color=theme.background, fontsize=10)
    right.set_yticks(range(len(names)), list(names.values()))
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    right.set(xlabel="step speed, dense = 1")
    right.set_title("What it gives", fontsize=12)
    return figure


def caption(headline: Headline) -> str:
    """The finding, with every n."""
    counts = headline.runs.groupby("variant").size()
    text = (
        f"Left: test accuracy without test-time augmentation ({study.SCALES[headline.profile]}) against the "
        f"parameters that are kept. At half of them the layers selected by sensitivity lose "
        f"{headline.lost('selected').text()} points, the largest layers first "
        f"{headline.lost('largest first').text()}, one ratio for all layers {headline.lost('uniform').text()}, and a "
        f"narrower dense network {headline.lost(study.NARROWER).text()} (95 % intervals, n = {_span(counts)} seeds per "
        "point; points of one size stand side by side). "
    )
    if headline.steps:
        measured = next(iter(headline.steps.values()))
        text += (
            f"Right: measured speed of a whole training step of ResNet-18 with every layer replaced "
            f"({headline.device}; medians and quartiles of {measured['n']} interleaved rounds, against the dense step "
            f"by the same means: {measured['step']}), and its peak memory against the dense one's."
        )
    return text


def alt(headline: Headline) -> str:
    """What the picture shows, for someone who does not see it."""
    parts = [
        f"{name}: {mean_estimate(list(group['accuracy'])).value:.1f} % at {group['parameters'].mean():.0%}"
        for name, group in headline.runs.groupby("variant", sort=False)
    ]
    speeds = ", ".join(f"{row['speedup']:.2f} at r = {_fraction(r)}" for r, row in headline.steps.items())
    return (
        f"Left, accuracy over the share of the parameters: {'; '.join(parts)}. "
        f"Right, bars of the speed of a training step, dense 1: {speeds or 'not measured'}."
    )


def in_a_minute(headline: Headline | None) -> str:
    """Three sentences of Markdown for the front page."""
    if headline is None:
        return "*The runs behind this summary are not made yet.*"
    speeds = [
        f"{row['speedup']:.2f} [{row['speedup_q1']:.2f}, {row['speedup_q3']:.2f}] times as fast at r = {_fraction(r)}"
        + (f", with {row['peak_mib'] / row['dense_peak_mib']:.0%} of the memory" if row["peak_mib"] else "")
        for r, row in sorted(headline.steps.items(), reverse=True)
    ]
    gives = "No training step is measured yet."
    if speeds:
        gives = f"A training step of ResNet-18 is {'; and '.join(speeds)} ({headline.device})."
    lost = {rule: headline.lost(rule) for rule in RULES}
    selected, largest, uniform, narrower = (lost[rule].text() for rule in RULES)
    lines = {
        "What it gives": f"{gives} Trained networks become ordinary convolutions again, or stay small. "
        "{doc}`More </notebooks/10_making_it_fast>`.",
        "What it costs": f"At half of the parameters the network ({study.SCALES[headline.profile]}) loses {selected} "
        f"points of accuracy where the layers are selected by sensitivity, {largest} where the largest are replaced "
        f"first, {uniform} where all have one ratio, and {narrower} as a narrower dense network (95 % intervals, "
        f"n = {_span([e.n for e in lost.values()])} seeds). {{doc}}`More </notebooks/05_choosing_layers>`.",
        "When to use it": "Where layers are wide, where training time or memory is what you lack, and where you can "
        "afford to measure which layers take it. Not in narrow layers, which gain no time; not where the last tenth of "
        "a point counts.",
    }
    return "\n\n".join(f"**{title}.** {text}" for title, text in lines.items())


def _span(counts: Sequence[int] | pd.Series[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _fraction(ratio: float) -> str:
    return f"1/{1 / ratio:.0f}" if ratio < 1 and (1 / ratio).is_integer() else f"{ratio:g}"
