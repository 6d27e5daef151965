"""The front page's figure and sentences: what basis convolutions give, what they cost, and when to use them.

Accuracies are of the study ``headline`` (chapters 3 and 5), speeds of the steps that ``speed`` judges (chapter 10).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from basis import figures
from basis.experiments.runs import Record
from basis.experiments.studies import STUDIES, Verdict, records_of, shown_profile
from basis.experiments.studies import headline as study
from basis.experiments.studies.cost import load_benches
from basis.experiments.studies.speed import step_rows
from basis.experiments.studies.study import difference, say
from basis.figures import Theme
from basis.statistics import Estimate
from book.tools.derived import HEADLINE

RULES: Mapping[str, str] = {
    "selected": "selected", "largest first": "largest", "uniform": "uniform", study.NARROWER: "narrower"
}  # fmt: skip


@dataclass(frozen=True)
class Headline:
    """What the records of a profile say in brief.

    ``runs`` is the headline study's frame of dense and the :data:`RULES` (``rule``: a variant without its budget);
    ``steps`` has the row of a training step by ratio r.
    """

    profile: str
    runs: pd.DataFrame
    steps: Mapping[float, Mapping[str, Any]]

    @property
    def device(self) -> str:
        """What the steps were measured on."""
        return next((str(row["device"]) for row in self.steps.values()), "")

    @property
    def gaps(self) -> dict[str, Estimate]:
        """Points of accuracy minus the dense network's at half of the parameters, by the words of :data:`RULES`."""
        halves = {key: study.variant(rule, study.HALF) for rule, key in RULES.items()}
        return {key: difference(self.runs, name, "dense") for key, name in halves.items()}


def stored(profile: str | None = None) -> Headline | None:
    """The headline of the stored records of ``profile``, by default of the one that the book shows."""
    source = STUDIES["headline"]
    shown = profile or shown_profile(source)
    return collect(records_of(source, shown), shown)


def collect(records: Sequence[Record], profile: str) -> Headline | None:
    """The headline of ``profile`` from records of the study ``headline``; None where none can be drawn yet."""
    rules = {study.variant(rule, budget): rule for budget in (study.HALF, study.QUARTER) for rule in RULES}
    runs = STUDIES["headline"].frame(records)
    runs = runs.assign(rule=runs["variant"].map({"dense": "dense", **rules})).dropna(subset="rule")
    enough = {"dense", *RULES} <= set(runs["rule"])
    if not enough or not difference(runs, study.variant("selected", study.HALF), "dense").n:
        return None
    # Times belong to a device, not to the profile that was trained: those of a GPU where there are any.
    benches = (load_benches(device_of, kind="bench-train") for device_of in ("paper", "cpu"))
    steps = next(filter(None, map(step_rows, benches)), {})
    return Headline(profile, runs, dict(sorted(steps.items())))


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
    right.barh(0, 1.0, color=theme.colour("dense"), height=0.62)
    rows = dict(sorted(headline.steps.items(), reverse=True))
    for i, row in enumerate(rows.values(), start=1):
        speed = row["speedup"]
        bar = {"color": theme.colour("uniform"), "height": 0.62, "error_kw": {"ecolor": theme.text, "capsize": 3}}
        right.barh(i, speed, xerr=[[speed - row["speedup_q1"]], [row["speedup_q3"] - speed]], **bar)
        memory = f"{_memory(row):.0%} memory" if _memory(row) else ""
        right.annotate(memory, (0.06, i), va="center", color=theme.background, fontsize=10)
    right.set_yticks(range(1 + len(rows)), ["dense", *(f"r = {Fraction(r)}" for r in rows)])
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    right.set(xlabel="step speed, dense = 1")
    right.set_title("What it gives", fontsize=12)
    return figure


def save(profile: str | None, folder: Path) -> None:
    """Draw the figure of :func:`stored` into ``folder``, if there is one."""
    headline = stored(profile)
    if headline:
        data = headline.runs.drop(columns="validation")
        figures.save(lambda theme: draw(theme, headline), name=HEADLINE, folder=folder, data=data)


def about(headline: Headline) -> dict[str, str]:
    """The figure's name, caption and description, as :func:`book.tools.pages.figure_directive` takes them."""
    return {"name": HEADLINE, "caption": caption(headline), "alt": alt(headline)}


def caption(headline: Headline) -> str:
    """The finding, with every n."""
    text = _say("caption", headline, list(headline.runs.groupby("variant").size())) + " "
    if headline.steps:
        row = next(iter(headline.steps.values()))
        memory = ", and its peak memory against the dense one's" if _memory(row) else ""
        text += say("front page", "steps", device=headline.device, row=row, memory=memory)
    return text


def alt(headline: Headline) -> str:
    """What the picture shows, for someone who does not see it."""
    means = headline.runs.groupby("variant", sort=False)[["accuracy", "parameters"]].mean()
    parts = "; ".join(f"{name}: {row.accuracy:.1f} % at {row.parameters:.0%}" for name, row in means.iterrows())
    speeds = ", ".join(f"{row['speedup']:.2f} at r = {Fraction(r)}" for r, row in headline.steps.items())
    return say("front page", "alt", parts=parts, speeds=speeds or "not measured")


def in_a_minute(headline: Headline | None, switched: Sequence[Verdict] = ()) -> str:
    """A few sentences of Markdown for the front page; ``switched``: the verdicts on the switch within a training."""
    if headline is None:
        return "*The runs behind this summary are not made yet.*"
    speeds = [
        f"{row['speedup']:.2f} [{row['speedup_q1']:.2f}, {row['speedup_q3']:.2f}] times as fast at r = {Fraction(r)}"
        + (f", with {_memory(row):.0%} of the memory" if _memory(row) else "")
        for r, row in sorted(headline.steps.items(), reverse=True)
    ]
    speed = (
        f"A training step of ResNet-18 is {', and '.join(speeds)}, against the fastest dense one ({headline.device})."
    )
    gives = say("front page", "gives", speed=speed if speeds else "No training step is measured yet.")
    costs = _say("costs", headline, [one.n for one in headline.gaps.values()])
    within = [
        say("front page", "switch", finding=one.finding[:1].upper() + one.finding[1:], label=one.label)
        for one in switched
        if one.label != "not tested"
    ]
    return "\n\n".join((gives, costs, *within, say("front page", "when")))


def _memory(row: Mapping[str, Any]) -> float:
    """Peak memory of a step over the dense one's; 0 where it is not measured."""
    return row["peak_mib"] / row["dense_peak_mib"] if row["peak_mib"] else 0.0


def _say(key: str, headline: Headline, counts: Sequence[int]) -> str:
    """A text with how each rule ends at half of the parameters, the scale, and the span of the numbers of runs."""
    n = " to ".join(dict.fromkeys((str(min(counts)), str(max(counts)))))
    gaps = {rule: one.gap() for rule, one in headline.gaps.items()}
    return say("front page", key, n=n, scale=STUDIES["headline"].scale(headline.profile), **gaps)
