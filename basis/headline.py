"""The front page's figure and its three sentences: what basis convolutions give, what they cost, and when to use them.

Both are computed from records: accuracies of the study ``selection`` (chapter 5), and the measured training
steps that the study ``speed`` judges (chapter 10).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from basis import figures
from basis.figures import Theme
from basis.runs import Record
from basis.statistics import Estimate
from basis.studies import selection
from basis.studies.cost import load_benches
from basis.studies.speed import step_rows
from basis.studies.study import SCALES, spread

RULES: Mapping[str, str] = {"optimal": "chosen by sensitivity", "uniform": "every layer alike"}


@dataclass(frozen=True)
class Headline:
    """What the records say in brief.

    Attributes:
        profile: whose records these are.
        dense: test accuracy of the dense network, in percent.
        chosen: rule of choosing layers -> (% of the dense parameters kept, test accuracy in percent), by size.
        lost: the same rules -> percentage points lost at half of the parameters, where that is measured.
        steps: ratio r -> the measured row of a training step, see :func:`basis.studies.speed.step_rows`.
        device: what the steps were measured on.
    """

    profile: str
    dense: Estimate
    chosen: Mapping[str, Sequence[tuple[float, Estimate]]]
    lost: Mapping[str, Estimate]
    steps: Mapping[float, Mapping[str, Any]]
    device: str


def collect(records: Sequence[Record], profile: str) -> Headline | None:
    """The headline of ``profile`` from records of the study ``selection``; None where none can be drawn yet."""
    whole = selection.of_arm(records, "dense")
    if not whole or not selection.accuracies(records, selection.arm("optimal", "params", 0.5)):
        return None
    percent = spread(records, scale=100)
    chosen = {}
    for rule in RULES:
        points = []
        for budget in sorted(selection.BUDGETS):
            arm = selection.of_arm(records, selection.arm(rule, "params", budget))
            if arm:
                size = 100 * arm[0].result["parameters"] / whole[0].result["parameters"]
                points.append((size, percent.mean([100 * r.result["test"]["accuracy"] for r in arm])))
        chosen[rule] = points
    dense = [100 * r.result["test"]["accuracy"] for r in whole]
    half = {rule: selection.arm(rule, "params", 0.5) for rule in RULES}
    lost = {rule: selection.difference(records, "dense", name) for rule, name in half.items()}
    reports = load_benches(profile, kind="bench-train")
    steps = step_rows(reports)
    device = next((r.environment["device"] for r in reports if any(row in steps.values() for row in r.rows)), "")
    return Headline(profile, percent.mean(dense), chosen, lost, dict(sorted(steps.items())), str(device))


def draw(theme: Theme, headline: Headline) -> Figure:
    """Left: what it costs, accuracy against size. Right: what it gives, the speed-up of a training step."""
    figure = figures.canvas(3.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for (rule, points), colour in zip(headline.chosen.items(), theme.cycle, strict=False):
        line = [*points, (100.0, headline.dense)]
        left.plot([x for x, _ in line], [e.value for _, e in line], color=colour, linewidth=1, zorder=1)
        for i, (x, estimate) in enumerate(points):
            label = None if i else RULES[rule]
            figures.interval(left, x, [estimate.value], color=colour, label=label, mean=estimate)
    dense = theme.colour("dense")
    figures.interval(left, 100, [headline.dense.value], color=dense, label="dense", mean=headline.dense)
    left.set(xscale="log", xlabel="parameters, % of the dense network", ylabel="test accuracy, %")
    left.set_title("What it costs", fontsize=12)
    left.set_xticks([25, 35, 50, 75, 100], ["25", "35", "50", "75", "100"])
    left.minorticks_off()
    left.legend(loc="lower right", fontsize=9.5)
    names = {1.0: "dense", **{r: f"r = {_fraction(r)}" for r in sorted(headline.steps, reverse=True)}}
    for i, (ratio, name) in enumerate(names.items()):
        row = headline.steps.get(ratio)
        speed = 1.0 if row is None else row["speedup"]
        error = None if row is None else [[speed - row["speedup_q1"]], [row["speedup_q3"] - speed]]
        colour = theme.colour(name)
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
    runs = f"n = {min(e.n for points in headline.chosen.values() for _, e in points)} or more runs per point"
    text = (
        f"Left: test accuracy (no test-time augmentation) of {SCALES[headline.profile]} against the parameters that it "
        f"keeps, when every layer has the same share of basis filters and when layers are chosen by their sensitivity; "
        f"{runs}, 95 % intervals from the pooled spread. "
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
        f"{RULES[rule]}: " + ", ".join(f"{e.value:.1f} % at {x:.0f} % of the parameters" for x, e in points)
        for rule, points in headline.chosen.items()
    ]
    speeds = ", ".join(f"{row['speedup']:.2f} at r = {_fraction(r)}" for r, row in headline.steps.items())
    return (
        f"Left, accuracy over size: {'; '.join(parts)}; dense: {headline.dense.value:.1f} %. "
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
    gives = f"A training step of ResNet-18 is {'; and '.join(speeds)}" if speeds else "No training step is measured yet"
    chosen, alike = (headline.lost[rule].text(scale=100) for rule in RULES)
    n = min(estimate.n for estimate in headline.lost.values())
    lines = {
        "What it gives": f"{gives} ({headline.device}). Trained networks become ordinary convolutions again, or stay "
        "small. {doc}`More </notebooks/10_making_it_fast>`.",
        "What it costs": f"At half of the parameters {SCALES[headline.profile]} loses {chosen} points of accuracy "
        f"where the layers are chosen by their sensitivity, and {alike} where every layer is replaced alike "
        f"(95 % intervals, n = {n} or more). {{doc}}`More </notebooks/05_choosing_layers>`.",
        "When to use it": "Where layers are wide, where training time or memory is what you lack, and where you can "
        "afford to measure which layers take it. Not in narrow layers, which gain no time; not where the last tenth of "
        "a point counts, which runs of this scale cannot see.",
    }
    return "\n\n".join(f"**{title}.** {text}" for title, text in lines.items())


def _fraction(ratio: float) -> str:
    return f"1/{1 / ratio:.0f}" if ratio < 1 and (1 / ratio).is_integer() else f"{ratio:g}"
