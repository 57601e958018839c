"""Imports go down the layers only; files and functions stay short; the light parts stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moe_infinity

ROOT = Path(moe_infinity.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))
# A part may import from those in earlier lines, and from itself; not from its own line's others.
LAYERS = (
    ("types", "errors"),
    ("config", "stats", "registry", "interrupts", "durable", "versions"),
    ("tracing",),
    ("policies", "predictors"),
    ("residency",),
    ("simulator",),
    ("training",),
    ("kernels",),
    ("checkpoint",),
    ("product_speed", "mapped_code"),
    ("machine",),
    ("state_file", "devices", "heap"),
    ("cache",),
    ("model",),
    ("size_classes",),
    ("device_plan",),
    ("plan",),
    ("needs",),
    ("planning",),
    ("forecast", "original_api", "reporting", "request", "learned", "speeds"),
    ("assembly", "device_forecast"),
    ("device_wiring",),
    ("wiring", "preparation"),
    ("live",),
    ("engine",),
    ("server",),
    ("cli",),
    ("__main__",),
)
# Both drive residency/, one with bytes and a clock, the other with neither: they know nothing of
# each other, though one comes before the other.
STRANGERS = {("cache", "simulator")}
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# tracing, policies, predictors, residency and simulator run without torch.
WITHOUT_TORCH = ("policies", "predictors", "residency.residency", "simulator.belady", "stats")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 40


def part_of(path: Path) -> str:
    """The layer part a file belongs to: its folder, or its own name at the top."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(tree: ast.AST) -> set[str]:
    """Parts of the package that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "moe_infinity":
                names |= {alias.name for alias in node.names}
            names.add(node.module.removeprefix("moe_infinity."))
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("moe_infinity.") for alias in node.names}
    return {name.split(".")[0] for name in names} & LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    own = part_of(path)
    if own == "__init__":
        return  # the lazy public face
    assert own in LEVEL, f"{own} has no place in LAYERS: give it one"
    for other in imported_parts(ast.parse(path.read_text())) - {own}:
        assert LEVEL[other] < LEVEL[own], f"{own} may not import {other}"
        assert (own, other) not in STRANGERS, f"{own} may not know of {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            # Of the body: a command's signature lists its options, one a line.
            length = (node.end_lineno or 0) - node.body[0].lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_imports_are_not_used(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"line {node.lineno}"


def test_the_light_parts_do_not_load_torch() -> None:
    imports = ", ".join(f"moe_infinity.{name}" for name in WITHOUT_TORCH)
    code = f"import {imports}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
