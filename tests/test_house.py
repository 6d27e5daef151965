"""The house: imports run downwards only, no circle, no private name across files, nothing too long."""

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the ground up; a module may import from floors below its own, and from its own package.
FLOORS = (
    ("text", "saving", "environment", "statistics", "modules", "vision", "inputs", "copies", "digests", "numbers"),
    ("data", "batches", "figures", "progress"),
    ("layers",),
    ("models", "costs"),
    ("plan", "substitution", "storage", "decompositions"),
    ("training",),
    ("bench",),
    ("search", "inference", "export"),
    ("plots",),
    ("compression",),
    ("experiments",),
    ("commands",),
    ("cli",),
)
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor}
FILES = sorted((ROOT / "basis").rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import of this package, wherever in the file it stands, but not for types only."""
    tree = ast.parse(path.read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "basis":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole, "") if whole in MODULES else (node.module, alias.name))
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "basis"]
    return found


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def test_imports_run_downwards():
    up = [
        f"{module} -> {target}"
        for module, path in MODULES.items()
        if module != "basis"
        for target, _ in imports(path)
        if room(target) != room(module)
        and FLOOR[room(target)] >= FLOOR[room(module)]
        and not (FLOOR[room(target)] == FLOOR[room(module)] and path.parent == ROOT / "basis")
    ]
    assert not up


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: {target for target, _ in imports(path)} for module, path in MODULES.items() if module != "basis"}
    while leaves := {m for m, targets in graph.items() if not targets & graph.keys()}:
        graph = {m: targets for m, targets in graph.items() if m not in leaves}
    assert not graph


def test_no_private_name_crosses_files():
    crossing = [
        f"{module} takes {name} of {target}"
        for module, path in MODULES.items()
        for target, name in imports(path)
        if name.startswith("_")
    ]
    assert not crossing


def test_only_the_command_line_imports_experiments_and_nothing_the_book():
    for module, path in MODULES.items():
        if room(module) not in ("experiments", "commands", "cli"):
            assert not [target for target, _ in imports(path) if room(target) == "experiments"], module


def test_no_file_is_too_long():
    long = {str(path.relative_to(ROOT)): n for path in FILES if (n := len(path.read_text().splitlines())) > 450}
    assert not long


def test_the_package_is_small():
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= 16_700  # on its way down to 9,000


def test_the_chapters_have_more_prose_than_code():
    notebooks = [json.loads(path.read_text())["cells"] for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    cells = [("".join(cell["source"]), cell["cell_type"]) for notebook in notebooks for cell in notebook]
    code = [text.splitlines() for text, kind in cells if kind == "code"]
    assert sum(map(len, code)) <= 2_000
    assert not [lines[0] for lines in code if len(lines) > 25 and "figures.canvas(" in "".join(lines)]


def test_importing_all_public_names_costs_little_beside_torch():
    heavy = ("pandas", "scipy", "matplotlib", "seaborn", "torchvision", "timm")
    code = f"import sys; from basis import *; print(*[name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "\n"
