"""The source of a user's function: the files that decide what it does, found without importing any of them.

What is installed stays as it is while its version does; what lies elsewhere may be edited at any time. So a function is
named by every file of its own module or package, and of all others that these import and that are not installed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

_IMPORTS = re.compile(rb"^[ \t]*(?:from[ \t]+([A-Za-z_]\w*)|import[ \t]+([^#;\n]+))", re.M)
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_OURS = frozenset({"grape_service", "workers", "flows"})
"""Packages that have a version of their own where functions are named."""


def sources_of(path: str, working_dir: str | None = None) -> dict[str, str] | None:
    """Digest of each source file that the function at module:name may run, by its path in its package; None where the
    function's own module is not to be found on this machine. `working_dir` is the first place of imports."""
    importlib.invalidate_caches()
    own = path.partition(":")[0].partition(".")[0]
    found: dict[str, str] = {}
    waiting, seen = [own], {own}
    while waiting:
        top = waiting.pop()
        spec = _spec_of(top, working_dir)
        if spec is None and top == own:
            return None
        if spec is None or (top != own and _is_installed(spec)):
            continue
        for name, file in _files_of(top, spec).items():
            content = file.read_bytes()
            found[name if top == own else f"{top}: {name}"] = hashlib.sha256(content).hexdigest()
            new = _imported(content) - seen
            seen |= new
            waiting += new
    return found


def _imported(source: bytes) -> set[str]:
    """The packages and modules at the top of the paths of a source's imports, but Python's own and ours."""
    names: set[bytes] = set()
    for of_from, of_import in _IMPORTS.findall(source):
        names |= {of_from} if of_from else {name.split()[0] for name in of_import.split(b",") if name.split()}
    tops = {name.decode(errors="replace").partition(".")[0] for name in names}
    return tops - sys.stdlib_module_names - _OURS


def _files_of(top: str, spec: ModuleSpec) -> dict[str, Path]:
    if spec.submodule_search_locations is None:
        return {f"{top}.py": Path(spec.origin)} if spec.has_location and spec.origin else {}
    folders = map(Path, spec.submodule_search_locations)
    return {file.relative_to(folder).as_posix(): file for folder in folders for file in folder.rglob("*.py")}


def _is_installed(spec: ModuleSpec) -> bool:
    places = [spec.origin, *(spec.submodule_search_locations or ())]
    return any(_INSTALLED & set(Path(place).parts) for place in places if place)


def _spec_of(top: str, working_dir: str | None) -> ModuleSpec | None:
    here = [] if working_dir is None else [str(Path(working_dir).expanduser().resolve())]
    try:
        return PathFinder.find_spec(top, [*here, *sys.path]) or importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
