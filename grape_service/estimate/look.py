"""A look into a pool without preparing it: shapes, candidates, sources, and why rows cannot be used."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from grape_service.config.schema import Config, PoolGroup
from grape_service.pool.candidates import Accepted, Filtered, Rejected
from grape_service.pool.file_candidates import FileCandidates
from grape_service.pool.files import PoolFile
from grape_service.pool.listing import Listing, list_pool
from grape_service.pool.reader import Segment
from grape_service.pool.shapes import Layout
from grape_service.prepare.counts import SAME_CONTENT
from grape_service.prepare.groups import GroupCounts
from grape_service.prepare.reduce import SAME_ID, TWO_PROMPTS
from grape_service.rows.candidate import Candidate, Message, Rejection
from grape_service.rows.columns import NO_SOURCE
from grape_service.rows.keys import json_digest

FIRST_ROWS = 64
"""Rows of each group that are rendered."""
MOST_ROWS = 20_000
MOST_CHARACTERS = 32 * 2**20
"""Of a pool that are read, about, shared among its groups and their files."""
MOST_FILES = 8
"""Of a group that are looked into."""
MAX_VALUES = 12
"""Values of a column that are told apart."""


@dataclass
class Seen:
    """What the values of one column were, for those with few."""

    rows: int = 0
    values: Counter[str] = field(default_factory=Counter)
    is_bool: bool = True


@dataclass
class GroupLook:
    """What is in the first rows of a group of files."""

    group: PoolGroup
    files: int = 0
    bytes: int = 0
    is_whole: bool = True
    """Whether every row was read."""
    counts: GroupCounts = field(default_factory=GroupCounts)
    layouts: list[Layout] = field(default_factory=list)
    candidates: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    """By reason, before anything is rendered."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first row that was rejected for each reason: file, row, detail."""
    sources: Counter[str] = field(default_factory=Counter)
    recorded: int = 0
    """Candidates with recorded log-probabilities."""
    prompts: dict[str, set[str]] = field(default_factory=dict)
    """Digests of responses by prompt_id."""
    first: list[Accepted] = field(default_factory=list)
    """Candidates of the first rows."""
    other: dict[str, Seen] = field(default_factory=dict)
    """Columns that are carried along."""
    plain_prompts: dict[str, set[str]] = field(default_factory=dict)
    """prompt_ids by the digest of the prompt without system turns and white space."""

    def add(self, item: Accepted | Filtered | Rejected, where: str, is_first: bool) -> None:
        """Count what a row gave."""
        self.counts.rows_in += 1
        if isinstance(item, Filtered):
            self.counts.filtered += 1
        elif isinstance(item, Rejected):
            self.reject(item.rejection, where)
        else:
            candidate = item.candidate
            self.candidates += 1
            self.sources[candidate.source if candidate.source is not None else NO_SOURCE] += 1
            self.recorded += candidate.recorded_logprobs is not None
            self.prompts.setdefault(candidate.prompt_id, set()).add(json_digest(candidate.response))
            self.plain_prompts.setdefault(plain_prompt(candidate.prompt), set()).add(candidate.prompt_id)
            for name, value in candidate.other.items():
                seen = self.other.setdefault(name, Seen())
                seen.rows += 1
                seen.is_bool &= isinstance(value, bool)
                if len(seen.values) < MAX_VALUES:
                    seen.values[str(value)] += 1
            if is_first:
                self.first.append(item)

    def reject(self, rejection: Rejection, where: str) -> None:
        """Count a row that cannot be used."""
        self.rejects[rejection.reason] += 1
        detail = f": {rejection.detail}" if rejection.detail else ""
        self.examples.setdefault(rejection.reason, f"{where}{detail}")


@dataclass
class PoolLook:
    """What is in a pool, as far as it was read."""

    listing: Listing
    groups: list[GroupLook]

    @property
    def is_whole(self) -> bool:
        """Whether every row was read."""
        return all(group.is_whole for group in self.groups)

    @property
    def sources(self) -> Counter[str]:
        """Candidates by source."""
        return sum((group.sources for group in self.groups), Counter())

    @property
    def candidates(self) -> int:
        return sum(group.candidates for group in self.groups)

    @property
    def prompts(self) -> dict[str, set[str]]:
        """Digests of responses by prompt_id, of all groups together."""
        return _joined([group.prompts for group in self.groups])

    def sizes(self) -> dict[int, int]:
        """Prompts by their number of distinct responses."""
        return dict(sorted(Counter(len(responses) for responses in self.prompts.values()).items()))

    def twins(self) -> int:
        """Prompts that differ from another only in white space or in a system turn."""
        return sum(len(ids) for ids in _joined([group.plain_prompts for group in self.groups]).values() if len(ids) > 1)


def _joined(parts: list[dict[str, set[str]]]) -> dict[str, set[str]]:
    joined: dict[str, set[str]] = {}
    for part in parts:
        for name, values in part.items():
            joined.setdefault(name, set()).update(values)
    return joined


def look_into(config: Config) -> PoolLook:
    """Read the first rows of every group of a pool. Raises UserError for a pool that is not there or is damaged."""
    listing = list_pool(config)
    groups = [GroupLook(group) for group in config.pool.groups]
    for index, look in enumerate(groups):
        files = [file for file in listing.files if file.group == index]
        look.files, look.bytes = len(files), sum(file.size for file in files)
        chosen = files[:: -(-len(files) // MOST_FILES)]
        look.is_whole = len(chosen) == len(files)
        shares = len(groups) * len(chosen)
        for number, file in enumerate(chosen):
            first = FIRST_ROWS * (number + 1) // len(chosen) - FIRST_ROWS * number // len(chosen)
            _read(config, file, look, max(1, first), MOST_ROWS // shares, MOST_CHARACTERS // shares)
    return PoolLook(listing, groups)


def _read(config: Config, file: PoolFile, look: GroupLook, first: int, most_rows: int, most_characters: int) -> None:
    reader = FileCandidates(config, file, Segment(0))
    rows = reader.rows()
    columns: dict[str, None] = {}
    num_parsed = characters = 0
    for number, (place, row) in enumerate(itertools.islice(rows, max(first, most_rows))):
        where = f"{file.url} row {place}"
        if isinstance(row, Rejection):
            look.counts.rows_in += 1
            look.reject(row, where)
            continue
        num_parsed += 1
        columns.update(dict.fromkeys(row))
        for item in reader.normaliser.candidates(row):
            look.add(item, where, number < first)
            characters += item.num_characters if isinstance(item, Accepted) else 0
        if number >= first and characters > most_characters:
            break
    look.is_whole &= next(rows, None) is None
    if hasattr(reader, "normaliser"):
        look.counts.add_file(True, num_parsed, columns, reader.normaliser)
        if num_parsed:
            look.layouts.append(reader.normaliser.layout)


def plain_prompt(prompt: list[Message]) -> str:
    """A digest of a prompt without its system turns and without white space."""
    turns = [
        (message["role"], "".join(str(message["content"]).split()), message.get("tool_calls"))
        for message in prompt
        if message["role"] not in ("system", "developer")
    ]
    return json_digest(turns)


def repeated(candidates: list[tuple[Accepted, Any]]) -> Counter[str]:
    """Why `prepare` leaves some of these candidates out: they repeat another, or their id names two things."""
    reasons: Counter[str] = Counter()
    by_prompt: dict[str, list[Accepted]] = {}
    for item, _ in candidates:
        by_prompt.setdefault(item.candidate.prompt_id, []).append(item)
    for items in by_prompt.values():
        digest = min(item.prompt_digest for item in items)
        same = [item for item in items if item.prompt_digest == digest]
        distinct = {item.content_digest: item.candidate.candidate_id for item in same}
        counted = {
            TWO_PROMPTS: len(items) - len(same),
            SAME_CONTENT: len(same) - len(distinct),
            SAME_ID: len(distinct) - len(set(distinct.values())),
        }
        reasons.update({reason: count for reason, count in counted.items() if count})
    return reasons


def first_candidates(look: PoolLook) -> list[Candidate]:
    """The candidates of the first rows of every group."""
    return [item.candidate for group in look.groups for item in group.first]
