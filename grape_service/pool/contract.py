"""The contract of a group of files: the layout that a sample over all of it shows, to which every row is held."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from grape_service.config.pool import PoolGroup
from grape_service.config.schema import Config
from grape_service.pool.column_names import FINISHES, KWARGS, MASKS, PREFILLS, SAMPLINGS, SOURCES
from grape_service.pool.files import PoolFile
from grape_service.pool.layout import Layout
from grape_service.pool.rollouts import rollouts
from grape_service.pool.sample import sample_rows, spread
from grape_service.pool.shapes import find_fitting, layout_of
from grape_service.pool.signatures import Signatures
from grape_service.rows.candidate import Rejection, Row

SAMPLED_FILES = 16
"""Of a group, spread over its files in order."""
THREADS = 8
OTHER_LAYOUT = "read otherwise than its file"
KEPT_SIGNATURES = 10_000
BY_TYPE = frozenset((*SOURCES, *FINISHES, *MASKS, *KWARGS, *PREFILLS, *SAMPLINGS))
"""Columns of which a reading asks no more than whether a row has a value, and of which type."""


@dataclass(frozen=True)
class GroupContract:
    """The layouts of a group's sampled files, that of the most rows first."""

    layouts: tuple[Layout, ...] = ()

    def of(self, own: Layout) -> Layout:
        """The layout of a file of the group that shows `own` by itself."""
        if not self.layouts:
            return own
        if own.reading is None:
            return self.layouts[0].joined(replace(own, columns=()))
        for layout in self.layouts:
            if layout.shape == own.shape and (layout.reads(own) or own.reads(layout)):
                return layout.joined(own)
        return own


def group_contracts(files: Sequence[PoolFile], config: Config) -> tuple[GroupContract, ...]:
    """The contract of each group of a pool, from samples of its files."""
    by_group = [[file for file in files if file.group == index] for index in range(len(config.pool.groups))]
    chosen = [spread(of_group, SAMPLED_FILES) for of_group in by_group]

    def sample(file: PoolFile) -> list[Row]:
        group = config.pool.groups[file.group]
        rows = (one for row in sample_rows(file, config.storage) for one in rollouts(row, group))
        return [one for one in rows if not isinstance(one, Rejection)]

    with ThreadPoolExecutor(THREADS, thread_name_prefix="samples") as threads:
        samples = [list(threads.map(sample, of_group)) for of_group in chosen]
    return tuple(
        group_contract(group, [(sample, dict(file.folders)) for sample, file in zip(found, of_group, strict=True)])
        for group, found, of_group in zip(config.pool.groups, samples, chosen, strict=True)
    )


def group_contract(group: PoolGroup, samples: Sequence[tuple[list[Row], dict[str, Any]]]) -> GroupContract:
    """The contract of a group of which these are samples: (rows, columns of the folders) of some files."""
    alike: list[tuple[Layout, list[Row], dict[str, Any]]] = []
    silent: list[Row] = []
    for rows, folders in samples:
        layout, fitting = find_fitting(rows, group, folders)
        if layout.reading is None:
            silent += fitting
            continue
        for place, (known, before, extra) in enumerate(alike):
            if known.shape == layout.shape and (known.reads(layout) or layout.reads(known)):
                wider = known if known.reads(layout) else layout
                alike[place] = wider, [*before, *fitting], {**extra, **folders}
                break
        else:
            alike.append((layout, fitting, folders))
    alike.sort(key=lambda one: -len(one[1]))
    if not alike:
        return GroupContract((layout_of(silent, group),) if silent else ())
    return GroupContract(tuple(layout_of([*rows, *silent], group, extra) for _, rows, extra in alike))


class FileContract:
    """The layout of a file, and why a row of it does not fit."""

    def __init__(self, group: PoolGroup, head: Sequence[Row], folders: dict[str, Any], contract: GroupContract):
        """`head` are the file's first rows."""
        self.group, self.folders, self.contract = group, folders, contract
        own, self._fitting = find_fitting(head, group, folders)
        self.layout = contract.of(own)
        self._signatures = Signatures(group)
        self._watched: dict[str, bool] = {}
        self._simple: list[str] = []
        self._names: list[str] = []
        self._by_type = set(BY_TYPE)
        if self.layout.shape == "response":  # a text is a text, whatever it says
            self._by_type |= {self.layout.theirs["prompt"], self.layout.theirs["response"]}
        self._problems: dict[tuple[Any, ...], Rejection | None] = {}

    def problem(self, row: Row) -> Rejection | None:
        """Why a row cannot be read as the others are, or None: a known column in it would have changed the reading."""
        if not row.keys() <= self._watched.keys():
            for name in row.keys() - self._watched.keys():
                self._watched[name] = self._signatures.is_watched(name)
            names = [name for name, is_watched in self._watched.items() if is_watched]
            self._simple = [name for name in names if name in self._by_type]
            self._names = [name for name in names if name not in self._by_type]
            self._problems.clear()
        signature: tuple[Any, ...] = tuple([type(row.get(name)) for name in self._simple])
        if self._names or self._signatures.paths:
            signature += self._signatures.of(row, self._names)
        if signature in self._problems:
            return self._problems[signature]
        if len(self._problems) > KEPT_SIGNATURES:
            self._problems.clear()
        problem = self._problems[signature] = self._look(row)
        return problem

    def _look(self, row: Row) -> Rejection | None:
        alone = layout_of([row], self.group, self.folders)
        if alone.reading is not None and not self.layout.reads(alone):
            return Rejection(OTHER_LAYOUT, self.layout.difference(alone))
        beside = self.layout.joined(layout_of([*self._fitting, row], self.group, self.folders))
        detail = self.layout.difference(beside)
        return None if detail is None else Rejection(OTHER_LAYOUT, detail)
