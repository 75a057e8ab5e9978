"""Imports what looks at a model for a command that somebody waits for, without what comes along and is never used."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNUSED = ("boto3", "scipy")
"""Accelerate has a launcher for SageMaker, and some losses of transformers match boxes."""

GC_THRESHOLD = (50_000, 20, 100)
"""New objects after which Python looks for cycles: imports make a million that all stay."""


_is_own_process = False


def take_process() -> None:
    """Say that this process is a command's, which ends with it: nobody will want torch or transformers in it later."""
    global _is_own_process
    _is_own_process = True


def is_own_process() -> bool:
    """Whether this process ends with the command that it runs; not where somebody's Python calls it, as a notebook."""
    return _is_own_process


def collect_rarely() -> None:
    """Have this process look for cycles less often: for a quarter of the time that its imports would take."""
    gc.set_threshold(*GC_THRESHOLD)


def import_without_extras(with_torch: bool = True) -> None:
    """For the rest of this process transformers goes without the packages in UNUSED, and pyarrow without pandas.

    Without torch it has tokenizers, and no models, in a third of the time: for processes that never load one. (A worker
    of Ray's may become an engine.) Not for a process in which somebody's own Python goes on: see `is_own_process`.
    """
    if "transformers" in sys.modules:
        return
    hidden = [name for name in (*UNUSED, *(() if with_torch else ("torch",))) if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    if not with_torch:
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch
    try:
        import transformers

        with _models_listed_once(transformers):
            if with_torch:
                import transformers.modeling_utils
            else:
                from transformers import AutoTokenizer  # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]
    import pyarrow as pa

    sys.meta_path.insert(0, NoPandas)  # type: ignore[arg-type]
    try:
        pa.array(())  # the first array looks for pandas, once
    finally:
        sys.meta_path.remove(NoPandas)  # type: ignore[arg-type]
    gc.freeze()  # all of it stays


@contextlib.contextmanager
def _models_listed_once(transformers: Any) -> Iterator[None]:
    """Transformers reads every file of its models to list what is in them, for itself and again for
    `transformers.models`, which takes a quarter of a second: in the block the second list is made of the first.
    """
    from transformers.utils import import_utils

    listing = import_utils.define_import_structure
    folder = Path(transformers.__file__).parent / "models"

    def of_models(path: Any, prefix: str | None = None) -> Any:
        if prefix is not None or Path(path) != folder / "__init__.py":
            return listing(path, prefix)
        found = listing(folder, prefix="models")  # as transformers itself has asked: it keeps answers
        return {
            needed: {name.removeprefix("models."): what for name, what in modules.items() if name.startswith("models.")}
            for needed, modules in found.items()
        }

    import_utils.define_import_structure = of_models  # type: ignore[assignment]
    try:
        yield
    finally:
        import_utils.define_import_structure = listing


class NoPandas:
    """Finds no pandas."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> None:
        """Raises ModuleNotFoundError for pandas; leaves other names to the finders behind this one."""
        if name == "pandas":
            raise ModuleNotFoundError(name)
