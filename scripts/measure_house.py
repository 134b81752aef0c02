#!/usr/bin/env python3
"""Measure how a checkout of this project is built; needs only the standard library.

    python scripts/measure_house.py [--repo DIR] [--json] [--no-runs]

What is counted, in the library (`dmt_convert/`, `cli/`, `recipes/`) unless said otherwise:

- Lines. A docstring line belongs to a string that stands alone as a statement (docstrings of
  attributes too). A comment line holds nothing but a comment. A code line holds any other token.
  An import line is a code line of an `import` statement.
- Functions. Length is from `def` to the last line, docstring included, decorators excluded.
  Parameters are all but `self` and `cls`, `*args` and `**kwargs` included.
- Names defined twice. Classes and type aliases at the top level of more than one module. An alias
  is an assignment to a CamelCase name of a subscript, a union, a dotted name or another CamelCase
  name, a `type` statement, or anything annotated `TypeAlias`.
- Files run. Commands are run on a small generated DLRM, and a profile function notes every function
  that is called; statements that run when a module is imported, class bodies and comprehensions do
  not count. `files` and `functions` are those of the command's own process, `with children` adds
  the processes that it starts. Training is run in one process: as the recipe, or, if there is no
  such recipe any more, as `dmt finetune`. It needs an interpreter with the project's dependencies
  (`--python`, by default `.venv/bin/python` of the checkout).
- Places that spell a setting. Places that have to be changed together when a setting is added or
  renamed, a file and a line each:
    fields   annotated names in classes called *Config, *Settings or *Options
    options  the option's string (`"--table-lr"`) as an argument of a call, and the parameter of a
             function in cli/ whose annotation is `Annotated[...]` or called *Option; both in one
             parameter are one place
    keys     keys of dicts at the top level of a module or class (tables of checks, of kinds)
    lists    strings in other collections at the top level of a module or class
    docs     rows of Markdown tables in docs/ and README.md with the option or the name in backticks
             in one of the first two cells
  `passed on` counts, beside these, keyword arguments of the setting's name in cli/ and recipes/.
  Two settings with one name (a `batch_size` of two configs) are counted together.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from house_runs import measure_runs

LIBRARY = ("dmt_convert", "cli", "recipes")
OTHERS = ("benchmarks", "tests")
SETTINGS = (
    "table_lr",
    "dense_lr",
    "table_optimizer",
    "initial_accumulator",
    "batch_size",
    "checkpoint_every",
    "comm_dtype",
    "compression",
    "tower_module",
    "distill_steps",
    "async_checkpoints",
    "hbm_gib",
    "quantize",
    "out_of_range",
)
KINDS = ("fields", "options", "keys", "lists", "docs")
MANY_PARAMETERS = 6
_NO_CODE = frozenset(
    getattr(tokenize, kind)
    for kind in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER")
)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_CAMEL = re.compile(r"_?[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*$")


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function or method."""

    name: str
    place: str
    length: int
    parameters: int


@dataclass(kw_only=True)
class Module:
    """One parsed file."""

    path: str
    lines: int
    tree: ast.Module
    code: int = 0
    docstrings: int = 0
    comments: int = 0
    imports: int = 0
    functions: list[Function] = field(default_factory=list)


def main() -> None:
    """Measure a checkout and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repo", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--python", type=Path, help="interpreter that can run the checkout")
    parser.add_argument("--no-runs", action="store_true", help="run no commands")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    result = measure(repo := options.repo.resolve())
    if not options.no_runs:
        own = repo / ".venv" / "bin" / "python"
        python = options.python or (own if own.exists() else Path(sys.executable))
        result["runs"] = measure_runs(repo, python, LIBRARY)
    print(json.dumps(result, indent=1) if options.json else as_text(result))


def measure(repo: Path) -> dict[str, Any]:
    """Return all that can be said without running the checkout."""
    modules = {folder: list(read_modules(repo, folder)) for folder in (*LIBRARY, *OTHERS)}
    library = [module for folder in LIBRARY for module in modules[folder]]
    trees = {module.path: module.tree for module in library}
    return {
        "library": summarise(library),
        **{folder: summarise(modules[folder]) for folder in OTHERS if modules[folder]},
        "folders": folders(library),
        "many_parameters": sorted(
            f"{function.place} {function.name} ({function.parameters})"
            for module in library
            for function in module.functions
            if function.parameters > MANY_PARAMETERS
        ),
        "defined_twice": defined_twice(trees),
        "settings": settings(repo, trees),
    }


def read_modules(repo: Path, folder: str) -> Iterator[Module]:
    """Parse the Python files below a folder."""
    for path in sorted((repo / folder).rglob("*.py")):
        if "__pycache__" not in path.parts:
            yield read_module(path.relative_to(repo).as_posix(), path.read_text("utf-8"))


def read_module(name: str, source: str) -> Module:
    """Count the lines of a file by kind, and list its functions."""
    tree = ast.parse(source)
    module = Module(path=name, lines=len(source.splitlines()), tree=tree)
    documented: set[int] = set()
    imported: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                documented |= span(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imported |= span(node)
        elif isinstance(node, _FUNCTIONS):
            module.functions.append(describe_function(name, node))
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in _NO_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    code -= documented
    module.code, module.docstrings = len(code), len(documented)
    module.comments = len(comments - code - documented)
    module.imports = len(imported & code)
    return module


def span(node: ast.stmt | ast.expr | ast.arg) -> set[int]:
    """Return the numbers of a node's lines."""
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def describe_function(path: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Function:
    """Measure one function."""
    found = node.args
    names = [a.arg for a in (*found.posonlyargs, *found.args, *found.kwonlyargs)]
    names += [a.arg for a in (found.vararg, found.kwarg) if a is not None]
    return Function(
        name=node.name,
        place=f"{path}:{node.lineno}",
        length=len(span(node)),
        parameters=len(names) - (names[:1] in (["self"], ["cls"])),
    )


def summarise(modules: Sequence[Module]) -> dict[str, Any]:
    """Add up the files of one part."""
    functions = sorted(
        (f for module in modules for f in module.functions), key=lambda f: (f.length, f.place)
    )
    code = sum(module.code for module in modules)
    total = {
        name: sum(getattr(module, name) for module in modules)
        for name in ("lines", "code", "docstrings", "comments", "imports")
    }
    largest = max(modules, key=lambda module: module.lines)
    longest = functions[-1]
    return {
        "files": len(modules),
        **total,
        "code_per_file": round(code / len(modules), 1),
        **{f"{name}_share": round(total[name] / code, 4) for name in list(total)[2:]},
        "functions": len(functions),
        "function_p50": functions[len(functions) // 2].length,
        "function_p90": functions[len(functions) * 9 // 10].length,
        "longest_function": f"{longest.length} {longest.place} {longest.name}",
        "functions_over_50_lines": sum(f.length > 50 for f in functions),
        "functions_over_6_parameters": sum(f.parameters > MANY_PARAMETERS for f in functions),
        "largest_file": f"{largest.lines} {largest.path}",
    }


def folders(modules: Iterable[Module]) -> dict[str, dict[str, Any]]:
    """Return files, code lines and the largest file of every folder, subfolders apart."""
    found: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        found[Path(module.path).parent.as_posix()].append(module)
    return {
        folder: {
            "files": len(inside),
            "code": sum(module.code for module in inside),
            "largest": max(module.lines for module in inside),
        }
        for folder, inside in sorted(found.items())
    }


def defined_twice(trees: dict[str, ast.Module]) -> dict[str, int]:
    """Return classes and aliases that several modules define, and how many do."""
    count = Counter(name for tree in trees.values() for name in set(definitions(tree)))
    return {name: n for name, n in sorted(count.items(), key=lambda e: (-e[1], e[0])) if n > 1}


def definitions(tree: ast.Module) -> Iterator[str]:
    """Yield the classes and type aliases of a module."""
    body = list(tree.body)
    for node in body:
        if isinstance(node, ast.If | ast.Try):  # `if TYPE_CHECKING:` and the like
            body += [*node.body, *node.orelse]
        elif isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name):
            if _CAMEL.match(target.id) and is_type(node.value):
                yield target.id
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if ast.unparse(node.annotation).endswith("TypeAlias"):
                yield node.target.id
        elif type(node).__name__ == "TypeAlias":  # Python 3.12
            yield node.name.id  # type: ignore[attr-defined]


def is_type(value: ast.expr) -> bool:
    """Tell whether an expression may be a type."""
    if isinstance(value, ast.Name):
        return bool(_CAMEL.match(value.id))
    return isinstance(value, ast.Subscript | ast.BinOp | ast.Attribute)


def settings(repo: Path, trees: dict[str, ast.Module]) -> dict[str, dict[str, Any]]:
    """Find the places that spell each setting; see the module's docstring."""
    places: dict[str, dict[str, set[str]]] = {
        name: {kind: set() for kind in KINDS} for name in SETTINGS
    }
    passed: Counter[str] = Counter()
    for path, tree in trees.items():
        nodes = list(ast.walk(tree))
        for kind, name, line in (*options(path, nodes), *fields(nodes), *collected(tree, nodes)):
            if name in places:
                places[name][kind].add(f"{path}:{line}")
        if not path.startswith("dmt_convert/"):
            passed.update(n.arg for n in nodes if isinstance(n, ast.keyword) and n.arg)
    for name, place in documented_rows(repo):
        places[name]["docs"].add(place)
    return {name: sum_up(found, passed[name]) for name, found in places.items()}


def sum_up(found: dict[str, set[str]], passed: int) -> dict[str, Any]:
    """Count the places of one setting."""
    every = sorted(place for kind in found.values() for place in kind)
    return {
        **{kind: len(inside) for kind, inside in found.items()},
        "places": len(every),
        "files": len({place.rpartition(":")[0] for place in every}),
        "passed_on": passed,
        "where": every,
    }


Spelling = tuple[str, str, int]
"""Kind, name of a setting, line."""


def options(path: str, nodes: Sequence[ast.AST]) -> Iterator[Spelling]:
    """Yield options of commands."""
    inside: set[int] = set()  # lines of parameters that were counted
    for node in nodes:
        if isinstance(node, _FUNCTIONS) and path.startswith("cli/"):
            for parameter in (*node.args.args, *node.args.kwonlyargs):
                if is_option(parameter.annotation):
                    inside |= span(parameter)
                    yield "options", parameter.arg, parameter.lineno
    for node in nodes:
        for argument in node.args if isinstance(node, ast.Call) else ():
            if (text := text_of(argument)).startswith("--") and argument.lineno not in inside:
                name = text[2:].partition("/")[0].replace("-", "_")  # `--a/--no-a` is `--a`
                yield "options", name, argument.lineno


def fields(nodes: Sequence[ast.AST]) -> Iterator[Spelling]:
    """Yield fields of configs."""
    for node in nodes:
        if isinstance(node, ast.ClassDef) and re.search("(Config|Settings|Options)$", node.name):
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    yield "fields", part.target.id, part.lineno


def collected(tree: ast.Module, nodes: Sequence[ast.AST]) -> Iterator[Spelling]:
    """Yield the strings of dicts and collections at the top level of a module or class."""
    for body in [tree.body, *(node.body for node in nodes if isinstance(node, ast.ClassDef))]:
        for statement in body:
            if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
                continue
            for node in ast.walk(statement.value):
                if isinstance(node, ast.Dict):
                    yield from (("keys", text_of(k), k.lineno) for k in node.keys if k is not None)
                elif isinstance(node, ast.Set | ast.List | ast.Tuple):
                    yield from (("lists", text_of(e), e.lineno) for e in node.elts)


def text_of(node: ast.expr) -> str:
    """Return the value of a string, or nothing."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ""


def is_option(annotation: ast.expr | None) -> bool:
    """Tell whether a parameter of a command declares an option."""
    if annotation is None:
        return False
    text = ast.unparse(annotation)
    return text.startswith(("Annotated[", "typing.Annotated[")) or text.endswith("Option")


def documented_rows(repo: Path) -> Iterator[tuple[str, str]]:
    """Yield the settings that rows of tables in the docs describe, and where."""
    for path in sorted([*(repo / "docs").rglob("*.md"), repo / "README.md"]):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            cells = "|".join(line.split("|")[1:3]) if line.startswith("|") else ""
            for name in SETTINGS:
                if f"`{name}`" in cells or f"`--{name.replace('_', '-')}" in cells:
                    yield name, f"{path.relative_to(repo).as_posix()}:{number}"


def as_text(result: dict[str, Any]) -> str:
    """Write everything as aligned tables."""
    parts = [name for name in ("library", *OTHERS) if name in result]
    rows = [[key, *(result[part][key] for part in parts)] for key in result["library"]]
    text = [table(["", *parts], rows)]
    rows = [[name, *entry.values()] for name, entry in result["folders"].items()]
    text.append(table(["folder", "files", "code", "largest file"], rows))
    many = result["many_parameters"]
    text.append(f"functions with more than {MANY_PARAMETERS} parameters: {len(many)}")
    text[-1] += "".join(f"\n  {one}" for one in many)
    twice = result["defined_twice"]
    text.append(f"names that several modules define: {len(twice)}\n  ")
    text[-1] += ", ".join(f"{name} x{n}" for name, n in twice.items())
    kinds = [key for key in next(iter(result["settings"].values())) if key != "where"]
    rows = [[name, *(entry[kind] for kind in kinds)] for name, entry in result["settings"].items()]
    rows.append(["sum", *(sum(int(row[i]) for row in rows) for i in range(1, len(kinds) + 1))])
    text.append(table(["setting", *kinds], rows))
    runs = result.get("runs", {})
    rows = [
        [what, run["files"], run["functions"], *run["with_children"].values(), run["command"]]
        for what, run in runs.items()
    ]
    if rows:
        text.append(table(["run", "files", "functions", "with children", "", "as"], rows))
    return "\n\n".join(text)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Align the cells of a table."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    main()
