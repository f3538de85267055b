"""Extras stay out of the core: without them every module that is not theirs can be imported, and the core names what it
needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import duo

ROOT = Path(duo.__file__).parent
PROJECT = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())["project"]
OF_EXTRAS = ("duo.app.page",)  # imported where the extra is asked for, and nowhere else
BROUGHT = {  # by a dependency, of which it is a part that others are meant to use
    "markupsafe": "jinja2",
}


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement)[0].lower().replace("_", "-")


CORE = {name_of(one) for one in PROJECT["dependencies"]}
EXTRA = {name_of(one) for part in PROJECT["optional-dependencies"].values() for one in part} - CORE


def imported_on_import(path: Path) -> set[str]:
    """The packages that a module imports when it is imported itself: what stands in functions is left out."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(path.read_text()))
    return found - sys.stdlib_module_names - {"duo"}


def test_the_core_imports_what_it_declares_and_nothing_else() -> None:
    of = {
        module: {one.lower().replace("_", "-") for one in names} for module, names in packages_distributions().items()
    }
    for path in ROOT.rglob("*.py"):
        module = ".".join(("duo", *path.relative_to(ROOT).with_suffix("").parts))
        for package in imported_on_import(path):
            wanted = of.get(package, {package})
            if module in OF_EXTRAS:
                assert wanted & (CORE | EXTRA), f"{module} imports {package}, which pyproject.toml does not name"
            else:
                known = {BROUGHT.get(one, one) for one in wanted}
                assert known & CORE, f"{module} imports {package}, which is no dependency of the core"


def test_every_module_is_imported_without_the_extras() -> None:
    """Each extra's packages raise as if they were not installed, however deep the import is."""
    modules = packages_distributions()
    blocked = sorted(
        module for module, names in modules.items() if {one.lower().replace("_", "-") for one in names} & EXTRA
    )
    assert {"gradio", "ray", "hypothesis", "playwright"} <= {*blocked}
    wanted = [
        ".".join(("duo", *path.relative_to(ROOT).with_suffix("").parts))
        for path in sorted(ROOT.rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py")
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {[*blocked, 'torchvision', 'onnxruntime', 'cv2', 'bitsandbytes']!r}:\n"
        "    sys.modules[name] = None\n"
        f"for name in {[name for name in wanted if name not in OF_EXTRAS]!r}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
