"""What is given to scoring engines, and what they did."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.scoring.actor import Unit


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
    tokens: int = 0
    engine_seconds: float = 0.0
    failed_units: list[tuple[Work, str]] = field(default_factory=list)
