"""Why a prompt's candidates were kept or not: all of them with score, length, source and tokens."""

from __future__ import annotations

from typing import Any

from grape_service.errors import UserError
from grape_service.prepare.shards import shard_paths
from grape_service.release.candidates import open_scored_pool
from grape_service.release.load import Release
from grape_service.report.examples import add_token_texts, read_examples, reason_of, release_rows
from grape_service.rows.partitions import partition_of

ALL_TOKENS = 1 << 40


def explain(release: Release, prompt_id: str) -> dict[str, Any]:
    """The prompt with its candidates, best first, each with `reason`; token texts where the model is still there.

    Raises UserError where the pool has no such prompt, or the workspace has been cleaned up.
    """
    pool = open_scored_pool(release)
    if pool is None:
        raise UserError(
            f"the workspace of {release.reference} no longer holds its candidates: run the config again to see them"
        )
    partition = partition_of(prompt_id, pool.num_partitions)
    shards = shard_paths(pool.prepared, partition) if partition in pool.prepared.partitions else []
    final = release_rows(release, [prompt_id])
    found = read_examples(
        pool.workspace, partition, shards, pool.store, [prompt_id], pool.select, None, ALL_TOKENS, final
    )
    if prompt_id not in found:
        raise UserError(f"the pool of {release.reference} has no prompt {prompt_id!a}: give a prompt_id of its rows")
    prompt = found[prompt_id]
    try:
        add_token_texts([prompt], pool.renderer().token_bytes)
    except UserError:
        add_token_texts([prompt], None)
    for candidate in prompt["candidates"]:
        candidate["reason"] = reason_of(candidate, prompt["candidates"], pool.select)
    return prompt
