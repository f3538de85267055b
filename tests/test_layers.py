"""Who may import whom (docs/architecture.md). Imports are read from the source, none is run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import duo
from duo import plugins

ROOT = Path(duo.__file__).parent
LEAVES = ("families", "methods", "attacks", "judges", "metrics")
MODULES = sorted(ROOT.rglob("*.py"))


def imported(path: Path, *, at_run_time: bool = True) -> set[str]:
    """Full names of what a file imports; what stands under `if TYPE_CHECKING` only if not `at_run_time`."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        if at_run_time and isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            return
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(path.read_text()))
    return found


def within(names: set[str], *packages: str) -> set[str]:
    return {name for name in names if any(name == one or name.startswith(f"{one}.") for one in packages)}


def name_of(path: Path) -> str:
    return ".".join(("duo", *path.relative_to(ROOT).with_suffix("").parts))


def test_losses_import_torch_alone() -> None:
    packages = {name.partition(".")[0] for name in imported(ROOT / "losses.py", at_run_time=False)}
    assert packages - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_diffusers_is_known_to_families_and_to_the_making_of_toybox_alone(path: Path) -> None:
    if path.parent.name not in ("families", "toybox"):
        assert not within(imported(path, at_run_time=False), "diffusers")
    assert not within(imported(path, at_run_time=False), "torchvision")


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name in LEAVES], ids=name_of)
def test_leaves_know_neither_each_other_nor_the_stages(path: Path) -> None:
    names = imported(path, at_run_time=False)
    assert not within(names, "duo.stages", "duo.cli", "duo.report", "duo.rundir", "duo.recipe")
    shared = f"duo.{path.parent.name}._"  # what several leaves of one kind share is no leaf
    assert not {name for name in within(names, *(f"duo.{kind}" for kind in LEAVES)) if not name.startswith(shared)}


def test_what_leaves_share_is_not_listed_as_a_leaf() -> None:
    assert list((ROOT / "families").glob("_[!_]*.py"))
    for kind in LEAVES:
        assert not [name for name in plugins.names(kind) if name.startswith("_")]


@pytest.mark.parametrize("path", sorted((ROOT / "stages").glob("*.py")), ids=name_of)
def test_stages_reach_leaves_by_name(path: Path) -> None:
    assert not within(imported(path, at_run_time=False), *(f"duo.{kind}" for kind in LEAVES))


def test_no_torch_is_imported_by_what_promises_it() -> None:
    modules = ("plugins", "errors", "fields", "concept", "recipe", "rundir", "statistics", "scores", "report", "cli")
    code = (
        "import importlib, sys\n"
        f"for name in ('duo', *(f'duo.{{m}}' for m in {modules!r})):\n"
        "    importlib.import_module(name)\n"
        "    assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
