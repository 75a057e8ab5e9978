"""What is given to scoring engines, and what they did."""

from __future__ import annotations

from dataclasses import dataclass, field

from grape_service.select.race_rows import Race


@dataclass(frozen=True)
class Unit:
    """Rows of one file that are scored, retried and counted together."""

    path: str  # of a shard, relative to the workspace
    partition: str
    rows: int
    tokens: int
    check: bool  # some of its rows may have scores already: look before scoring
    statistics: tuple[str, ...] = ()  # that are made beside log-probabilities
    race: Race | None = None  # between its candidates, which are those of whole prompts
    partly: bool = False  # a race may have scored the first tokens of some rows: look
    first: int = 0  # of its rows in the file
    last: int | None = None  # the row behind the last; None: all to the end


@dataclass(frozen=True)
class UnitResult:
    """What became of a unit."""

    scored: int  # rows
    failed: int  # rows
    reused: int  # rows that were scored before, or whose tokens another row has
    tokens: int  # that went through the engine
    seconds: float
    stopped: int = 0  # rows that a race left with a part of their tokens scored
    spared: int = 0  # tokens of those that did not go through the engine


@dataclass(frozen=True)
class Progress:
    """What an actor says of itself while it works."""

    done: int  # tokens scored, or samples made, since the start
    moved: float  # grows with every step of the work, also within what counts as done at its end
    events: tuple[str, ...]  # what happened since the last answer
    cached_share: float  # of all tokens so far, those found in the prefix cache
    spared: int = 0  # of what is done, tokens that no engine had to compute


@dataclass
class Work:
    """A unit, under which policy id and at what temperature it is scored, and how often that failed."""

    unit: Unit
    store_id: str
    temperature: float = 1.0
    attempts: int = 0
    call: int = 0  # the number under which an actor has it


@dataclass
class ScoreTotals:
    """What a scoring stage did."""

    rows: int = 0
    reused: int = 0
    failed: int = 0
    stopped: int = 0
    tokens: int = 0
    spared: int = 0
    engine_seconds: float = 0.0
    failed_units: list[tuple[Work, str]] = field(default_factory=list)
