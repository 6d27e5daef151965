"""The report of a compressed network: one HTML file that loads nothing, made from plain numbers.

Every number of the page stands in a ``<data value="...">``, whose value is one of those in ``report.json``.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib

from basis.figures import DARK, LIGHT, Draw, Theme, canvas, render_figure
from basis.plots import heatmap
from basis.search.table import SensitivityTable

Report = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --muted: #57606a; --line: #d8dde3; --soft: #f5f7f9; --back: #ffffff;
  --accent: #2f5fb3; --warn: #9a5b00; }
.dark { display: none; }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #e6e9ed; --muted: #a2abb6; --line: #3a424c; --soft: #1c222a; --back: #14181e; --accent: #7fabf5;
    --warn: #f0b754; }
  .light { display: none; }
  .dark { display: inline; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; }
.lead { font-size: 1.1rem; }
.muted, figcaption, caption { color: var(--muted); font-size: .92rem; }
.warn { color: var(--warn); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.card { background: var(--soft); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.2rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { color: var(--muted); font-size: .92rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; min-width: 60%; }
caption { text-align: left; padding-bottom: .3rem; max-width: min(46rem, calc(100vw - 2.2rem)); }
th, td { padding: .28rem .6rem .28rem 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; color: var(--muted); }
th:first-child, td:first-child { text-align: left; }
td.words, th.words { text-align: left; white-space: normal; min-width: 14rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .92em; }
pre code { font-size: 1em; }
pre { font-size: .86rem; line-height: 1.5; background: var(--soft); border: 1px solid var(--line); border-radius: .5rem;
  padding: .8rem 1rem; overflow-x: auto; }
td code { overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .95rem; margin: .8rem 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) {
  body { padding: 1.2rem .9rem 3rem; }
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .4rem; }
}
@media print {
  :root { color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  h2 { break-after: avoid; }
  tr, figure, .card { break-inside: avoid; }
  .scroll { overflow: visible; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  td, th { white-space: normal; }
}
"""


def render(report: Report, table: SensitivityTable) -> str:
    """The page. ``table`` is drawn; every number comes from ``report``."""
    name = report["network"]["name"]
    parts = [
        f"<h1>{_code(name)}, compressed</h1>",
        f'<p class="lead">{_summary(report)}</p>',
        *[f'<p class="warn">{_text(line)}</p>' for line in report["warnings"]],
        _cards(report),
        _section("What was replaced", _replaced(report)),
        _section("Accuracy", _accuracies(report)),
        _section("Latency", _latencies(report)),
        _section("Sensitivity of the layers", _sensitivity(report, table)),
        _section("What was not replaced", _kept(report)),
        _section("The files, and how to load them", _files(report)),
        _section("How it was made", _made(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(name)}, compressed</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


# -- words and numbers ------------------------------------------------------------------------------


def _text(value: object) -> str:
    return html.escape(str(value))


def _code(value: object) -> str:
    return f"<code>{_text(value)}</code>"


def _number(value: float | None, say: Callable[[float], str]) -> str:
    """A number as it is read, with the number itself."""
    if value is None or not math.isfinite(value):
        return "–"
    text = say(value).replace(" ", "\u00a0")  # a number and its unit stay together
    return f'<data value="{value!r}">{text}</data>'


def _count(value: float | None) -> str:
    return _number(value, lambda v: f"{v:,.0f}")


def _short(value: float | None) -> str:
    """With a unit prefix, such as 11.2 M."""

    def say(v: float) -> str:
        for power, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
            if v >= power:
                return f"{v / power:.3g}{prefix}"
        return f"{v:,.0f}"

    return _number(value, say)


def _percent(value: float | None, digits: int = 1) -> str:
    return _number(value, lambda v: f"{100 * v:.{digits}f} %")


def _points(value: float | None) -> str:
    return _number(value, lambda v: f"{100 * v:+.2f}")


def _plain(value: float | None, digits: int = 3) -> str:
    return _number(value, lambda v: f"{v:.{digits}g}")


def _times(value: float | None) -> str:
    return _number(value, lambda v: f"{v:.2f}")


def _seconds(value: float | None) -> str:
    def say(v: float) -> str:
        if v < 100:
            return f"{v:.2g} s"
        return f"{v / 60:.0f} min" if v < 6000 else f"{v / 3600:.1f} h"

    return _number(value, say)


def _bytes(value: float | None) -> str:
    return _number(value, lambda v: f"{v / 1e6:.2f} MB" if v >= 1e5 else f"{v / 1e3:.1f} kB")


def _span(row: Mapping[str, Any], say: Callable[[float | None], str]) -> str:
    """An interval in brackets, nothing where there is none."""
    return "" if row.get("low") is None else f"[{say(row['low'])}, {say(row['high'])}]"


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, *, words: Sequence[int] = ()) -> str:
    """A table; columns numbered in ``words`` hold sentences."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = (' class="words"' if i in words else "" for i in range(len(row)))
        scope = ' scope="col"' if tag == "th" else ""
        return "".join(f"<{tag}{scope}{kind}>{cell}</{tag}>" for cell, kind in zip(row, kinds, strict=True))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><caption>{caption}</caption>\n<thead><tr>{cells("th", head)}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


# -- the sections -----------------------------------------------------------------------------------


def _summary(report: Report) -> str:
    cost, latency = report["cost"], report["latency"]
    change = report["accuracy_change"]
    exported = latency["rows"]["exported"]
    return (
        f"{_count(report['replaced'])} of {_count(report['convolutions'])} convolutions became basis convolutions. "
        f"The network keeps {_percent(cost['params']['ratio'])} of its parameters and "
        f"{_percent(cost['macs']['ratio'])} of its multiply-accumulates (MACs), changes its test accuracy by "
        f"{_points(change['value'])} points {_span(change, _points)}, and takes "
        f"{_plain(exported['ms'])} ms for {_count(latency['batch_size'])} images where it took "
        f"{_plain(latency['rows']['as given']['ms'])} ms."
    )


def _cards(report: Report) -> str:
    cost, latency = report["cost"], report["latency"]["rows"]
    last = {row["stage"]: row for row in report["accuracy"] if row["images"] == "test"}
    asked = "; ".join(f"at most {_percent(v)} of {_UNITS[unit]}" for unit, v in report["budget"].items())
    cards = [
        ("Parameters", f"{_short(cost['params']['before'])} → {_short(cost['params']['after'])}",
         f"{_percent(cost['params']['ratio'])} of the dense network's"),
        ("MACs for an image", f"{_short(cost['macs']['before'])} → {_short(cost['macs']['after'])}",
         f"{_percent(cost['macs']['ratio'])} of the dense network's"),
        ("Latency of a batch", f"{_plain(latency['as given']['ms'])} → {_plain(latency['exported']['ms'])} ms",
         f"{_times(latency['exported']['speedup'])} times as fast, as exported"),
        ("Test accuracy", f"{_percent(last['dense']['accuracy'])} → {_percent(last['compressed']['accuracy'])}",
         f"of {_count(last['dense']['n'])} images"),
    ]  # fmt: skip
    content = "".join(
        f'<div class="card"><span>{title}</span><b>{value}</b><span>{more}</span></div>' for title, value, more in cards
    )
    return f'<div class="cards">{content}</div>\n<p class="muted">Asked for: {asked}.</p>'


_UNITS = {
    "params": "the parameters", "macs": "the multiply-accumulates",
    "backward_macs": "the multiply-accumulates of the backward pass", "milliseconds": "the convolutions' milliseconds",
}  # fmt: skip


def _replaced(report: Report) -> str:
    if not report["layers"]:
        return "<p>Nothing: the budget is met by the network as it is.</p>"
    spans = any(r["sensitivity"] and r["sensitivity"]["low"] is not None for r in report["layers"])
    rows = [
        (_code(r["name"]), _count(r["out_channels"]), _count(r["basis_channels"]), _times(r["ratio"]),
         _plain(r["sensitivity"]["value"]), *([_span(r["sensitivity"], _plain)] * spans),
         _short(r["params"]["before"]), _short(r["params"]["after"]), _short(r["macs"]["before"]),
         _short(r["macs"]["after"]), r["form"])
        for r in report["layers"]
    ]  # fmt: skip
    head = ("layer", "filters", "basis", "ratio", "sensitivity", *(["interval"] * spans))
    head += ("parameters", "after", "MACs", "after", "as")
    return (
        "<p>Of all ways to give each layer one of its candidates or to leave it, this is the one with the smallest sum "
        f"of sensitivities within the budget. The sum is {_plain(report['predicted'])} ({_text(report['unit'])}); what "
        "the layers lose together is in the next section. A replaced layer keeps the <em>basis</em> filters only and "
        "mixes the others from them.</p>"
        + _table(head, rows, "Replaced layers, in the order of the network. “As” is the form in the exported files.")
    )


def _accuracies(report: Report) -> str:
    rows = [
        (_text(r["stage"]), _text(r["images"]), _percent(r["accuracy"], 2), _span(r, lambda v: _percent(v, 2)),
         _plain(r["loss"], 4), _count(r["n"]), _seconds(r["seconds"]))
        for r in report["accuracy"]
    ]  # fmt: skip
    change = report["accuracy_change"]
    teacher = ", with the dense network as teacher" if report["made"]["distil"] else ""
    told = f"Epochs of fine-tuning: {_count(report['made']['epochs'])}{teacher}"
    head = ("network", "images", "accuracy", "interval", "loss", "n", "time")
    return (
        "<p>Layers were chosen, and every stage but the last was judged, on images held out from the training images; "
        "the test images were used for the last two rows only. On them the accuracy changes by "
        f"{_points(change['value'])} points {_span(change, _points)}, paired image by image. {told}.</p>"
        + _figure(lambda theme: accuracy_figure(report, theme), "accuracy", "Accuracy with 95 % intervals.",
                  "The accuracy of the network after each stage, on held out images and on the test images.")
        + _table(head, rows, "Accuracy with Wilson’s 95 % interval, and mean cross-entropy.")
    )  # fmt: skip


_NETWORKS = {
    "as given": "dense, as given", "as given, again": "the same once more (control)",
    "folded": "dense, normalisations folded in", "exported": "compressed, as exported",
    "fastest": "compressed, each layer in its faster form",
}  # fmt: skip


def _latencies(report: Report) -> str:
    latency = report["latency"]
    rows = [
        (_NETWORKS[name], _plain(r["ms"]), f"[{_plain(r['ms_q1'])}, {_plain(r['ms_q3'])}]", _times(r["speedup"]),
         f"[{_times(r['speedup_q1'])}, {_times(r['speedup_q3'])}]", _count(r["n"]))
        for name, r in latency["rows"].items()
    ]  # fmt: skip
    head = ("network", "ms", "quartiles", "times as fast", "quartiles", "rounds")
    return (
        f"<p>Forward passes of {_count(latency['batch_size'])} images on {_text(latency['device'])} "
        f"({_count(latency['threads'])} threads), {_text(latency['precision'])}, "
        f"{_text(latency['memory_format'])}. Every round runs all networks, in random order; times are medians over "
        "rounds, and ratios are taken within a round. The quartiles of the control have to enclose one.</p>"
        + _table(head, rows, "Measured latency of a batch, medians with quartiles.")
    )


def _sensitivity(report: Report, table: SensitivityTable) -> str:
    told = f"What the network loses when one layer alone is replaced: {_text(report['unit'])}."
    alt = (
        "A heat map: rows are layers, columns are ratios of basis filters; the darker, the more the network loses. "
        "Its numbers are in sensitivity.jsonl."
    )
    return (
        f"<p>{told} Measured on {_count(report['data']['scored'])} held out images by "
        f"{_code(report['made']['measure'])}, each candidate by itself.</p>"
        + _figure(lambda theme: heatmap(table, theme), "sensitivity", told, alt)
    )


def _kept(report: Report) -> str:
    if not report["kept"]:
        return "<p>Every convolution was replaced.</p>"
    rows = [
        (_code(r["name"]), _text(r["reason"]),
         f"{_plain(r['sensitivity']['value'])} with {_count(r['basis_channels'])} filters" if r["sensitivity"] else "–")
        for r in report["kept"]
    ]  # fmt: skip
    return _table(
        ("convolution", "why it stays as it is", "sensitivity"), rows,
        "Convolutions that were not replaced, with the sensitivity of the smallest candidate.", words=(1,),
    )  # fmt: skip


def _files(report: Report) -> str:
    rows = [
        (
            _code(f["name"]),
            _text(f["about"]),
            _bytes(f["bytes"]),
            _plain(f["error"], 2) if f["error"] is not None else "–",
        )
        for f in report["files"]
    ]
    gone = "".join(
        f'<p class="warn">Left out: {_text(what)}, since {_text(why)}.</p>' for what, why in report["left_out"].items()
    )
    return (
        "<p>The exported files hold plain convolutions, with the normalisations folded in. That network differs from "
        f"the one of basis convolutions by {_plain(report['apart'], 2)} of the largest output, on held out images.</p>"
        + _table(("file", "what it is", "size", "error"), rows,
               "“Error”: largest difference to the plain network’s outputs, relative to their largest magnitude, when "
               "the file was read back and run.", words=(1,))
        + gone
        + f"<pre><code>{_text(report['loading'])}</code></pre>"
    )  # fmt: skip


def _made(report: Report) -> str:
    made, images, data = report["made"], report["images"], report["data"]
    command = f"<pre><code>{_text(made['command'])}</code></pre>" if made["command"] else ""
    numbers = (", ".join(_plain(v, 4) for v in images[key]) for key in ("mean", "std"))
    entries = {
        "network": _text(report["network"]["source"]),
        "weights": f"{_code(report['network']['weights'])}, SHA-256 {_code(report['network']['sha256'])}",
        "data": f"{_code(data['source'])}: {_count(data['classes'])} classes; {_count(data['train'])} images to train "
        f"on, of which {_count(data['calibration'])} calibrate; {_count(data['held_out'])} held out; "
        f"{_count(data['test'])} to test",
        "images": "{} x {} pixels, mean {}, std {} ({})".format(
            _count(images["size"]), _count(images["size"]), *numbers, _text(images["source"])
        ),
        "seed": _count(made["seed"]),
        "device": _text(made["device"]),
        "versions": ", ".join(f"{_text(name)} {_code(version)}" for name, version in made["versions"].items()),
        "date": _code(made["date"]),
        "classes": _code(", ".join(data["class_names"][:20]))
        + (" …" if data["classes"] > 20 else "")
        + ", in the order of the outputs",
    }
    notes = [*report["network"]["notes"], *data["notes"]]
    entries |= {"notes": _text("; ".join(notes))} if notes else {}
    listed = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in entries.items())
    rows = [(_text(name), _seconds(seconds)) for name, seconds in made["seconds"].items()]
    return command + f"<dl>{listed}</dl>" + _table(("stage", "time"), rows, "Wall-clock time of every stage.")


# -- figures ----------------------------------------------------------------------------------------


def accuracy_figure(report: Report, theme: Theme) -> Any:
    """Accuracy with its interval, a row for each network."""
    rows = report["accuracy"]
    with matplotlib.rc_context(theme.rc()):
        figure = canvas(height=1.0 + 0.36 * len(rows))
        axes = figure.subplots()
        for y, row in enumerate(rows):
            colour = theme.cycle[1] if row["images"] == "test" else theme.cycle[0]
            value = 100 * row["accuracy"]
            error = [[value - 100 * row["low"]], [100 * row["high"] - value]]
            axes.errorbar([value], [y], xerr=error, fmt="o", color=colour, capsize=4)
        axes.set_yticks(range(len(rows)), [f"{row['stage']} ({row['images']})" for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("accuracy, %")
    return figure


def _figure(draw: Draw, name: str, caption: str, alt: str) -> str:
    """The drawing for both backgrounds; the reader's setting decides which one is seen."""
    pictures = "".join(_inline(draw, theme, f"{name}-{theme.name}", alt) for theme in (LIGHT, DARK))
    return f"<figure>{pictures}<figcaption>{_text(caption)}</figcaption></figure>"


def _inline(draw: Draw, theme: Theme, name: str, alt: str) -> str:
    """An SVG to stand inside a page, its identifiers its own."""
    text = render_figure(draw, theme, name=name, fmt="svg").decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    return text.replace("<svg ", f'<svg class="{theme.name}" role="img" aria-label="{html.escape(alt)}" ', 1)
