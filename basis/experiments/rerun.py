"""The reader's own runs: a few variants of a study, trained here and set beside the published results."""

from __future__ import annotations

import importlib
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from basis import figures
from basis.environment import is_published, repository_root, results_folder
from basis.experiments.campaign import missing
from basis.experiments.estimates import estimate, minutes, name_of, timed_runs
from basis.experiments.records import Record
from basis.experiments.runner import Order, Task, in_processes
from basis.experiments.runs import Run, device_for, duration
from basis.experiments.studies import STUDIES, find_study, records_of, shown_profile
from basis.experiments.studies import sensitivity as sensitivity_study
from basis.experiments.studies.study import listed
from basis.progress import bar
from basis.statistics import mean_estimate, paired_difference

DRIVE = "/content/drive"


def own_folder(*, keep_in_drive: bool = False) -> Path:
    """Where a reader's own runs are kept: ``$BASIS_RESULTS``, unless published runs are there; else ``my-results``.

    On Colab, ``keep_in_drive`` mounts Google Drive and takes its folder ``basis-results``, which outlives the session.
    Raises ``ValueError`` for that elsewhere.
    """
    if keep_in_drive:
        try:
            importlib.import_module("google.colab.drive").mount(DRIVE)
        except ModuleNotFoundError as error:
            raise ValueError("keep_in_drive is for Colab; elsewhere name a folder in BASIS_RESULTS") from error
        return Path(DRIVE) / "MyDrive" / "basis-results"
    named = os.environ.get("BASIS_RESULTS")
    return Path(named) if named and not is_published(Path(named)) else (repository_root() or Path.cwd()) / "my-results"


@dataclass(frozen=True)
class Rerun:
    """The reader's own runs beside the published ones.

    Attributes:
        note: Markdown, what was done and what is left.
        runs: a row a value: ``variant``, ``seed``, ``value``, ``unit``, and ``whose``: "yours" or the published scale.
        variants: what is compared.
        paired: whether the others are compared with the first of them, by seed.
    """

    note: str
    runs: pd.DataFrame
    variants: tuple[str, ...]
    paired: bool = True

    @property
    def any(self) -> bool:
        """Whether the reader has a run of their own."""
        return bool((self.runs["whose"] == "yours").any())

    def table(self) -> str:
        """A Markdown table: a mean for each variant or, paired, its difference from the first, yours and published."""
        sides = {str(whose): side for whose, side in self.runs.groupby("whose", sort=False)}
        rows = []
        for name in self.variants:
            cells = []
            for side in sides.values():
                by_seed = {n: group.set_index("seed")["value"] for n, group in side.groupby("variant")}
                one, base = (by_seed.get(n, pd.Series(dtype=float)) for n in (name, self.variants[0]))
                differs = self.paired and name != self.variants[0]
                found = paired_difference(one, base) if differs else mean_estimate(list(one))
                text = found.text(signed=differs) if self.paired else f"{found.value:.2f}"
                cells.append(f"{text} (n = {found.n})" if found.n else "–")
            rows.append((name, *cells))
        unit = f"{next(iter(self.runs['unit']), '')}{'; from the second row on the difference' * self.paired}"
        return figures.table((unit, *sides), rows) if sides else ""

    def show(self, name: str) -> None:
        """Show the note and the table in a notebook and, if there are runs of the reader's own, the figure ``name``."""
        from IPython.display import Markdown, display

        display(Markdown(f"{self.note}\n\n{self.table()}"))
        if self.any:
            alt = f"Dots of single runs, the reader's own and the published ones: {', '.join(self.variants)}."
            figures.show(self.draw, name=name, caption="Every dot is a run.", alt=alt, data=self.runs)

    def draw(self, theme: figures.Theme) -> Figure:
        """Every run as a dot, the reader's own in colour."""
        figure = figures.canvas(0.55 * len(self.variants) + 1.3)
        axes = figure.subplots()
        colours = {whose: theme.cycle[0] if whose == "yours" else theme.muted for whose in self.runs["whose"]}
        look = {"x": "value", "y": "variant", "hue": "whose", "order": list(self.variants), "palette": colours}
        sns.stripplot(self.runs, **look, dodge=True, size=7, jitter=False, alpha=0.8, ax=axes)
        axes.set(xlabel=next(iter(self.runs["unit"]), ""), ylabel="")
        axes.legend(title=None, loc="best")
        return figure


def rerun(
    study: str, variants: Sequence[str], *, seeds: int = 2, profile: str = "small", train: bool = True,
    time_limit: str = "9m", keep_in_drive: bool = False, say: Callable[[str], object] = print,
) -> Rerun:  # fmt: skip
    """Train ``seeds`` runs of each of the variants in a folder of the reader's own, and compare them with the book's.

    What is there already is not done again, so a cell that was stopped goes on. Without ``train``, or where a machine
    without a GPU could not finish within ``time_limit``, nothing is trained, and the note says what it would take.
    ``say`` is told what begins. Raises ``ValueError`` for an unknown study or variant, ``seeds`` below 1, a duration
    that is none, and as :func:`own_folder` does.
    """
    chosen, seconds = chosen_runs(study, variants, seeds, profile), duration(time_limit)
    folder = own_folder(keep_in_drive=keep_in_drive and train)
    place = name_of(device_for(profile))
    tasks = [Task(run, STUDIES[run.study].definition) for run in chosen]
    left, known = missing(tasks, folder), timed_runs(folder, profile)
    needed = estimate([task.run for task in left], place, known)
    many = f"{len(left)} run{'s' * (len(left) != 1)}"
    where = "this CPU" if place == "cpu" else f"this {place}"
    on_t4 = minutes(estimate(chosen, "Tesla T4", known))
    if not left:
        note = f"All {len(tasks)} runs of your own are done; they are kept in `{folder.name}`."
    elif not train:
        note = f"{len(chosen)} runs, {on_t4} on a T4 of Colab. Set `run_missing = True` to train them."
    elif place == "cpu" and needed is not None and needed > seconds:
        note = (
            f"{many} would take {minutes(needed)} on {where}, more than the `time_limit` of {time_limit}, so nothing "
            f"was trained, and nothing is kept. A longer `time_limit` trains them here; a T4 of Colab needs {on_t4}."
        )
    else:
        say(f"{many}, {minutes(needed)} on {where}; what is done is kept in {folder}")
        note = _do(left, folder, time.time() + seconds)
    return Rerun(note, _both(study, variants, profile, folder), labels(study, variants), paired=study != "sensitivity")


def home(study: str, variant: str, profile: str) -> tuple[str, str]:
    """The study that lists the variant, and its name there: this study, or ``headline``, whose runs others share."""
    one = find_study(study)
    names = dict.fromkeys(run.variant for run in listed(one, profile).values())
    theirs = {ours: name for name, ours in one.shared.items()}
    if variant not in names and variant not in theirs:
        raise ValueError(f"{study} has no variant {variant!r}; it has: {'; '.join([*names, *theirs])}")
    return (study, variant) if variant in names else ("headline", theirs[variant])


def chosen_runs(study: str, variants: Sequence[str], seeds: int, profile: str) -> list[Run]:
    """The first ``seeds`` runs of each variant, seed by seed.

    Runs that measure the sensitivities of others come first, unless they are published.
    """
    if seeds < 1 or not variants:
        raise ValueError(f"seeds is {seeds} and variants {list(variants)}, but there must be one or more")
    homes = [home(study, name, profile) for name in variants]
    known = [listed(STUDIES[one], profile).values() for one, _ in homes]
    own = ([run for run in runs if run.variant == name] for (_, name), runs in zip(homes, known, strict=True))
    runs = [run for one in zip(*(some[:seeds] for some in own), strict=False) for run in one]
    tables = {run.choice.table for run in runs if run.choice}
    tables -= {path.stem for path in results_folder().glob("*/*/*.json")}
    first = [run for some in known for run in some if run.id in tables]
    return list({run.id: run for run in [*first, *runs]}.values())


def _do(tasks: Sequence[Task], folder: Path, deadline: float) -> str:
    """Train; what to say of it afterwards."""
    failures: list[str] = []
    done, said = 0, ""
    order = Order(tasks=tasks, folder=folder, deadline=deadline, progress=True)
    try:
        with (
            warnings.catch_warnings(),
            closing(in_processes(order, 1)) as steps,
            bar(total=len(tasks), desc="your own runs", unit="run") as shown,
        ):
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module="basis")  # other libraries' are none of a reader's business
            for step in steps:
                done += step.outcome == "done"
                shown.update(step.outcome == "done")
                failures += [f"{step.run.variant}, seed {step.run.seed}: {step.message}"] * (step.outcome == "failed")
    except KeyboardInterrupt:
        said = " Stopped; what is finished is kept, and the cell goes on when you run it again."
    left = len(tasks) - done - len(failures)
    if left and not said:
        said = f" The time was up for {left} more; run the cell again to go on where it stopped."
    said += f" Failed: {'; '.join(failures)}." if failures else ""
    return f"{done} of {len(tasks)} runs were trained; they are kept in `{folder.name}`.{said}"


def _both(study: str, variants: Sequence[str], profile: str, folder: Path) -> pd.DataFrame:
    """The frame of :class:`Rerun`: published in this profile if all variants are, else at the scale the book shows."""
    known, one = labels(study, variants), find_study(study)

    def rows(scale: str, place: Path | None, whose: str) -> list[tuple[str, int, float, str, str]]:
        found = [row for record in records_of(one, scale, place) for row in _values(study, record)]
        return [(*row, whose) for row in found if row[0] in known]

    scales = dict.fromkeys([profile, shown_profile(one)])
    sides = [rows(scale, None, f"published ({scale})") for scale in scales]
    published = next((side for side in sides if set(known) <= {row[0] for row in side}), sides[-1])
    both = [*(published if folder != results_folder() else []), *rows(profile, folder, "yours")]
    return pd.DataFrame(both, columns=["variant", "seed", "value", "unit", "whose"])


def labels(study: str, variants: Sequence[str]) -> tuple[str, ...]:
    """What the rows of the table are called."""
    if study == "sensitivity":
        return sensitivity_study.MEASURES
    return tuple(variants)


def _values(study: str, record: Record) -> list[tuple[str, int, float, str]]:
    """What is compared of a run: variant, seed, value and unit."""
    variant, seed, result = record.config["variant"], record.config["seed"], record.result
    if study == "sensitivity":
        found = sensitivity_study.agreements(sensitivity_study.cells([record]))
        pairs = zip(found["measure"], found["spearman"], strict=True)
        return [(measure, seed, one.value, "rank correlation with fine-tuning") for measure, one in pairs]
    tested = result["test"]  # of a compressed network, after fine-tuning
    return [(labels(study, [variant])[0], seed, 100 * tested["accuracy"], "test accuracy, %")] if tested else []
