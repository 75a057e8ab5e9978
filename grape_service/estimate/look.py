"""A look into a pool without preparing it: shapes, candidates, sources, and why rows cannot be used."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from grape_service.config.pool import PoolGroup
from grape_service.config.schema import Config
from grape_service.pool.contract import group_contracts
from grape_service.pool.file_candidates import FileCandidates
from grape_service.pool.files import PoolFile
from grape_service.pool.filters import number_of
from grape_service.pool.layout import Layout
from grape_service.pool.listing import Listing, list_pool
from grape_service.pool.outcomes import Accepted, Filtered, Rejected
from grape_service.pool.reader import Segment, holds_document, num_row_groups
from grape_service.pool.sample import spread
from grape_service.prepare.counts import SAME_CONTENT
from grape_service.prepare.groups import GroupCounts
from grape_service.prepare.reduce import SAME_ID, TWO_PROMPTS
from grape_service.progress.reporter import reporter
from grape_service.rows.candidate import Candidate, Message, Rejection
from grape_service.rows.columns import NO_SOURCE
from grape_service.rows.keys import json_digest

RENDERED_ROWS = 64
"""Rows of each group that are rendered, from the head, the middle and the end of its files."""
MOST_ROWS = 20_000
MOST_CHARACTERS = 32 * 2**20
"""Of a pool that are read, about, shared among its groups and their files."""
LEAST_ROWS = 12
"""Of each file that is looked into."""
LOOK_SECONDS = 15.0
"""So long a look takes, about: files that are not reached by then are told."""
TELL_SECONDS = 5.0
"""How often a look that takes longer says what it does."""
PLACE_BYTES = 2**19
"""What is read at the middle and at the end of a file that is not read whole."""
MAX_NUMBERS = 1000
MAX_VALUES = 12
"""Values of a column that are told apart."""


class Spread:
    """Of rows that come one after the other, some at equal distances: each as its accepted candidates."""

    def __init__(self, most: int):
        self.most, self.step, self.count = most, 1, 0
        self.kept: list[list[Accepted]] = []

    def add(self, one: list[Accepted]) -> None:
        """The next row."""
        if self.most and self.count % self.step == 0:
            self.kept.append(one)
            if len(self.kept) > 4 * self.most:
                self.kept, self.step = self.kept[::2], 2 * self.step
        self.count += 1

    def taken(self) -> list[list[Accepted]]:
        """At most `most` of them, in order."""
        return spread(self.kept, self.most) if self.most else []


@dataclass
class Seen:
    """What the values of one column were, for those with few."""

    rows: int = 0
    values: Counter[str] = field(default_factory=Counter)
    is_bool: bool = True
    numbers: list[float] = field(default_factory=list)
    """The first of those that are numbers, or text of one."""


@dataclass
class GroupLook:
    """What is in some rows of a group of files."""

    group: PoolGroup
    files: int = 0
    files_read: int = 0
    """Files that were looked into."""
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
    chosen: list[Accepted] = field(default_factory=list)
    """Candidates that are to be rendered."""
    other: dict[str, Seen] = field(default_factory=dict)
    """Columns that are carried along."""
    plain_prompts: dict[str, set[str]] = field(default_factory=dict)
    """prompt_ids by the digest of the prompt without system turns and white space."""

    def add(self, item: Accepted | Filtered | Rejected, where: str) -> None:
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
                if len(seen.numbers) < MAX_NUMBERS and (number := _number(value)) is not None:
                    seen.numbers.append(number)
                if len(seen.values) < MAX_VALUES:
                    seen.values[str(value)] += 1

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


def look_into(config: Config, seconds: float = LOOK_SECONDS) -> PoolLook:
    """Read rows of every group of a pool, from the head, the middle and the end of its files.

    Raises UserError for a pool that is not there or is damaged.
    """
    doing = ["listing the pool's files"]
    with _telling(doing):
        return _look_into(config, seconds, doing)


@contextlib.contextmanager
def _telling(doing: list[str]) -> Iterator[None]:
    """Inside the block the reporter is told every TELL_SECONDS what `doing` holds, while one row may take minutes."""
    done, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(TELL_SECONDS):
            reporter().event(f"{doing[0]}; {time.monotonic() - began:.0f} s so far")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _look_into(config: Config, seconds: float, doing: list[str]) -> PoolLook:
    listing = list_pool(config)
    doing[0] = "looking at the first rows of the pool's files"
    contracts = group_contracts(listing.files, config)
    groups = [GroupLook(group) for group in config.pool.groups]
    deadline = time.monotonic() + seconds
    for index, look in enumerate(groups):
        files = [file for file in listing.files if file.group == index]
        look.files, look.bytes = len(files), sum(file.size for file in files)
        shares = max(1, len(groups) * len(files))
        until = time.monotonic() + (deadline - time.monotonic()) / (len(groups) - index)
        for number, file in enumerate(spread_first(files)):
            if number and time.monotonic() > until:
                look.is_whole = False
                break
            first = max(1, RENDERED_ROWS // len(files) + (number < RENDERED_ROWS % len(files)))
            if len(look.chosen) > 2 * RENDERED_ROWS:
                first = 0
            doing[0] = f"reading {file.url}, {file.size:,} bytes"
            reader = FileCandidates(config, file, Segment(0), contracts[index])
            _read(reader, look, first, max(LEAST_ROWS, MOST_ROWS // shares), MOST_CHARACTERS // shares, until)
    return PoolLook(listing, groups)


def spread_first(files: list[PoolFile]) -> list[PoolFile]:
    """Files in an order whose every beginning is spread over all of them."""
    step, order = 1, [0]
    while step < len(files):
        step *= 2
    while step > 1:
        order += range(step // 2, len(files), step)
        step //= 2
    return [files[place] for place in order[: len(files)]]


def _read(
    reader: FileCandidates, look: GroupLook, chosen: int, most_rows: int, most_characters: int, until: float
) -> None:
    """Look into a file: all of it, or the rows of its head, its middle and its end."""
    look.files_read += 1
    parts = _parts(reader)
    columns: dict[str, None] = {}
    num_parsed = 0
    for number, part in enumerate(parts):
        rows = part.rows()
        of_part = max(LEAST_ROWS, most_rows // len(parts))
        wanted = chosen * (number + 1) // len(parts) - chosen * number // len(parts)
        rendered = Spread(wanted)
        characters = 0
        for count, (place, row) in enumerate(itertools.islice(rows, of_part)):
            where = (
                f"line {place + 1} of the middle or end of {part.file.url}"
                if number
                else f"{part.file.url}:{place + 1}"
            )
            if isinstance(row, Rejection):
                look.counts.rows_in += 1
                look.reject(row, where)
                continue
            num_parsed += 1
            columns.update(dict.fromkeys(row))
            items = list(part.normaliser.candidates(row))
            for item in items:
                look.add(item, where)
            accepted = [item for item in items if isinstance(item, Accepted)]
            characters += sum(item.num_characters for item in accepted)
            if accepted:
                rendered.add(accepted)
            if count >= wanted and (characters > most_characters // len(parts) or time.monotonic() > until):
                break
        look.chosen += itertools.chain.from_iterable(rendered.taken())
        if len(parts) == 1:
            look.is_whole &= next(rows, None) is None
        if hasattr(part, "normaliser"):
            look.counts.add_file(number == 0, num_parsed, columns, part.normaliser)
            columns, num_parsed = {}, 0
            if number == 0 and part.normaliser.layout.names:
                look.layouts.append(part.normaliser.layout)
    look.is_whole &= len(parts) == 1


def _parts(reader: FileCandidates) -> list[FileCandidates]:
    """A file as one part, or, where it is large and can be read in parts, its head, its middle and its end."""
    file, size = reader.file, reader.file.size
    if size > 4 * PLACE_BYTES and file.format == ".parquet":
        groups = num_row_groups(file, reader.config.storage)
        places = sorted({0, groups // 2, groups - 1})
        segments = [Segment(0, place, place + 1) for place in places] if groups > 1 else [Segment(0)]
    elif (
        size > 4 * PLACE_BYTES
        and file.format in (".json", ".jsonl")
        and not holds_document(file, reader.config.storage)
    ):
        ends = (PLACE_BYTES, (size + PLACE_BYTES) // 2, size)
        segments = [Segment(0, end - PLACE_BYTES, end) for end in ends]
    else:
        return [reader]
    return [FileCandidates(reader.config, file, segment, reader.contract) for segment in segments]


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        value = number_of(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value == value else None


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


def chosen_candidates(look: PoolLook) -> list[Candidate]:
    """The candidates of every group that are to be rendered."""
    return [item.candidate for group in look.groups for item in group.chosen]
