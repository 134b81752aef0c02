"""Every package says what it exports, in order."""

import ast
from pathlib import Path

import pytest


def exports(source: str) -> tuple[list[str] | None, set[str]]:
    """What `__all__` lists, and the names bound by `from ... import`."""
    listed: list[str] | None = None
    imported: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                listed = list(ast.literal_eval(node.value))
        elif isinstance(node, ast.ImportFrom) and node.module not in ("__future__", "typing"):
            imported |= {alias.asname or alias.name for alias in node.names}
    return listed, {name for name in imported if not name.startswith("_")}


def rank(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, as ruff's RUF022 sorts."""
    constant = name.isupper() and len(name) > 1
    return (0 if constant else 1 if name[0].isupper() else 2, name)


def problems(source: str) -> list[str]:
    listed, imported = exports(source)
    if listed is None:
        return ["imports names, and has no __all__"] if imported else []
    found = []
    if listed != sorted(listed, key=rank):
        found.append(f"not sorted: {listed}")
    if len(set(listed)) != len(listed):
        found.append(f"repeated: {listed}")
    return found


def test_packages_sort_their_exports(repository: Path) -> None:
    files = [
        path
        for folder in ("dmt_convert", "cli", "recipes")
        for path in (repository / folder).rglob("__init__.py")
    ]
    assert len(files) > 3
    found = {str(path): problems(path.read_text("utf-8")) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from a import b",
        "__all__ = ['A', 'CONSTANT']",
        "__all__ = ['b', 'a']",
        "__all__: list[str] = ['a', 'a']",
    ],
)
def test_problems_are_recognised(source: str) -> None:
    assert problems(source)


def test_a_tidy_package_has_no_problems() -> None:
    assert problems("from a import b, A, C_C\n__all__ = ['C_C', 'A', 'b']") == []
