"""The house: who may import whom, no circle, short files and lines. See the tree in README.md."""

import ast
import json
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIB = ROOT / "lib"
GROUND = {"paths", "seeds", "engine", "settings"}
MAY_IMPORT = {
    "ground": {"ground"},
    "data": {"ground", "data"},
    "model": {"ground", "data", "model"},
    "detector": {"ground", "data", "model", "evaluate.metrics"},
    "report": {"ground", "report"},
    "evaluate": {"ground", "data", "model", "evaluate", "evaluate.metrics"},
    "evaluate.metrics": set(),
    "audit": {"ground", "data", "model", "detector", "evaluate", "evaluate.metrics", "audit"},
    "recordings": {"ground", "data", "model", "detector", "evaluate.metrics", "recordings"},
    "study": {"ground", "data", "model", "detector", "evaluate", "evaluate.metrics", "report"},
    "cli": None,  # anything
}
"""Of each floor: the floors below. A study is handed to evaluate and audit, never imported at run time."""
SOURCES = sorted(path for folder in ("lib", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
ROOMS = [path for path in SOURCES if path.is_relative_to(LIB)]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_FILES, MOST_LINES, MOST_COLUMNS = 45, 300, 120  # files beside __init__ and __main__


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def floor_of(module):
    parts = module.split(".")[1:] or ["__init__"]
    if ".".join(parts[:2]) == "evaluate.metrics":
        return "evaluate.metrics"
    if parts[0] in GROUND | {"__init__"}:
        return "ground"
    return "cli" if parts[0] == "__main__" else parts[0]


def imported(path):
    """Modules of lib, benchmarks and tests that a file imports anywhere at run time, so not those for type checks."""
    names = {name_of(room) for room in SOURCES}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: no relative imports"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= (whole & names) or {node.module}
    return {module for module in modules if module.split(".")[0] in ("lib", "benchmarks", "tests")} - {"lib"}


@pytest.mark.parametrize("path", ROOMS, ids=name_of)
def test_imports_point_one_way(path):
    own = floor_of(name_of(path))
    assert own in MAY_IMPORT, f"{path.name} is in no wing"
    for module in imported(path):
        assert module.startswith("lib."), f"lib imports {module}"
        below = MAY_IMPORT[own]
        assert below is None or floor_of(module) in below, f"{name_of(path)} imports {module}"
        assert floor_of(module) != "cli" or own == "cli", f"{name_of(path)} imports {module}"


def test_no_circle():
    list(TopologicalSorter({name_of(path): imported(path) - {name_of(path)} for path in ROOMS}).static_order())


def test_few_files_and_no_packages_in_wings():
    files = [path for path in ROOMS if path.name not in ("__init__.py", "__main__.py")]
    assert len(files) <= MOST_FILES, len(files)
    assert [path for path in ROOMS if path.name == "__init__.py"] == [LIB / "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_lines_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES or path.parent.name == "tests", len(lines)
    assert not [number for number, line in enumerate(lines, start=1) if len(line) > MOST_COLUMNS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_lines_of_cells_are_short(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = {number: "".join(cell["source"]) for number, cell in enumerate(cells) if cell["cell_type"] == "code"}
    assert not [number for number, text in code.items() if any(len(line) > MOST_COLUMNS for line in text.splitlines())]
