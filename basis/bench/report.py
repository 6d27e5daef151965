"""What a benchmark leaves: a report of rows, as one JSON file and as a table."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basis.saving import RecordError, write_json

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1
SHOWN = (
    "layer", "shape", "model", "pass", "width", "ratio", "share", "mode", "coefficients", "trained", "norms", "step",
    "timed", "resolved", "parameters", "predicted", "n", "ms", "dense_ms", "speedup", "speedup_q1", "speedup_q3",
    "versus_basis", "versus_compiled", "peak_mib", "dense_peak_mib",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """What a benchmark found: ``kind`` ("bench-layer", "bench-train", ...), options, machine, rows.

    A row has ``ratio`` (or ``layer``, the text of a structured layer, or ``share``, a budget) and ``mode``
    ("control" is the second dense one), ``n`` rounds, ``ms`` and ``dense_ms`` (medians) with quartiles, and
    ``speedup``, the median over rounds of dense / candidate, with quartiles ``speedup_q1`` and ``speedup_q3``;
    ``versus_basis`` is basis / candidate within a round. ``peak_mib`` is the memory of one step beyond what was
    resident. A candidate that failed has ``error`` and no times. On a GPU ``timed`` is "graph" (replays of a CUDA
    graph) or "host-bound" (eager); ``sets`` of inputs were in rotation.
    """

    kind: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    def to_frame(self) -> pd.DataFrame:
        """One row per candidate and cell."""
        import pandas as pd

        return pd.DataFrame(list(self.rows))

    def latencies(self, step: str) -> dict[str, dict[int, float]]:
        """The milliseconds that :func:`bench_latency` found for a pass: layer -> k -> ms, and dense as k = C_out.

        Raises ``ValueError`` for a report of another kind or without the pass ``step``.
        """
        if self.kind != "bench-latency":
            raise ValueError(f"latency is a report of kind {self.kind!r}, but it must be one of `basis bench latency`")
        passes = dict.fromkeys(row["pass"] for row in self.rows)
        if step not in passes:
            raise ValueError(f"step is {step!r}, but the latency report has only {', '.join(passes)}")
        rows = [row for row in self.rows if row["pass"] == step and not row.get("error")]
        found: dict[str, dict[int, float]] = {}
        for row in rows:
            ms = row["dense_ms" if row["mode"] == "control" else "ms"]
            found.setdefault(row["layer"], {})[row["basis_channels"]] = ms
        return found

    def save(self, path: str | Path) -> None:
        """Write the report as one JSON file, whole or not at all."""
        write_json(Path(path), {"version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> BenchReport:
        """Read what :meth:`save` wrote; :class:`basis.saving.RecordError` says what is wrong with a bad file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecordError(f"{path} is not a JSON benchmark ({error}); measure it again") from error
        version = content.pop("version", None) if isinstance(content, dict) else None
        if version != VERSION:
            raise RecordError(f"{path} has benchmark version {version!r}, but this package reads version {VERSION}")
        if set(content) != set(cls.__dataclass_fields__):
            raise RecordError(f"{path} lacks one of {', '.join(cls.__dataclass_fields__)}; measure it again")
        return cls(**content)

    def __str__(self) -> str:
        c, frame = self.config, self.to_frame()
        frame = frame[[name for name in SHOWN if name in frame and frame[name].notna().any()]]
        head = (
            f"{self.environment['device']}, {c['precision']}, {c['memory_format']}, batch {c['batch_size']}\n"
            f"{frame.to_string(index=False, na_rep='-', float_format=lambda value: f'{value:.4g}')}"
        )
        wrong = [row for row in self.rows if row.get("error")]
        notes = [f"{row.get('layer', '')} {row['mode']} failed: {row['error']}".lstrip() for row in wrong]
        notes += [f"{row['step']} was {row['means']}" for row in self.rows if "(" in row.get("means", "")]
        controls = [r for r in self.rows if r.get("mode") == "control" and "speedup" in r and not r.get("same_as")]
        # Chance alone puts 1 outside in 6 of 100 at 15 rounds.
        good = sum(row["speedup_q1"] <= 1 <= row["speedup_q3"] for row in controls)
        verdict = f"dense against itself: 1 is within the quartiles in {good} of {len(controls)} cells"
        return "\n".join([head, *dict.fromkeys(notes), verdict])


def check_place(path: Path) -> None:
    """Make the folder of ``path``, and raise ``ValueError`` where no file could be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(f"nothing can be written to the folder {path.parent} ({error.strerror})") from error
    if path.is_dir():
        raise ValueError(f"{path} is a folder, but must be the name of a file")
