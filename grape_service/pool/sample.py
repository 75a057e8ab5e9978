"""A look into a pool: its first rows, without preparing anything."""

from __future__ import annotations

import itertools

from grape_service.config.schema import Config
from grape_service.pool.candidates import Accepted, Rejected
from grape_service.pool.file_candidates import FileCandidates
from grape_service.pool.listing import list_pool
from grape_service.pool.reader import Segment
from grape_service.rows.candidate import Candidate, Rejection

SAMPLED_FILES = 8


def sample_candidates(config: Config, limit: int = 64) -> tuple[list[Candidate], list[Rejected]]:
    """About `limit` candidates that pool.where lets pass, from the beginnings of some files, and rejects among them.

    Reads at most 100 rows for each candidate that is wanted. Raises UserError for a pool that is not there.
    """
    files = list_pool(config).files
    chosen = files[:: -(-len(files) // SAMPLED_FILES)]
    candidates: list[Candidate] = []
    rejected: list[Rejected] = []
    for number, file in enumerate(chosen):
        wanted = limit * (number + 1) // len(chosen)
        reader = FileCandidates(config, file, Segment(number))
        for _, row in itertools.islice(reader.rows(), 100 * limit):
            if len(candidates) + len(rejected) >= wanted:
                break
            found = [Rejected(row)] if isinstance(row, Rejection) else list(reader.normaliser.candidates(row))
            candidates += [item.candidate for item in found if isinstance(item, Accepted)]
            rejected += [item for item in found if isinstance(item, Rejected)]
    return candidates, rejected
