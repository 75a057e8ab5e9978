"""Checks on token ids: near duplicates within a prompt, repetition, and digests for exact duplicates."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.checks.findings import Flagged
from grape_service.config.checks import NearDuplicates, Repetition
from grape_service.rows.columns import LOSS_TOKEN, LOSS_TURN_END
from grape_service.rows.ragged import list_offsets_and_values
from grape_service.storage.parquet import array_of

MAX_PAIRWISE = 128
"""Candidates of a prompt that are compared one by one; of more, MinHash LSH finds the pairs."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def responses(table: pa.Table) -> Iterator[npt.NDArray[np.int32]]:
    """The token ids that the policy wrote, row by row, turn ends left out."""
    offsets, mask = list_offsets_and_values(array_of(table, "loss_mask"))
    _, ids = list_offsets_and_values(array_of(table, "input_ids"))
    for start, end in itertools.pairwise(offsets):
        yield ids[start:end][mask[start:end] == LOSS_TOKEN]


def shingles(ids: npt.NDArray[np.int32], n: int) -> npt.NDArray[np.uint64]:
    """A hash of each run of n tokens [max(1, T - n + 1)]; of all of a shorter response."""
    values = ids.astype(np.uint64) + np.uint64(1)
    n = max(1, min(n, len(values)))
    found = np.zeros(len(values) - n + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for place in range(n):
            found = found * _MULTIPLIER + values[place : len(values) - n + 1 + place]
            found ^= found >> np.uint64(29)
    return found


def near_duplicates(table: pa.Table, check: NearDuplicates) -> Flagged:
    """Candidates much like an earlier one of their prompt: MinHash estimates the share of common shingles."""
    from datasketch import MinHash, MinHashLSH

    num_perm, least = check.num_perm, check.similarity
    empty = MinHash(num_perm=num_perm, hashfunc=_same)
    sketches = []
    for ids in responses(table):
        sketch = empty.copy()
        sketch.update_batch((shingles(ids, check.shingle) >> np.uint64(32)).tolist())
        sketches.append(sketch)
    prompts = array_of(table, "prompt_id").dictionary_encode().indices.to_numpy()
    candidate_ids = table["candidate_id"].to_pylist()
    flagged = Flagged([], [], [])

    def add(row: int, other: int, similarity: float) -> None:
        flagged.rows.append(row)
        flagged.reasons.append("near duplicate of another candidate")
        flagged.details.append(f"{similarity:.2f} like candidate {candidate_ids[other]}")

    starts = np.flatnonzero(np.concatenate([[True], prompts[1:] != prompts[:-1]]))
    for start, end in zip(starts, np.append(starts[1:], len(prompts)), strict=True):
        if end - start <= MAX_PAIRWISE:
            hashes = np.stack([sketch.hashvalues for sketch in sketches[start:end]])
            for row in range(1, end - start):
                alike = (hashes[:row] == hashes[row]).mean(axis=1)
                if alike.max() >= least:
                    add(int(start) + row, int(start) + int(alike.argmax()), float(alike.max()))
            continue
        index = MinHashLSH(threshold=least, num_perm=num_perm)
        for row in range(int(start), int(end)):
            others = [(sketches[row].jaccard(sketches[other]), -other) for other in index.query(sketches[row])]
            if others and max(others)[0] >= least:
                add(row, -max(others)[1], max(others)[0])
            index.insert(row, sketches[row])
    return flagged


def _same(value: int) -> int:
    return value


def repetition(table: pa.Table, check: Repetition) -> Flagged:
    """Responses of which a large share of the n-grams repeats earlier ones."""
    flagged = Flagged([], [], [])
    for row, ids in enumerate(responses(table)):
        if len(ids) < check.min_tokens:
            continue
        grams = shingles(ids, check.n)
        repeated = 1 - len(np.unique(grams)) / len(grams)
        if repeated > check.max_repeated:
            flagged.rows.append(row)
            flagged.reasons.append("repeats itself")
            flagged.details.append(f"{repeated:.0%} of its runs of {check.n} tokens stood there before")
    return flagged


def without_turn_end(table: pa.Table) -> npt.NDArray[np.bool_]:
    """Rows [N] whose last token is no turn end."""
    offsets, mask = list_offsets_and_values(array_of(table, "loss_mask"))
    return mask[offsets[1:] - 1] != LOSS_TURN_END


def response_digests(table: pa.Table, min_tokens: int) -> pa.Array:
    """8 bytes of a digest of each response's ids [N], as uint64; null for responses shorter than `min_tokens`."""
    values = [
        int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "big")
        if len(ids) >= min_tokens
        else None
        for ids in responses(table)
    ]
    return pa.array(values, type=pa.uint64())
