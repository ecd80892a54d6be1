"""Measures the package's shape against its goals; exits with 1 if it is further off than before.

    python scripts/check_structure.py

Imports inside functions count for circles too: they hide one, and do not open it.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qtrain"
GOALS = {
    "lines of the longest file": 300,
    "lines of the longest function": 60,
    "characters of a code line, mean": 36.0,
    "modules loose at the top": 0,
    "modules in import circles": 0,
    "folders in import circles": 0,
    "folders that import torch.ao": 1,
    "folders without a door sign": 0,
}

REACHED: dict[str, float] = {}  # where a goal is not reached yet: no worse than this


def modules() -> dict[str, Path]:
    """Returns {dotted name: file} of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yields (name, lines) of each function, its decorators and docstring included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            yield node.name, (node.end_lineno or first) - first + 1


def imports(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """Returns the modules of the package that a module imports, those for types alone left out."""
    for_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return (found & known) - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Returns the groups of modules that reach each other (Tarjan's strongly connected components).

    >>> circles({"a": {"b"}, "b": {"a", "c"}, "c": set()})
    [['a', 'b']]
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] < index[name]:
            return
        group = stack[stack.index(name) :]
        del stack[stack.index(name) :]
        if len(group) > 1:
            found.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def between_folders(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Returns the imports between the folders of the package, out of those between modules.

    >>> within = {"q": {"q.a.x"}, "q.a.x": {"q.a.y", "q.b.z"}, "q.a.y": set(), "q.b.z": set()}
    >>> between_folders(within)
    {'q.a': {'q.b'}, 'q.b': set()}
    """
    found: dict[str, set[str]] = {}
    for name, others in graph.items():
        folder = ".".join(name.split(".")[:2])
        if "." in name:
            reached = {
                ".".join(other.split(".")[:2]) for other in others if "." in other
            }
            found.setdefault(folder, set()).update(reached - {folder})
    return found


def code_lines(text: str) -> list[str]:
    """Returns the lines that hold code, stripped; comment lines left out."""
    stripped = (line.strip() for line in text.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def main() -> None:
    files = modules()
    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in files.items()}
    texts = {name: path.read_text("utf-8") for name, path in files.items()}
    lines = [line for text in texts.values() for line in code_lines(text)]
    longest = max(
        (size, f"{name}.{function}")
        for name, tree in trees.items()
        for function, size in functions(tree)
    )
    file_size, file = max(
        (len(text.splitlines()), name) for name, text in texts.items()
    )
    loose = [path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    graph = {name: imports(name, tree, set(trees)) for name, tree in trees.items()}
    groups, folder_groups = circles(graph), circles(between_folders(graph))
    torch_ao = {
        path.parent.relative_to(ROOT).as_posix()
        for name, path in files.items()
        if any(module.startswith("torch.ao") for module in _imported(trees[name]))
    }
    folders = {path.parent for path in files.values()} - {PACKAGE}
    unsigned = sorted(
        folder.name for folder in folders if not (folder / "README.md").is_file()
    )
    measured: dict[str, tuple[float, str]] = {
        "lines of the longest file": (file_size, file),
        "lines of the longest function": longest,
        "characters of a code line, mean": (
            round(sum(map(len, lines)) / len(lines), 1),
            "",
        ),
        "modules loose at the top": (len(loose), " ".join(sorted(loose))),
        "modules in import circles": (
            sum(map(len, groups)),
            "; ".join(map(" ".join, groups)),
        ),
        "folders in import circles": (
            sum(map(len, folder_groups)),
            "; ".join(map(" ".join, folder_groups)),
        ),
        "folders that import torch.ao": (len(torch_ao), " ".join(sorted(torch_ao))),
        "folders without a door sign": (len(unsigned), " ".join(unsigned)),
    }
    failed = False
    for what, (value, where) in measured.items():
        limit = REACHED.get(what, GOALS[what])
        mark = (
            "ok" if value <= GOALS[what] else "above" if value <= limit else "WORSE"
        )
        failed |= value > limit
        print(f"{mark:>5}  {what}: {value} (goal {GOALS[what]}) {where}".rstrip())
    sys.exit(failed)


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


if __name__ == "__main__":
    main()
