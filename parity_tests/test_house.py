"""The house rules that imports can break: no circles, arrows down only, nothing private across packages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from sfcore.laws import LAWS

ROOT = Path(__file__).resolve().parents[1]
# From the ground up: each may import those before it, and the twins do not know each other.
PACKAGES = ("sfcore", "sfjax", "sftorch")


def modules(package: str) -> dict[str, Path]:
    """Returns dotted name -> file of every module of a package that is shipped."""
    files = [path for path in (ROOT / package).rglob("*.py") if "tests" not in path.parts]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


MODULES = {name: path for package in PACKAGES for name, path in modules(package).items()}
NAMES = {name.removesuffix(".__init__"): name for name in MODULES}


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yields the imports that run, in functions too; those for type checkers alone do not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not is_for_types(node):
            yield from statements(node)


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (module, name) of everything of ours that a file imports; the name is "" for a whole module."""
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.partition(".")[0] in PACKAGES)
        elif node.module and node.module.partition(".")[0] in PACKAGES:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, "") if whole in NAMES else (node.module, alias.name)


GRAPH = {
    name: {NAMES[module] for module, _ in imported(path) if module in NAMES} - {name}
    for name, path in MODULES.items()
}


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_file_imports_itself_through_others():
    assert circle(GRAPH) == [], "an import circle: take out what two of them share"


def folder(name: str) -> str:
    """Returns the folder that a module lies in; the files at the top of a package are its public face."""
    return name.rpartition(".")[0]


def test_arrows_between_folders_go_one_way():
    graph: dict[str, set[str]] = {}
    for name, targets in GRAPH.items():
        # What stands at the top of a twin is its public face: it may use every folder, and folders use it.
        below = {folder(target) for target in targets if "." in folder(target)}
        if "." in folder(name):
            graph.setdefault(folder(name), set()).update(below - {folder(name)})
    assert circle(graph) == [], "folders that import each other: move the file that both need"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_those_below_it(package):
    below = {package, "sfcore"}
    wrong = [
        f"{name} imports {target}"
        for name, targets in GRAPH.items()
        if name.partition(".")[0] == package
        for target in targets
        if target.partition(".")[0] not in below
    ]
    assert wrong == []


def test_nothing_private_is_imported_from_another_package():
    wrong = [
        f"{name} imports {module}{'.' if imported_name else ''}{imported_name}"
        for name, path in MODULES.items()
        for module, imported_name in imported(path)
        if module.partition(".")[0] != name.partition(".")[0]
        if any(re.match("_[^_]", part) for part in f"{module}.{imported_name}".split("."))
    ]
    assert wrong == []


def collections(tree: ast.AST) -> Iterator[list[str]]:
    """Yields the texts of every tuple, list, set and dict that is written out."""
    for node in ast.walk(tree):
        items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        yield [item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)]


def test_optimizers_are_listed_in_the_rows_alone():
    wrong = [
        f"{name} lists {', '.join(texts)}"
        for name, path in MODULES.items()
        if name != "sfcore.laws"
        for texts in collections(ast.parse(path.read_text(encoding="utf-8")))
        if len(set(texts) & set(LAWS)) > 1
    ]
    assert wrong == [], "ask sfcore.laws.LAWS instead"
