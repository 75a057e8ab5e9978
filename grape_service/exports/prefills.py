"""Rows whose policy was given the beginning of its turn, for trainers that make their own tokens of whole turns."""

from __future__ import annotations

from dataclasses import replace

from grape_service.errors import UserError
from grape_service.exports.rows import batches
from grape_service.exports.summary import Target
from grape_service.release.load import Release
from grape_service.rows.columns import PREFILL


def num_prefilled(release: Release) -> int:
    """Rows with a prefill."""
    if PREFILL.name not in release.schema.names:
        return 0
    return sum(batch.num_rows - batch.column(0).null_count for batch in batches(release, [PREFILL.name]))


def without_prefills(release: Release, target: Target, trainer: str) -> tuple[Target, list[str]]:
    """The target of an export without rows that have a prefill, and a line on them where there are some.

    Raises UserError where no row would be left.
    """
    number = num_prefilled(release)
    if not number:
        return target, []
    why = f"and {trainer} has loss on whole turns"
    if number == release.row_count:
        raise UserError(
            f"every row of {release.reference} begins with a prefill, {why}: export it for a trainer that takes the "
            "release's own tokens, such as trl or verl"
        )
    rows = "1 row begins with a prefill" if number == 1 else f"{number} rows begin with a prefill"
    return replace(target, whole_turns=True), [f"{rows}, {why}: left out."]
