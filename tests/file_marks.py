"""Marks of whole test files (`pytestmark`), read without importing the files, which would take torch along.

    python tests/file_marks.py alone     the test files that have the mark, one a line

`alone`: starts Ray in its own process, and Ray keeps one authentication mode for the life of a process, or talks to
Prefect, after which children that are forked end with status 1: each such file runs in a process of its own. `quick`:
needs neither Ray nor a model. `vllm`: needs vLLM. `long`: is left to `make test-long`.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE_MARKS = frozenset({"alone", "quick", "vllm", "long"})


def marks_of(path: Path) -> frozenset[str]:
    """Names of the marks that a file's `pytestmark` has (one mark or a list of them, written out), and of those that
    each of its tests has."""
    found: set[str] = set()
    of_tests = []
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "pytestmark" for target in node.targets):
            found |= _marks_in([node.value])
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            of_tests.append(_marks_in(node.decorator_list))
    return frozenset(found.union(set.intersection(*of_tests) if of_tests else ()))


def _marks_in(nodes: list[ast.expr]) -> set[str]:
    names = (ast.unparse(one) for node in nodes for one in ast.walk(node) if isinstance(one, ast.Attribute))
    return {name.removeprefix("pytest.mark.") for name in names if name.startswith("pytest.mark.")}


def left_out(path: Path, expression: str) -> bool:
    """Whether pytest's `-m expression` leaves out every test of a file; False where it asks for other marks too."""
    names = set(re.findall(r"\w+", expression)) - {"not", "and", "or"}
    if not names or not names <= FILE_MARKS:
        return False
    marks = marks_of(path)
    return not eval(expression, {"__builtins__": {}}, {name: name in marks for name in names})


def files_with(mark: str) -> list[str]:
    """Test files with a mark, relative to the repository, but those that are long as a whole. Last names first: the
    slowest are among them, and a slow one at the end would run alone."""
    marks = {path: marks_of(path) for path in ROOT.glob("tests/**/test_*.py")}
    found = (path for path in marks if mark in marks[path] and "long" not in marks[path])
    return sorted((str(path.relative_to(ROOT)) for path in found), reverse=True)


if __name__ == "__main__":
    print("\n".join(files_with(sys.argv[1])))
