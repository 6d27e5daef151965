"""What the pages say of the records: facts of the chapters, and the tables and lists that Markdown pages include."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import pandas as pd

from basis.costs import count_parameters
from basis.environment import commit
from basis.experiments.records import KINDS
from basis.experiments.runs import ARCHIVED, DEVICES, PROFILES
from basis.experiments.studies import CLAIMS, STUDIES, Study, Verdict, records_of, shown_profile, status, valid_records
from basis.experiments.studies.cost import load_benches
from basis.experiments.tidy import sound_records
from basis.figures import table
from basis.models import build
from basis.statistics import mean_estimate
from book.tools import front_page, gates
from book.tools.address import DISTRIBUTION, address
from book.tools.card import card_fragments, card_numbers
from book.tools.chapter import Notebook, PageFacts, figure_directive
from book.tools.gallery import gallery
from book.tools.myst import Targets

COMMANDS = """\
make book    # makes its own environment, builds the pages, prints where they are
make test    # runs the tests"""
BIBTEX = """\
```bibtex
@software{{basis_book,
  author  = {{{{The basis authors}}}},
  title   = {{Basis convolutions: an executable book}},
  version = {{{version}}},
  note    = {{commit {commit}}},
  url     = {{{url}}},
}}
```"""


# --- facts from records ------------------------------------------------------------------------


def study_of(stem: str) -> Study | None:
    """The study whose results a chapter shows: its own, or the one that the first three chapters share."""
    if stem[:2] in ("01", "03"):
        return STUDIES["headline"]
    return next((study for study in STUDIES.values() if study.chapter == stem), None)


def human_time(seconds: float) -> str:
    """A duration in the unit that reads best."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def human_times(seconds: Mapping[str, float]) -> str:
    """Durations by kind of device, which are told apart where there are two, and never added up."""
    both = len(seconds) > 1
    return ", ".join(human_time(value) + f" {KINDS.get(kind, kind)}" * both for kind, value in sorted(seconds.items()))


def duration_class(seconds: float) -> str:
    """A duration so coarse that building twice gives the same page."""
    limits = {60: "under 1 min", 180: "1 to 3 min", 600: "3 to 10 min"}
    return next((text for limit, text in limits.items() if seconds < limit), "more than 10 min")


def machine() -> str:
    """This machine in a few words."""
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def status_rows(frame: pd.DataFrame) -> list[tuple[str, ...]]:
    """Study, scale, runs, missing, time and hardware of what :func:`basis.experiments.studies.status` found.

    Runs of the smoke test are left out unless there are some.
    """
    rows: list[tuple[str, ...]] = []
    for row in frame[(frame["profile"] != "smoke") | (frame["done"] > 0)].to_dict("records"):
        scale = "archived" if row["profile"] == ARCHIVED else row["profile"]
        time = human_times(row["seconds"]) if row["done"] else "–"
        rows.append((row["study"], scale, f"{row['done']} of {row['runs']}", f"{row['missing']}", time, row["device"]))
    return rows


def device_hours(frame: pd.DataFrame) -> str:
    """What all trainings took together, by kind of device, such as ``3.10 h of CPU and no hour of GPU``."""
    seconds = {"cpu": 0.0, "cuda": 0.0}
    for row in frame.to_dict("records"):
        for kind, value in dict(row["seconds"]).items():
            seconds[kind] += value
    said = {kind: f"{value / 3600:.2f} h" if value else "no hour" for kind, value in seconds.items()}
    return f"{said['cpu']} of CPU and {said['cuda']} of GPU"


def page_facts(stem: str, seconds: float, root: Path, targets: Targets, profile: str | None = None) -> PageFacts:
    """Collect what the page of one chapter says about itself; `profile` is the one it was executed with."""
    study = study_of(stem)
    times = [(*row[1:3], *row[4:]) for row in status_rows(status(study=study.name))] if study else []
    times.append(("this page", "reads records" if study else "needs no records", duration_class(seconds), machine()))
    provenance = {
        "package": f"basis {metadata.version(DISTRIBUTION)}",
        "commit": commit() or "unknown",
        "python, torch": f"{platform.python_version()}, {metadata.version('torch')}",
        "executed on": machine(),
        "execution time": duration_class(seconds),
    }
    folder = "results"
    if study:
        provenance |= records_provenance(study, profile or shown_profile(study))
        folder = f"results/{study.name if study.runs('small') else 'bench'}"
    records = folder if (root / folder).is_dir() else "results"
    return PageFacts(stem, address(), duration_class(seconds), records, tuple(times), provenance, targets)


def records_provenance(study: Study, profile: str) -> dict[str, str]:
    """Where and when the records of a study were made, or the benchmarks where it has no runs."""
    if study.runs("small"):
        records = records_of(study, profile)
        environments = [record.environment for record in records]
        facts = {"records": f"{len(records)} of study {study.name}, profile {profile}"}
    else:
        reports = [one for kind in study.benches for one in load_benches(None, kind=kind)]
        environments = [report.environment for report in reports]
        facts = {"records": f"{len(reports)} benchmarks"}
    for key, label in (("device", "measured on"), ("torch", "with torch")):
        values = sorted({str(environment[key]) for environment in environments if environment.get(key)})
        if values:
            facts[label] = ", ".join(values)
    days = sorted({str(environment.get("date", ""))[:10] for environment in environments} - {""})
    if days:
        facts["dated"] = " to ".join(dict.fromkeys([days[0], days[-1]]))
    return facts


# --- generated fragments -----------------------------------------------------------------------


def verdicts(profile: str | None = None) -> dict[str, list[tuple[Study, Verdict]]]:
    """Every claim with the verdicts that the records of `profile`, or of the one that is shown, allow.

    Archived runs decide nothing: what there is of `small` is judged then. What was only timed, not trained, is judged
    by the benchmarks of CPUs and of GPUs.
    """
    found: dict[str, list[tuple[Study, Verdict]]] = {claim: [] for claim in CLAIMS}
    for study in STUDIES.values():
        scale = profile or shown_profile(study)
        for shown in ["small" if scale == ARCHIVED else scale] if study.runs("small") else DEVICES:
            for verdict in study.verdicts(records_of(study, shown), shown):
                found[verdict.claim].append((study, verdict))
    return found


def claims_rows(found: Mapping[str, Sequence[tuple[Study, Verdict]]]) -> Iterable[tuple[Study, Verdict, str, str, str]]:
    """Study and verdict, with the claim, what we found, and what was trained or measured, in words."""
    for claim, said in found.items():
        for i, (study, one) in enumerate(said):
            text = f"**{claim}** {CLAIMS[claim]}"
            finding, what = one.finding, f"{one.scale}, n = {one.n} seeds" if one.n else one.scale
            if not study.runs("small"):
                text = f"**{claim}** on a {KINDS[DEVICES[one.profile]]}" if i else text
                what = f"{one.scale}, {one.n} or more rounds" if one.n else "not measured"
            elif one.label == "not tested":
                made, runs = len(valid_records(study, one.profile)), len(study.runs(one.profile))
                what = study.scale(one.profile)
                finding = f"not known yet: {made} of {runs} runs at this scale are made"
            yield study, one, text, _sentence(finding), what


CLAIMS_HEAD = ("Claim", "What we found", "Trained or measured", "Verdict")
CHAPTERS = {"C1": "03_every_layer", "C3": "03_every_layer"}  # others are judged in their study's


def claims_table(found: Mapping[str, Sequence[tuple[Study, Verdict]]]) -> str:
    """The claims, what we found, what was trained or measured for it, and the verdict with its chapter."""
    rows = []
    for study, one, *said in claims_rows(found):
        mark = f"[{one.label}]{{.basis-verdict .{one.label.replace(' ', '-')}}}"
        rows.append((*said, f"{mark}<br>{chapter_link(CHAPTERS.get(one.claim, study.chapter))}"))
    return ":::{div} basis-claims\n" + table(CLAIMS_HEAD, rows) + "\n:::\n"


def readme_claims(found: Mapping[str, Sequence[tuple[Study, Verdict]]]) -> str:
    """The same for README.md, whose links lead to the built book."""
    rows, pages = [], f"{address().pages.rstrip('/')}/notebooks"
    for study, one, *said in claims_rows(found):
        stem = CHAPTERS.get(one.claim, study.chapter)
        rows.append((*said, f"**{one.label}** ([{chapter_name(stem)}]({pages}/{stem}.html))"))
    return table(CLAIMS_HEAD, rows)


def chapter_name(stem: str) -> str:
    """A chapter in a few words, such as ``8 ResNet family``."""
    number, _, words = stem.partition("_")
    return f"{int(number)} {words[:1].upper()}{words[1:].replace('_', ' ')}".replace("Resnet", "ResNet")


def chapter_link(stem: str) -> str:
    """The chapter's name as a link within the book."""
    return f"{{doc}}`{chapter_name(stem)} </notebooks/{stem}>`"


def setups() -> str:
    """The scales side by side, by the dense network of the study ``headline``, which the others share."""
    rows: dict[str, list[str]] = {}
    for profile in PROFILES:
        run = next(run for run in STUDIES["headline"].runs(profile) if run.variant == "dense")
        recipe, real = run.recipe, run.data == "cifar10"
        images = run.images or (50_000 if real else 2000) - run.validation
        records = valid_records(STUDIES["headline"], profile)
        tested = [100 * r.result["test"]["accuracy"] for r in records if r.config["variant"] == "dense"]
        stems = sorted({study.chapter for study in STUDIES.values() if study.runs(profile)} | {*CHAPTERS.values()})
        chapters = ", ".join(f"{{doc}}`{int(stem[:2])} </notebooks/{stem}>`" for stem in stems)
        facts = {
            "Network": STUDIES["headline"].scale(profile).partition(",")[0],
            "Parameters": f"{count_parameters(build(run.model, width=run.width)):,}",
            "Images": "CIFAR-10" if real else "synthetic", "Trained on": f"{images:,}",
            "Held out": f"{run.validation:,}", "Epochs": f"{recipe.epochs}",
            "Steps": f"{images // recipe.batch_size * recipe.epochs:,}", "Batch": f"{recipe.batch_size}",
            "Dense accuracy": f"{mean_estimate(tested).text()} % (n = {len(tested)})" if tested else "not trained",
            "Chapters": chapters if real else "tests, trials",
        }  # fmt: skip
        for name, fact in facts.items():
            rows.setdefault(name, []).append(fact)
    return table(("", *(f"`{profile}`" for profile in PROFILES)), [(name, *facts) for name, facts in rows.items()])


def _sentence(text: str) -> str:
    """A finding as a sentence of its own."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def chapters_list(pages: Mapping[str, Notebook]) -> str:
    """Every chapter's question with the answer that its page computed."""
    items = []
    for stem, page in sorted(pages.items()):
        answer = " ".join(page.metadata.basis.answer.split("\n\n")[0].split())
        items.append(f"{{doc}}`{gates.first_heading(page)} </notebooks/{stem}>`\n: {answer}\n")
    return "\n".join(items)


def fragments(pages: Mapping[str, Notebook], profile: str | None = None) -> dict[str, str]:
    """Everything that the Markdown pages and README.md include: file name -> text."""
    found, here, state = verdicts(profile), address(), status()
    states, listed = status_rows(state), state[state["profile"].isin(("small", "paper"))]
    about = {stem: page.metadata.basis for stem, page in sorted(pages.items())}
    brief = front_page.stored(profile)
    times = [(f"{{doc}}`/notebooks/{stem}`", page.time, machine()) for stem, page in about.items()]
    rules = [f"{study.title} ({', '.join(study.claims)})\n: {study.rule}\n" for study in STUDIES.values()]
    tested = [claim for claim, items in found.items() if any(v.label != "not tested" for _, v in items)]
    numbers = {
        "version": metadata.version(DISTRIBUTION),
        "commit": commit() or "unknown",
        "repository_link": f"[{here.owner}/{here.name}]({here.repository})",
        "book_link": f"[{here.pages}]({here.pages})",
        "runs_done": str(sum(listed["done"])),
        "runs_listed": str(sum(listed["runs"])),
        "claims": str(len(CLAIMS)),
        "claims_tested": str(len(tested)),
        "device_hours": device_hours(state),
    }
    headline = "*The headline figure is not drawn yet.*"
    if brief:
        headline = figure_directive(front_page.about(brief), folder="figures", label="fig-front")
    records = sound_records()
    numbers |= card_numbers(records)
    return {
        **card_fragments(records),
        "claims.md": claims_table(found),
        "chapters.md": chapters_list(pages),
        "bibtex.md": BIBTEX.format(version=numbers["version"], url=here.pages, commit=numbers["commit"]),
        "clone.md": f"```bash\ngit clone {here.repository} {here.name}-book\ncd {here.name}-book\n{COMMANDS}\n```\n",
        "gallery.md": gallery(pages, front_page.about(brief) if brief else None),
        "headline.md": headline,
        "numbers.md": front_page.numbers(brief),
        "readme-claims.md": readme_claims(found),
        "rules.md": "\n".join(rules),
        "setups.md": setups(),
        "status.md": table(("Study", "Scale", "Runs", "Missing", "Time", "Hardware"), states),
        "times.md": table(("Chapter", "Time to execute", "Machine"), times),
        "substitutions.json": json.dumps(numbers, indent=1),
    }
