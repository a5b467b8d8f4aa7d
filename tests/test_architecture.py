"""The rules of the house that a machine can check."""

import ast
import itertools
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
PACKAGES = ("probe", "saes", "analyses", "app")
MODULES = sorted(path for package in PACKAGES for path in (TOP / package).rglob("*.py"))
BANNED_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}


def imported(path: Path) -> set[str]:
    """Names of the top-level packages that a module imports, wherever in its text."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(TOP)))
def test_imports_go_one_way(path):
    layer = PACKAGES.index(path.relative_to(TOP).parts[0])
    upward = imported(path) & set(PACKAGES[layer + 1 :])
    assert not upward, (
        f"{path.relative_to(TOP)} imports {', '.join(upward)}: imports go app -> analyses -> saes "
        "-> probe; move what is needed down, or the caller up"
    )


def test_no_drawers():
    drawers = [path for path in MODULES if path.name in BANNED_NAMES]
    assert not drawers, f"give each function the module of its noun instead of {drawers}"


def test_views_do_not_know_streamlit():
    assert "streamlit" not in imported(TOP / "app" / "views.py")


def functions():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def n_lines(node: ast.AST) -> int:
    assert isinstance(node, ast.stmt) and node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_functions_are_short_enough_to_see_at_once():
    long = [
        f"{path.relative_to(TOP)}:{node.name} has {n_lines(node)} lines"
        for path, node in functions()
        if n_lines(node) > 80
    ]
    assert not long, f"cut these into named steps: {long}"


def test_no_keyword_soup_in_our_own_signatures():
    soup = [f"{path.relative_to(TOP)}:{node.name}" for path, node in functions() if node.args.kwarg]
    assert not soup, f"name the options of {soup}"


def test_public_functions_and_classes_say_what_they_do():
    silent = []
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{path.relative_to(TOP)}:{node.name}")
    assert not silent, f"write one sentence for each of {silent}"


def test_every_module_says_what_it_is():
    silent = [
        str(path.relative_to(TOP))
        for path in MODULES
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, f"begin {silent} with a docstring"


def test_command_table_and_modules_agree():
    from app.cli import COMMANDS

    there = {path.stem for path in (TOP / "app" / "commands").glob("*.py")}
    assert there - {"__init__", "options"} == set(COMMANDS)


def test_packages_are_all_installed():
    import tomllib

    listed = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {
        ".".join(path.parent.relative_to(TOP).parts)
        for path in itertools.chain(*((TOP / package).rglob("__init__.py") for package in PACKAGES))
    }
    assert there <= set(listed)
