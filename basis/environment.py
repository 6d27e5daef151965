"""Where results come from and where they go: the machine, the versions, the checkout."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def repository_root() -> Path | None:
    """The checkout that this package runs from, or None where it is installed elsewhere."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "notebooks").is_dir() else None


def results_folder() -> Path:
    """``$BASIS_RESULTS``, or ``results`` of the checkout, or of the working directory."""
    named = os.environ.get("BASIS_RESULTS")
    return Path(named) if named else (repository_root() or Path.cwd()) / "results"


def stored_results(folder: Path | None = None) -> Path:
    """``folder``, by default :func:`results_folder`; ``ValueError`` says how to get records where there is none."""
    folder = folder or results_folder()
    if not folder.is_dir():
        raise ValueError(f"{folder} has no records; name yours (--results, $BASIS_RESULTS) or get ours: {clone()}")
    return folder


def is_published(folder: Path) -> bool:
    """Whether that is the folder of the records that come with the checkout."""
    root = repository_root()
    return root is not None and folder.resolve() == root / "results"


def clone() -> str:
    """The command that fetches the repository, whose address the installed package knows."""
    urls = [one.metadata.get_all("Project-URL") for one in metadata.distributions(name="basis-convolutions")]
    found = re.search(r"'Source, ([^']+?)/tree/", str(urls))
    return f"git clone {found[1] if found else 'the repository'} basis-book"


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to know of the machine and the software that made a record."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "system": platform.system(),
        "basis": next((d.version for d in metadata.distributions(name="basis-convolutions")), "not installed"),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    with suppress(OSError):
        if names := re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE):
            return f"{names[0]}, {len(names)} cores"
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout this package runs from, marked where files were changed since."""
    root = repository_root()
    if root is None:
        return None
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None
