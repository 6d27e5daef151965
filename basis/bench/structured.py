"""Speed of the structured layers: against the dense layer, and against the same function by plain torch operations.

How a time is taken is told in :mod:`basis.bench.timing`, what a composition is in :mod:`basis.bench.compositions`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from basis.bench.cases import make_trainer, training_step
from basis.bench.compositions import composition
from basis.bench.timing import PASSES as KNOWN_PASSES
from basis.bench.timing import BenchReport, Pass, Progress, Setting, Shape, check_known, layer_steps
from basis.costs import count_parameters, count_trained
from basis.experiments.studies.substitutes import BLOCKS, DENSE, Variant, plan
from basis.layers.structured import LAYERS, Structure
from basis.models import build
from basis.substitution import Plan, plan_of, substitute

# Those of the blocks of WRN-16-4 at 32x32 pixels.
SHAPES = ("16-64@32", "64@32", "64-128@32/2", "128@16", "128-256@16/2", "256@8")
PASSES: tuple[Pass, ...] = ("forward+backward",)
TOGETHER = 4  # networks that are measured in one cell, beside the dense one and its control
Layer = str | tuple[str, int | None]  # the text of a structured layer or "dense"; the stem's width where it is another


def study_layers(profile: str, model: str | None = None) -> list[tuple[str, int | None]]:
    """Text and width of each variant that the study of chapter 9 trains from scratch, but the dense network's.

    Args:
        model: only those of that network.
    """
    found = [Variant.parse(run.variant) for run in plan(profile)]
    found = [one for one in found if not one.how and model in (None, one.network)]
    return list(dict.fromkeys((one.text, one.width) for one in found if one.text != DENSE or one.width))


def bench_structured(
    *,
    layers: Sequence[str],
    shapes: Sequence[str] = SHAPES,
    passes: Sequence[Pass] = PASSES,
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure structured layers and their compositions against ``nn.Conv2d``; a cell is a shape and a pass.

    A row of mode "layer" has ``versus_composition``, composition / layer within a round, with quartiles:
    above 1 where the layer is faster than the simplest composition of torch operations that is the same
    function of the same parameters. ``parameters`` are stored numbers, ``trained`` those that a step changes.
    A layer that cannot be made in a shape or run has ``error`` and no times.

    Args:
        layers: their texts, such as "tucker:0.41".

    Raises:
        ValueError: for an unknown kind of layer, or a shape, pass or setting that makes no sense.
    """
    parsed = [Shape.parse(text) for text in shapes]
    texts = list(dict.fromkeys(str(Structure.parse(text)) for text in layers))
    check_known("pass", passes, KNOWN_PASSES)
    setting = (setting or Setting()).settled_for(parsed)
    rows = []
    for shape, one in itertools.product(parsed, passes):
        errors: dict[str, str] = {}
        with setting.globals():
            modules: dict[tuple[str, str], nn.Module] = {(DENSE, m): shape.conv() for m in (DENSE, "control")}
            for text in texts:
                try:
                    modules[text, "layer"] = layer = _layer(shape, text)
                    modules[text, "composition"] = composition(layer)
                except ValueError as error:
                    errors[text] = str(error)
            names = {key: " ".join(dict.fromkeys(key)) for key in modules}
            placed = {names[key]: setting.place(module) for key, module in modules.items()}
            measured = setting.measure(
                layer_steps(placed, [(shape.in_channels, shape.size, shape.size)], one, setting),
                versus={f"{text} layer": f"{text} composition" for text in texts},
                may_fail=[names[key] for key in modules if key[0] != DENSE],
            )
        for text, mode in [(DENSE, "control"), *itertools.product(texts, ("layer", "composition"))]:
            row: dict[str, Any] = {"shape": str(shape), "pass": one, "layer": text, "mode": mode}
            if text in errors:
                rows += [row | {"error": errors[text]}] if mode == "layer" else []
            else:
                values = measured[names[text, mode]]
                row |= {key.replace("versus_basis", "versus_composition"): value for key, value in values.items()}
                rows.append(row | _sizes(modules[text, mode]))
            _tell(progress, rows[-1], f"{shape} {one}")
    options = {"shapes": [str(s) for s in parsed], "layers": texts, "passes": list(passes)}
    return setting.report("bench-structured", rows, **options)


def bench_structured_training(
    *,
    layers: Sequence[Layer],
    model: str = "wrn-10-1",
    width: int | None = None,
    include: str = BLOCKS,
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure whole training steps of a network whose convolutions are structured layers against the dense one.

    Forward, loss, backward and SGD, on random images of 3x32x32. A few networks at a time are measured
    together, each few beside the dense network of ``width``, to which their ``speedup`` refers. Rows have
    ``layer`` (the text) and ``width`` of the stem, ``parameters`` (stored numbers) and ``trained`` ones,
    and ``substituted``, the number of convolutions that became layers.

    Args:
        layers: texts, or pairs of a text and a width of the stem; "dense" with a width is a narrower network
            (of ``width`` it is the reference itself, and left out).
        width: of the stem, where a text has none of its own; the network's own unless given.
        include: pattern of the convolutions that are substituted where they can; others stay dense.

    Raises:
        ValueError: for an unknown model or kind of layer, or a pattern or setting that makes no sense.
    """
    pairs = [(text, width) if isinstance(text, str) else text for text in layers]
    pairs = [(text if text == DENSE else str(Structure.parse(text)), its_width) for text, its_width in pairs]
    pairs = [pair for pair in dict.fromkeys(pairs) if pair != (DENSE, width)]
    setting = setting or Setting()
    with torch.device("meta"):
        dense = build(model, width=width)
    Plan.uniform(dense, ratio=1, include=include)  # refuses a pattern that none matches
    setting = setting.settled(dense)
    rows = []
    for start in range(0, len(pairs), TOGETHER):
        wanted = {_shown(*pair): pair for pair in pairs[start : start + TOGETHER]}
        errors: dict[str, str] = {}
        with setting.globals():
            networks: dict[str, nn.Module] = {name: build(model, width=width) for name in (DENSE, "control")}
            for name, (text, its_width) in wanted.items():
                try:
                    networks[name] = _network(build(model, width=its_width), text, include)
                except ValueError as error:
                    errors[name] = str(error)
            sizes = {name: _sizes(network) for name, network in networks.items()}
            made = {name: {"substituted": len(plan_of(network).layers)} for name, network in networks.items()}
            x = setting.place(torch.randn(setting.batch_size, 3, 32, 32))
            labels = torch.randint(10, (setting.batch_size,), device=x.device)
            steps = {name: training_step(make_trainer(net, setting), x, labels) for name, net in networks.items()}
            measured = setting.measure(steps, may_fail=[name for name in wanted if name in steps])
        for name, (text, its_width) in {"control": (DENSE, width), **wanted}.items():
            mode = "control" if name == "control" else DENSE if text == DENSE else "layer"
            row = {"model": model, "layer": text, "width": its_width, "mode": mode}
            found = {"error": errors[name]} if name in errors else measured[name] | sizes[name] | made[name]
            rows.append(row | found)
            _tell(progress, rows[-1], model)
    options = {"model": model, "width": width, "include": include, "layers": [_shown(*pair) for pair in pairs]}
    return setting.report("bench-structured-train", rows, **options)


def _layer(shape: Shape, text: str) -> nn.Module:
    structure = Structure.parse(text)
    return LAYERS[structure.kind].shaped_like(shape.conv(), size=structure.size)


def _network(dense: nn.Module, text: str, include: str) -> nn.Module:
    if text == DENSE:
        return dense
    chosen = Plan.uniform(dense, layer=text, include=include)
    if not chosen.layers:
        reasons = [why for why in chosen.skipped.values() if not why.startswith("not among")]
        raise ValueError(f"no convolution can become {text}: {reasons[0]}")
    return substitute(dense, chosen, init="random")


def _sizes(module: nn.Module) -> dict[str, int]:
    return {"parameters": count_parameters(module), "trained": count_trained(module)}


def _shown(text: str, width: int | None) -> str:
    return f"{text}@{width}" if width else text


def _tell(progress: Progress | None, row: dict[str, Any], place: str) -> None:
    """One line about a row, for whoever wants to see the progress."""
    if not progress:
        return
    place = f"{place} {_shown(row['layer'], row.get('width'))} {row['mode']}"
    if "error" in row:
        progress(f"{place}: failed, {row['error']}")
        return
    spread = f"[{row['speedup_q1']:.2f}, {row['speedup_q3']:.2f}]"
    versus = f", {row['versus_composition']:.2f}x its composition" if "versus_composition" in row else ""
    progress(f"{place}: {row['speedup']:.2f}x {spread}, {row['ms']:.1f} ms{versus}")
