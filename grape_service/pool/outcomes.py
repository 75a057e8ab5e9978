"""What becomes of a pool's row: a candidate, one that a filter leaves out, or a rejection."""

from __future__ import annotations

from dataclasses import dataclass, field

from grape_service.pool.column_types import Kind
from grape_service.rows.candidate import Candidate, Rejection

TRUNCATED = "truncated"
TOO_LONG = "longer than max_tokens"


@dataclass
class Filtered:
    """A candidate that pool.where leaves out."""


@dataclass
class Rejected:
    """A candidate, or a whole row, that cannot be used."""

    rejection: Rejection
    prompt_id: str | None = None
    candidate_id: str | None = None


@dataclass(slots=True)
class Accepted:
    """A candidate with what it is compared by."""

    candidate: Candidate
    prompt_digest: str
    content_digest: str
    """Digest of prompt, source and response: equal for exact duplicates."""
    num_characters: int
    """Of prompt and response, about."""
    column_kinds: dict[str, Kind] = field(default_factory=dict)
    """Kinds of other columns that JSON lacks."""
