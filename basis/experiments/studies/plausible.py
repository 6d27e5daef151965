"""Can this record be what its run left? Asked of every record that comes from elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch

from basis.costs import count_parameters
from basis.experiments.runs import DEVICES, Record, Run
from basis.models import build
from basis.search.table import SensitivityTable
from basis.substitution import Plan, substitute

METRICS = ("loss", "accuracy")
IMAGES: Mapping[str, int] = {"cifar10": 50000, "synthetic": 2000}


def doubts(run: Run, record: Record) -> list[str]:
    """What in ``record`` cannot have come from ``run``, each as a phrase; empty where all may be true.

    Whether the record belongs to a study at all is :func:`basis.experiments.studies.check_records`'s matter.
    """
    try:
        return list(_doubts(run, record.result, record.environment))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"its result is incomplete or malformed ({type(error).__name__}: {error})"]


def _doubts(run: Run, result: Mapping[str, Any], environment: Mapping[str, Any]) -> Iterator[str]:
    kind, kinds = environment["device_type"], [DEVICES[run.profile]] if run.profile in DEVICES else ["cpu", "cuda"]
    if kind not in kinds:
        yield f"it was made on a {kind} device, but the profile {run.profile} is for {' and '.join(kinds)} devices"
    wanted = run.recipe.epochs if run.compression is None else run.compression.epochs
    epochs = [row["epoch"] for row in result["curves"]]
    if epochs != list(range(1, wanted + 1)):
        yield f"its curves hold {len(epochs)} epochs, but the recipe has {wanted}"
    left = IMAGES[run.data] - run.validation
    steps = run.recipe.epochs * (min(left, run.images or left) // run.recipe.batch_size)
    if run.compression is None and result["steps"] != steps:
        yield f"it took {result['steps']} steps, but the recipe takes {steps}"
    if run.compression is not None and result["parameters"] > run.compression.budget * result["dense_parameters"]:
        yield f"it has {result['parameters']} parameters, more than its budget"
    looked = {"test": run.test is not False, "validation": run.validation > 0 and run.compression is None}
    for images, expected in looked.items():
        if (result[images] is not None) != expected:
            yield f"it {'lacks' if expected else 'has'} an accuracy on {images} images"
    for where, metrics in _metrics(result):
        for name, value in metrics.items():
            if not (isinstance(value, float | int) and math.isfinite(value) and value >= 0):
                yield f"{name} of {where} is {value}"
            elif "accuracy" in name and value > 1:
                yield f"{name} of {where} is {value}, but it is a fraction"
    for name in ("train_seconds", "images_per_second", "parameters", "macs"):
        if name in result and not 0 < result[name] < math.inf:
            yield f"{name} is {result[name]}"
    if not math.isclose(sum(row["seconds"] for row in result["curves"]), result["train_seconds"], rel_tol=1e-6):
        yield "the seconds of its epochs do not add up to train_seconds"
    for name in run.ladder.measures if run.ladder else ():
        table = SensitivityTable.from_lines(result["tables"][name])
        if table.measure != name or table.missing:
            yield f"its table of {name} is not whole"


def _metrics(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from result.get("stages", {}).items()
    for images in ("test", "validation"):
        if result[images] is not None:
            yield images, {name: result[images][name] for name in METRICS} | dict(result[images])
    for row in result["curves"]:
        yield f"epoch {row['epoch']}", {name: value for name, value in row.items() if name != "epoch"}


def wrong_size(run: Run, record: Record) -> str | None:
    """Why the record's number of parameters cannot be that of the run's network; None where it can.

    Of a network that was made smaller after training only the dense one's is known beforehand.
    """
    plan = run.plan if run.choice is None else record.result.get("plan")
    said = json.dumps([run.model, run.width, plan, run.ratio, run.layer, run.include, run.coefficients])
    try:
        expected = _parameters(said)
    except (ValueError, TypeError) as error:
        return f"its network cannot be built ({error})"
    found = record.result["parameters" if run.compression is None else "dense_parameters"]
    return None if found == expected else f"it has {found} parameters, but its network has {expected}"


@lru_cache(maxsize=1024)
def _parameters(said: str) -> int:
    """The parameters of a network, without making it."""
    model, width, plan, ratio, layer, include, coefficients = json.loads(said)
    with torch.device("meta"):
        network: torch.nn.Module = build(model, width=width)
    if plan is not None or ratio is not None or layer is not None:
        network = substitute(
            network, None if plan is None else Plan(plan), ratio=ratio, layer=layer, include=include or (),
            init="random", coefficients=coefficients or "dense",
        )  # fmt: skip
    return count_parameters(network)
