"""The numbers of a report of compressing, as plain values, from what the stages found."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from basis.compression.job import Job
from basis.costs import Cost
from basis.saving import plain
from basis.search.selection import predicted
from basis.search.table import Cell, Layer, SensitivityTable
from basis.storage import STATE_FILE
from basis.substitution import Plan

REPORT_VERSION = 1
_ABOUT = {
    "ONNX": "the network as plain convolutions, for onnxruntime and others; takes {batch} images at once",
    "torch.export": "the same as a program of torch.export; takes {batch} images at once",
}


def facts_of(
    job: Job,
    table: SensitivityTable,
    plan: Plan,
    costs: Mapping[str, Cost],
    stages: Mapping[str, Mapping[str, Any]],
    command: str,
) -> dict[str, Any]:
    """Everything that the report says.

    Args:
        costs: "dense" and "compressed", for one image.
        stages: title -> what the stage found; those that did not take place are empty.
    """
    rows = [row for stage in stages.values() for row in stage.get("accuracy", ())]
    report = {
        "basis_report": REPORT_VERSION,
        "network": {
            "name": job.settings.model, "source": job.network.source, "weights": Path(job.settings.weights).name,
            "sha256": job.weights.digest, "notes": list(job.notes),
        },
        "data": {
            "source": str(job.pictures.source), "classes": len(job.pictures.classes),
            "class_names": list(job.pictures.classes), "train": len(job.pictures.train),
            "calibration": len(job.calibration), "held_out": len(job.validation), "scored": len(job.scored),
            "test": len(job.pictures.test), "notes": list(job.pictures.notes),
        },
        "images": vars(job.preparation),
        "asked": dict(job.settings.budget),
        "budget": stages["selection"]["budget"],
        "replaced": len(plan.layers),
        "convolutions": len(plan.layers) + len(plan.skipped),
        "cost": _costs(costs),
        "unit": table.unit,
        "predicted": predicted(table, plan)["sensitivity"],
        "layers": [_layer(at, plan, table, stages["form"]["pairs"]) for at in table.layers if at.name in plan.layers],
        "kept": [_kept(name, reason, table) for name, reason in plan.skipped.items()],
        "accuracy": rows,
        "accuracy_change": stages["last numbers"]["change"],
        "latency": _latency(stages["latency"]),
        "files": _files(job, stages["export"]),
        "left_out": stages["export"]["left_out"],
        "apart": stages["export"]["apart"],
        "warnings": [line for stage in stages.values() for line in stage.get("warnings", ())],
        "loading": loading(job, stages["export"]),
        "made": {
            "command": command, "seed": job.settings.seed, "measure": table.measure, "epochs": job.settings.epochs,
            "distil": job.settings.distil, "device": stages["latency"]["environment"]["device"],
            "versions": versions(stages), "date": stages["latency"]["environment"]["date"],
            "seconds": {name: stage["seconds"] for name, stage in stages.items() if stage},
        },
    }  # fmt: skip
    return plain(report)


def as_json(report: Mapping[str, Any]) -> bytes:
    """The report as JSON text."""
    return json.dumps(report, indent=1).encode() + b"\n"


def versions(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Of the software; where a run went on with another version, both."""
    found: dict[str, list[str]] = {}
    for stage in stages.values():
        for name, version in stage.get("versions", {}).items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: ", then ".join(known) for name, known in found.items()}


def _costs(costs: Mapping[str, Cost]) -> dict[str, dict[str, float]]:
    names = {"params": "parameters", "macs": "forward_macs", "backward_macs": "backward_macs"}
    pairs = {unit: [getattr(costs[which], name) for which in ("dense", "compressed")] for unit, name in names.items()}
    return {unit: {"before": a, "after": b, "ratio": b / a if a else 1.0} for unit, (a, b) in pairs.items()}


def _layer(layer: Layer, plan: Plan, table: SensitivityTable, pairs: list[str]) -> dict[str, Any]:
    k = plan.layers[layer.name]
    dense, thin = layer.cost(layer.out_channels), layer.cost(k)
    ratio = math.nan if isinstance(k, str) else k / layer.out_channels
    row: dict[str, Any] = {"name": layer.name, "out_channels": layer.out_channels, "basis_channels": k, "ratio": ratio}
    row |= {unit: {"before": dense[unit], "after": thin[unit]} for unit in ("params", "macs")}
    form = "a pair" if layer.name in pairs else "one convolution"
    return row | {
        "sensitivity": _cell(next((c for c in table.cells if (c.layer, c.basis_channels) == (layer.name, k)), None)),
        "form": form,
    }


def _cell(cell: Cell | None) -> dict[str, Any] | None:
    return None if cell is None else {"value": cell.value, "low": cell.low, "high": cell.high, "n": cell.n}


def _kept(name: str, reason: str, table: SensitivityTable) -> dict[str, Any]:
    cells = [cell for cell in table.cells if cell.layer == name and not isinstance(cell.basis_channels, str)]
    smallest = min(cells, key=lambda cell: cell.basis_channels, default=None)
    k = None if smallest is None else smallest.basis_channels
    return {"name": name, "reason": reason, "basis_channels": k, "sensitivity": _cell(smallest)}


def _latency(stage: Mapping[str, Any]) -> dict[str, Any]:
    where = stage["environment"]
    about = {"device": where["device"], "threads": where["threads"], **stage["setting"]}
    return {"rows": stage["rows"], **about}


def _files(job: Job, stage: Mapping[str, Any]) -> list[dict[str, Any]]:
    def own(name: str, about: str) -> dict[str, Any]:
        return {"name": name, "about": about, "bytes": (job.out / name).stat().st_size, "error": None}

    exported = [
        {
            **file,
            "about": _ABOUT[file["what"]].format(
                batch="any number of" if file["batch"] == "dynamic" else file["batch"]
            ),
        }
        for file in stage["files"]
    ]
    return [
        own(STATE_FILE, "the weights, of basis convolutions"),
        own("plan.json", "which layers were replaced, and why the others were not"),
        *exported,
        own("sensitivity.jsonl", "what every layer loses alone (basis.SensitivityTable.load)"),
    ]


def loading(job: Job, stage: Mapping[str, Any]) -> str:
    """Lines of Python that load what was made and run it on one image of the data."""
    folder, p = str(job.out.absolute()), job.preparation
    if job.pictures.test.files:
        image = f"{str(job.pictures.test.files[0].absolute())!r}  # any image"
        first: list[str] = []
    else:
        image = 'np.load(source)["x_test"][0]  # any image, uint8 (H, W, C)'
        first = [f"source = {str(job.pictures.source.absolute())!r}"]
    taken = {file["what"]: file["batch"] for file in stage["files"]}
    many, one = {}, {}  # a file for a fixed batch gets the image so many times, and its first answer counts
    for what, batch in taken.items():
        many[what], one[what] = ("", "") if batch == "dynamic" else (f".repeat({batch}, 1, 1, 1)", "[:1]")
    lines = [
        *(["import numpy as np"] if first else []),
        "import torch", "", "from basis import load", "from basis.compression.images import prepared",
        "from basis.compression.networks import Preparation, build_network", "",
        f"folder = {folder!r}", *first,
        "preparation = Preparation(",
        f"    size={p.size}, crop={p.crop!r}, mean={tuple(p.mean)!r}, std={tuple(p.std)!r},",
        f"    interpolation={p.interpolation!r}, source={p.source!r},",
        ")",
        f"x = prepared({image.partition('  #')[0]}, preparation)" + "  # " + image.partition("# ")[2],
        "",
        f"network = build_network({job.settings.model!r}, classes={len(job.pictures.classes)}).model",
        "model = load(network, folder).eval()  # of basis convolutions, to train on or to look into",
        "with torch.no_grad():", "    logits = model(x)",
    ]  # fmt: skip
    if "torch.export" in taken:
        lines += ["", 'program = torch.export.load(f"{folder}/model.pt2").module()  # plain convolutions, faster',
                  f"logits = program(x{many['torch.export']}){one['torch.export']}"]  # fmt: skip
    if "ONNX" in taken:
        lines += ["", "import onnxruntime", "",
                  'session = onnxruntime.InferenceSession(f"{folder}/model.onnx")',
                  f'logits = session.run(None, {{"images": x{many["ONNX"]}.numpy()}})[0]{one["ONNX"]}']  # fmt: skip
    return "\n".join(lines)
