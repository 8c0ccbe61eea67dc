"""The layout's rules, each naming file and line."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("core", "actors", "rewards", "learner", "cluster")
MAY_IMPORT = {
    "core": {"core"},
    "actors": {"core", "actors"},
    "rewards": {"core", "rewards"},
    "learner": {"core", "learner"},
    "cluster": set(FOLDERS),
}
# third-party package -> the only places below which it may be imported
CONFINED = {
    "ray": ("cluster/",),
    "vllm": ("actors/engines/",),
    "torch": ("actors/", "rewards/", "learner/", "cluster/"),
    "transformers": ("actors/", "rewards/", "learner/", "cluster/"),
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def ours() -> list[Path]:
    return sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))


def imports(module: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "", node.lineno)


def refused(where: Path, parsed: ast.Module) -> list[str]:
    """What the file `where` imports against the rules, as `file:line: reason`."""
    folder = where.parts[0]
    wrong = []
    for module, line in imports(parsed):
        top, *rest = module.split(".")
        if top == "millrace" and rest and rest[0] in FOLDERS and rest[0] not in MAY_IMPORT[folder]:
            wrong.append(f"{where}:{line}: {folder} must not import {rest[0]}")
        if top in FOLDERS:
            wrong.append(f"{where}:{line}: write millrace.{module}, not {module}")
        if top in CONFINED and not str(where).startswith(CONFINED[top]):
            wrong.append(f"{where}:{line}: {top} may be imported only in {', '.join(CONFINED[top])}")
    return wrong


def test_folders_import_only_what_stands_below_them() -> None:
    assert [line for path in ours() for line in refused(path.relative_to(ROOT), tree(path))] == []


@pytest.mark.parametrize(
    ("folder", "text"),
    [
        ("core", "from millrace.learner.learner import Learner"),
        ("rewards", "import ray"),
        ("core", "import torch"),
        ("learner", "from core.types import Group"),
    ],
)
def test_the_import_rule_finds_a_planted_offence(folder: str, text: str) -> None:
    assert refused(Path(folder) / "planted_offence.py", ast.parse(text))


def test_no_import_cycles() -> None:
    graph = {
        ".".join(["millrace", *p.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): {
            module for module, _ in imports(tree(p)) if module.startswith("millrace.")
        }
        for p in ours()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module in graph and module not in done:
            for below in graph[module]:
                visit(below, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_import_inside_a_function() -> None:
    lazy = [
        f"{path.relative_to(ROOT)}:{inner.lineno}"
        for path in ours()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert lazy == []


def test_files_have_at_most_400_lines_and_functions_60() -> None:
    long = []
    for path in [*ours(), *(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        lines = path.read_text().count("\n")
        if lines > 400:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 60:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {length} lines")
    assert long == []


def test_only_the_boundary_catches_everything() -> None:
    broad = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in ours()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException"))
        and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    ]
    assert broad == []


def test_every_public_class_and_function_has_a_docstring_or_says_it_all_in_its_name() -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for path in ours()
        for node in tree(path).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
        and (node.end_lineno or 0) - node.lineno > 12
    ]
    assert silent == []


def test_no_committed_file_names_an_index_or_a_machine() -> None:
    pattern = r"(--(extra-)?index-url|--find-links) |https?://[a-z0-9.-]+/simple|file:///"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    found = [
        f"{name}:{number}"
        for name in names
        if (path := ROOT / name).is_file()
        and path != Path(__file__)
        and path.suffix in (".py", ".txt", ".in", ".md", ".toml")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert found == []
