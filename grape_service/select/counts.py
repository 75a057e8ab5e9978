"""What select counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from grape_service.rows.counts import Counts


@dataclass
class SourceCounts(Counts):
    """Rows of one source."""

    candidates: int = 0
    kept: int = 0


@dataclass
class SelectCounts(Counts):
    """What selection saw, kept and left out."""

    prompts: int = 0
    candidates: int = 0
    kept_prompts: int = 0
    kept_rows: int = 0
    kept_tokens: int = 0
    kept_loss_tokens: int = 0
    kept_with_tools: int = 0
    kept_with_prefill: int = 0
    kept_not_told: int = 0
    """Kept rows whose tokens do not tell where their response begins or which are turn ends; see rows/spans.py."""
    failed_candidates: int = 0
    """Rows that were to be scored and have no usable score."""
    unexplained_failures: int = 0
    """Of those, the ones that no failure was reported for."""
    not_finite: int = 0
    """Of the failed, the ones with an infinite or NaN score."""
    stopped_candidates: int = 0
    """Rows that a race stopped, and that cannot be kept."""
    loss_tokens: int = 0
    """Tokens with loss of all candidates."""
    stopped_tokens: int = 0
    """Of those, the ones of stopped rows that were not scored."""
    audited: int = 0
    """Kept prompts that a race with a risk scored whole to see whether it keeps the same."""
    audited_same: int = 0
    """Of those, the ones of which it keeps the same candidates."""
    nothing_counted: int = 0
    """Rows of which no token counts in grape_score; they never win."""
    singletons: int = 0
    """Kept prompts with one distinct response: there was nothing to choose."""
    passed_on: int = 0
    """Wins that max_source_share passed to another source."""
    prompts_left_out: dict[str, int] = field(default_factory=dict)
    rows_left_out: dict[str, int] = field(default_factory=dict)
    """Rows of prompts that were left out, by the prompt's reason; 'not chosen' for those of kept prompts."""
    sources: dict[str, SourceCounts] = field(default_factory=dict)
