"""Select and weights methods that are the user's own: a function of an installed package, found by name.

A name is an entry point of the group `grape_service.select_methods` or `grape_service.weights_methods`, or an import
path `package.module:function`. The function takes a MethodBatch. For select it gives one number a candidate [N], for
weights one weight a token [L]. What it needs it says itself, with `grape_service.uses` or as attributes:

    statistics   names of rows/statistics.py; without any: logprob
    columns      names of the pool's columns; without any: none
    better       for select: "largest" (or without one) or "smallest" wins
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, packages_distributions, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from grape_service.errors import UserError
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.statistics import LOGPROB, STATISTICS, beside_logprob

Kind = Literal["select", "weights"]
GROUPS: dict[Kind, str] = {"select": "grape_service.select_methods", "weights": "grape_service.weights_methods"}
IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True)
class OwnMethod:
    """A user's function and what it says of itself."""

    kind: Kind
    name: str  # as the config has it
    path: str  # module:function
    function: Callable[[MethodBatch], Any]
    statistics: tuple[str, ...]  # in the order of STATISTICS
    columns: tuple[str, ...]
    better: Literal["largest", "smallest"]
    source_digest: str  # sha256 of the module's source file

    @property
    def beside_logprob(self) -> tuple[str, ...]:
        """What has to be made for it beside log-probabilities."""
        return beside_logprob(self.statistics)

    def record(self) -> dict[str, Any]:
        """What the manifest says of it; `package` is the installed distribution, null where the module is of none."""
        package, package_version = _package_of(self.path)
        return {
            "kind": self.kind,
            "method": self.name,
            "function": self.path,
            "package": package,
            "package_version": package_version,
            "source_digest": self.source_digest,
        }

    def __call__(self, batch: MethodBatch) -> npt.NDArray[np.float64]:
        """The function's numbers: [N] for select, [L] for weights. Raises UserError naming the method and a prompt."""
        if len(batch) == 0:
            return np.zeros(0)
        try:
            values = self._call(batch)
        except _BadAnswer as problem:
            raise self._refuse(batch, problem) from (problem.__cause__ or problem)
        bad = ~np.isfinite(values) if self.kind == "select" else ~(np.isfinite(values) & (values >= 0))
        if bad.any():
            place = int(np.flatnonzero(bad)[0])
            row = place if self.kind == "select" else int(np.searchsorted(batch.offsets, place, side="right")) - 1
            what = "is no finite number" if self.kind == "select" else "is no finite number of at least 0"
            of = (
                "for candidate"
                if self.kind == "select"
                else f"for token {place - int(batch.offsets[row])} of candidate"
            )
            raise UserError(
                f"{self._who()} gave {values[place]} {of} {batch.candidate_ids[row].as_py()!a} of prompt "
                f"{batch.prompt_ids[row].as_py()!a}, which {what}"
            )
        return values

    def _call(self, batch: MethodBatch) -> npt.NDArray[np.float64]:
        try:
            found = self.function(batch)
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            raise _BadAnswer(f"raised {type(error).__name__}{': ' + text if text else ''}") from error
        num = len(batch) if self.kind == "select" else int(batch.offsets[-1])
        of = ("candidate" if self.kind == "select" else "token") + ("" if num == 1 else "s")
        try:
            values = np.asarray(found, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise _BadAnswer(f"gave a {type(found).__name__}, not an array of numbers") from error
        if values.shape != (num,):
            shape = f"an array of shape {values.shape}" if values.ndim else f"the single number {values}"
            raise _BadAnswer(f"gave {shape} for {num} {of}")
        return values

    def _refuse(self, batch: MethodBatch, problem: _BadAnswer) -> UserError:
        """Naming the first prompt that alone has a problem too, else all of the batch's."""
        bounds = batch.prompt_bounds()
        for start, stop in itertools.pairwise(bounds):
            try:
                self._call(batch.rows(start, stop))
            except _BadAnswer as alone:
                return UserError(f"{self._who()} {alone} at prompt {batch.prompt_ids[start].as_py()!a}")
        first = batch.prompt_ids[0].as_py()
        return UserError(f"{self._who()} {problem} in a batch of {len(bounds) - 1} prompts that begins with {first!a}")

    def _who(self) -> str:
        return f"{self.kind}.method {self.name}"


class _BadAnswer(Exception):
    """What a function did instead of answering, as the end of a sentence."""


def is_own_method(kind: Kind, name: str) -> bool:
    """Whether a name that is not a method of ours is an import path or an installed entry point."""
    return IMPORT_PATH.fullmatch(name) is not None or _entry_point(kind, name) is not None


def names_of_entry_points(kind: Kind) -> list[str]:
    """The methods that installed packages bring."""
    return sorted(entry.name for entry in entry_points(group=GROUPS[kind]))


def _entry_point(kind: Kind, name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=GROUPS[kind], name=name)), None)


def function_at(path: str, who: str) -> Callable[..., Any]:
    """The user's function at module:name, which is imported. `who` names the key of the config, in errors.

    Raises UserError where its module raises, and where there is no such function.
    """
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{who}: there is no module '{error.name}' here; install its package in this environment, "
            "or put its folder on PYTHONPATH"
        ) from error
    except Exception as error:
        raise UserError(f"{who}: importing {module_name} raised {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{who}: {module_name} has no function '{attribute}'")
    return function  # type: ignore[no-any-return]


@cache
def own_method(kind: Kind, name: str) -> OwnMethod:
    """The user's method of that name. Raises UserError where it cannot be loaded or says something impossible."""
    who = f"{kind}.method {name}"
    entry = _entry_point(kind, name)
    path = entry.value if entry is not None else name
    if not IMPORT_PATH.fullmatch(path):
        raise UserError(f"{who} is no method of ours, no installed entry point and no package.module:function")
    function = function_at(path, who)
    _refuse_signature(who, function)
    statistics = _names(who, function, "statistics", (LOGPROB,))
    for unknown in sorted(set(statistics) - set(STATISTICS)):
        raise UserError(f"{who} asks for the statistic '{unknown}'; there are {', '.join(STATISTICS)}")
    better: Literal["largest", "smallest"] = getattr(function, "better", "largest")
    if better not in ("largest", "smallest"):
        raise UserError(f"{who} says better = {better!r}; it is 'largest' or 'smallest'")
    return OwnMethod(
        kind,
        name,
        path,
        function,
        tuple(known for known in STATISTICS if known in statistics),
        _names(who, function, "columns", ()),
        better,
        source_digest(sys.modules[path.partition(":")[0]]),
    )


def _names(who: str, function: Any, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
    value = getattr(function, key, default)
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{who} says {key} = {value!r}; it is a list of names")
    return tuple(value)


def _refuse_signature(who: str, function: Any) -> None:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise UserError(f"{who}: the function has to take one argument, the batch") from None
    except ValueError:
        return  # it has no signature to look at


def _package_of(path: str) -> tuple[str | None, str | None]:
    names = packages_distributions().get(path.partition(":")[0].partition(".")[0]) or []
    try:
        return (names[0], version(names[0])) if names else (None, None)
    except PackageNotFoundError:
        return names[0], None


def source_digest(module: Any) -> str:
    """sha256 of a module's source file as it is now; of nothing where it has none."""
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()
