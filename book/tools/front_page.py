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
from basis.experiments.studies import STUDIES, records_of, shown_profile
from basis.experiments.studies import headline as study
from basis.experiments.studies.cost import interval, load_benches
from basis.experiments.studies.speed import step_rows
from basis.experiments.studies.study import difference, say
from basis.figures import Theme
from basis.statistics import Estimate
from book.tools.derived import HEADLINE

RULES = ("selected", "largest first", "uniform", study.NARROWER)
BUDGETS = (study.HALF, study.QUARTER, study.HALF_MACS)


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

    def won(self, budget: tuple[str, float]) -> Estimate:
        """Points of accuracy of the selected layers minus those of a narrower dense network of that budget."""
        return difference(self.runs, *(study.variant(rule, budget) for rule in ("selected", study.NARROWER)))


def stored(profile: str | None = None) -> Headline | None:
    """The headline of the stored records of ``profile``, by default of the one that the book shows."""
    source = STUDIES["headline"]
    shown = profile or shown_profile(source)
    return collect(records_of(source, shown), shown)


def collect(records: Sequence[Record], profile: str) -> Headline | None:
    """The headline of ``profile`` from records of the study ``headline``; None where none can be drawn yet."""
    rules = {study.variant(rule, budget): rule for budget in BUDGETS for rule in RULES}
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
    """Accuracy of one network against its parameters and its MACs; a line joins dense networks of several widths."""
    figure = figures.canvas(3.5)
    panels = figure.subplots(1, 2, sharey=True)
    runs = headline.runs
    widths = runs["rule"].isin(["dense", study.NARROWER]) & ~runs["variant"].str.endswith("MACs")
    palette = {rule: theme.colour(rule) for rule in runs["rule"]}
    bars = {"errorbar": figures.student, "err_style": "bars", "err_kws": {"capsize": 3}, "markeredgewidth": 0}
    for axes, size in zip(panels, ("parameters", "MACs"), strict=True):
        apart = figures.side_by_side(runs, size, by="rule")
        line = {"color": theme.colour(study.NARROWER), "errorbar": None}
        sns.lineplot(apart[widths], x=size, y="accuracy", **line, ax=axes)
        look = {"x": size, "y": "accuracy", "hue": "rule", "palette": palette}
        sns.lineplot(apart, **look, **bars, linestyle="none", marker="o", ax=axes)
        sns.scatterplot(apart, **look, alpha=0.35, s=14, legend=False, ax=axes)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.set(xlabel=f"{size}, share of dense", ylabel="test accuracy, %")
        keys = axes.get_legend_handles_labels()
        axes.get_legend().remove()
    figure.legend(*keys, loc="outside lower center", ncols=5, fontsize=10)
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
    counts, won, even = headline.runs.groupby("variant").size(), headline.won(study.HALF), headline.won(study.HALF_MACS)
    return say(
        "front page", "caption", scale=STUDIES["headline"].scale(headline.profile), worth=won.gap(),
        work=f"{even.gap()} such a network (n = {even.n})" if even.n else "not compared yet",
        n=" to ".join(dict.fromkeys((str(counts.min()), str(counts.max())))),
    )  # fmt: skip


def alt(headline: Headline) -> str:
    """What the picture shows, for someone who does not see it."""
    means = headline.runs.groupby("variant", sort=False)[["accuracy", "parameters", "MACs"]].mean()
    parts = (f"{n}: {m.accuracy:.1f} % at {m.parameters:.0%} and {m.MACs:.0%}" for n, m in means.iterrows())
    return say("front page", "alt", parts="; ".join(parts))


def numbers(headline: Headline | None) -> str:
    """Three numbers as Markdown: what the selection costs, what it is worth, and what a training step gains."""
    if headline is None:
        return "*The runs behind these numbers are not made yet.*"
    lost = difference(headline.runs, study.variant("selected", study.HALF), "dense")
    won = headline.won(study.HALF)
    scale = STUDIES["headline"].scale(headline.profile).partition(",")[0]
    told = [
        (lost.text(signed=True), say("front page", "cost", scale=scale, n=lost.n)),
        (won.text(signed=True), say("front page", "worth", scale=scale, n=won.n)),
    ]
    for r, row in list(headline.steps.items())[:1]:
        memory = f" and {_memory(row):.0%} of the memory" if _memory(row) else ""
        told.append(
            (f"{interval(row)} ×", say("front page", "speed", r=Fraction(r), device=headline.device, memory=memory))
        )
    return "\n\n".join(f":::{{div}} basis-number\n**{number}** {words}\n:::" for number, words in told)


def _memory(row: Mapping[str, Any]) -> float:
    """Peak memory of a step over the dense one's; 0 where it is not measured."""
    return row["peak_mib"] / row["dense_peak_mib"] if row["peak_mib"] else 0.0
