"""Chapter 8: does it hold across the ResNet family?

Every network is trained dense, and at half of its parameters by the rules of the study ``headline``, whose runs are
those of ResNet-18. They were known when the rule was written, so that the others alone are judged.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from basis.experiments.runs import Record, Run
from basis.experiments.studies import headline
from basis.experiments.studies.headline import HALF, NARROWER
from basis.experiments.studies.study import MARGIN, Study, Verdict, describe, difference, label_of, verdict

NEEDED, NETWORKS = 4, ("ResNet-20", "ResNet-56")
SHARED = "resnet18"
KINDS: Mapping[str, str] = {"table": "table", "dense": "dense"} | {
    headline.variant(kind, HALF): kind for kind in ("selected", "uniform", "largest first", NARROWER)
}
JUDGED = ("dense", "selected", "uniform")
# Channels of each stage of a narrower dense network with half of the parameters, to 0.3 %.
STAGES = {"resnet20": (11, 23, 45), "resnet56": (11, 23, 45)}


def variant(network: str, kind: str) -> str:
    """The name of a variant, such as ``resnet20, selected``."""
    return f"{network}, {kind}"


def _runs(base: Run, *, seeds: Mapping[str, int], multiple: int = 1, without: Sequence[str] = ()) -> tuple[Run, ...]:
    """Network after network: its table, then round after round of as many ``seeds``, as ``headline`` lists them."""
    found = []
    for network, many in seeds.items():
        table = ""
        for run in headline.STUDY.runs(base.profile):
            kind = KINDS.get(run.variant, "")
            if kind and kind not in without and (run.seed < many or run.ladder):
                one = replace(base, model=network, variant=variant(network, kind), seed=run.seed, test=run.test)
                if kind == NARROWER:
                    one = replace(one, width=run.width if base.profile == "smoke" else STAGES[network])
                choice = run.choice and replace(run.choice, table=table)
                ladder = run.ladder and replace(run.ladder, multiple=multiple)
                found.append(replace(one, choice=choice, ladder=ladder))
                table = found[-1].id if ladder else table
    return tuple(found)


class Family(Study):
    """A study of several networks, all of which its scale names."""

    def scale(self, profile: str, records: Sequence[Record] = ()) -> str:
        """Such as ``ResNet-18, 20 and 56 of width 16, 16 epochs``."""
        configs = [*(run.config for run in self.runs(profile)), *(record.config for record in records)]
        models = {SHARED, *(config["model"] for config in configs)}
        *others, last = sorted(int(model.removeprefix("resnet")) for model in models)
        return describe(configs[0], f"ResNet-{', '.join(map(str, others))} and {last}") if configs else profile


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """:meth:`Study.frame`, with the ``network``, as ``ResNet-20``, and the rest as ``variant``, ordered as in KINDS."""
    whole = {r.config["model"]: r.result["macs"] for r in records if r.config.get("ladder")}

    def macs(record: Record) -> float:
        dense = whole.get(record.config["model"], math.nan)
        return float(record.result.get("macs", dense) / dense)  # archived dense networks have none

    runs = STUDY.frame(records, {"MACs": macs})
    names = runs["variant"].str.extract("resnet([^,]*), (.*)")
    runs = runs.assign(network="ResNet-" + names[0], variant=names[1].replace("all layers", "uniform"))
    place = {kind: i for i, kind in enumerate(KINDS.values())}
    return runs.sort_values("variant", key=lambda kinds: kinds.map(place), kind="stable", ignore_index=True)


def complete(runs: pd.DataFrame, *, least: int = 1) -> list[str]:
    """The networks of a :func:`frame` that have ``least`` seeds of all that is judged, by their depth."""
    counts = {name: own["variant"].value_counts() for name, own in runs.groupby("network")}
    return [str(name) for name, n in counts.items() if all(n.get(kind, 0) >= least for kind in JUDGED)]


def mean_of(runs: pd.DataFrame, networks: Sequence[str]) -> pd.DataFrame:
    """These networks as if they were one: for each variant the seeds that all of them have, in the mean."""
    groups = runs[runs["network"].isin(networks)].groupby(["variant", "seed"], sort=False)
    means = groups[["accuracy", "parameters", "MACs"]].mean()[groups.size() == len(networks)]
    return means.reset_index().assign(network=f"mean of {' and '.join(networks).replace('ResNet-', '')}")


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on C7."""
    runs = frame(records)
    there = [name for name in complete(runs, least=NEEDED) if name in NETWORKS]
    if len(there) < len(NETWORKS):
        finding = f"{len(there)} of the {len(NETWORKS)} networks that the rule needs have {NEEDED} seeds"
        return (Verdict("C7", profile, "not tested", finding),)
    mean, margin = mean_of(runs, NETWORKS), MARGIN[profile]
    kept, gained, narrower = (difference(mean, "selected", other) for other in ("dense", "uniform", NARROWER))
    each = {str(name): difference(one, "selected", "dense") for name, one in runs.groupby("network")}
    good = kept.low > -margin and gained.low > 0 and all(each[name].high >= -margin for name in NETWORKS)
    label = label_of(good, kept.high < -margin or gained.high < 0)
    texts = {"networks": " and ".join(NETWORKS), "each": ", ".join(f"{name} {gap.gap()}" for name, gap in each.items())}
    macs = mean.groupby("variant")["MACs"].mean().reindex(["selected", NARROWER]).tolist()
    about = {**texts, "uniform": gained, "narrower": narrower, "macs": macs}
    return (verdict("C7", profile, label, kept, scale=STUDY.scale(profile), **about),)


STUDY = Family.named(
    "family", _runs, judge, shared={of: variant(SHARED, kind) for of, kind in KINDS.items()},
    needed=NEEDED, networks=" and ".join(NETWORKS), margin=MARGIN["small"], paper=MARGIN["paper"],
)  # fmt: skip
