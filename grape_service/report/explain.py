"""Why a prompt's candidates were kept or not: all of them with score, length, source and tokens."""

from __future__ import annotations

from grape_service.display import short
from grape_service.errors import UserError
from grape_service.prepare.reduce import shard_paths
from grape_service.release.candidates import ScoredPool, open_scored_pool
from grape_service.release.load import Release
from grape_service.release.some_rows import is_prompt
from grape_service.report.examples import (
    PROMPT_READS,
    ExampleContext,
    ExamplePartition,
    PromptExample,
    add_token_texts,
    prompt_text,
    read_examples,
    reason_of,
    release_rows,
)
from grape_service.rows.keys import partition_of
from grape_service.storage.parquet import read_tables

ALL_TOKENS = 1 << 40


MAX_NAMED = 8


def explain(release: Release, prompt: str) -> PromptExample:
    """The prompt with its candidates, best first, each with `reason`; token texts where the model is still there.

    `prompt` is a prompt_id, the beginning of one, or words of the prompt. Raises UserError where the pool has no such
    prompt or more than one, or the workspace has been cleaned up.
    """
    pool = open_scored_pool(release)
    if pool is None:
        raise UserError(
            f"the workspace of {release.reference} no longer holds all its candidates: run `grape score` with its "
            "config to have them there again"
        )
    prompt_id = prompt_meant(pool, prompt)
    partition = partition_of(prompt_id, pool.num_partitions)
    shards = shard_paths(pool.prepared, partition) if partition in pool.prepared.partitions else []
    final = release_rows(release, [prompt_id])
    context = ExampleContext(pool.workspace, pool.store, pool.select, pool.tokenizer, ALL_TOKENS)
    found = read_examples(context, ExamplePartition(partition, shards, [prompt_id], final))
    explained = found[prompt_id]
    try:
        add_token_texts(explained["candidates"], pool.renderer().token_bytes)
    except UserError:
        add_token_texts(explained["candidates"], None)
    for candidate in explained["candidates"]:
        candidate["reason"] = reason_of(candidate, explained["candidates"], pool.select)
    return explained


def prompt_meant(pool: ScoredPool, words: str) -> str:
    """The prompt_id that is given whole, by its beginning, or by words of its prompt. Raises UserError where none or
    more than one fits."""
    if words in _ids(pool, [partition_of(words, pool.num_partitions)]):
        return words
    by_id: dict[str, None] = {}
    by_text: dict[str, str] = {}
    for partition in sorted(pool.prepared.partitions):
        columns = ["prompt_id", *PROMPT_READS]
        for table in read_tables(pool.workspace, shard_paths(pool.prepared, partition), columns):
            seen: set[str] = set()
            for prompt_id, *conversation in zip(*(table[name].to_pylist() for name in columns), strict=True):
                if prompt_id in seen:
                    continue
                seen.add(prompt_id)
                if prompt_id.startswith(words):
                    by_id[prompt_id] = None
                elif len(by_text) <= MAX_NAMED and is_prompt(words, "", text := prompt_text(*conversation)):
                    by_text[prompt_id] = text
    found = list(by_id) or list(by_text)
    where = f"the pool of {pool.release.reference}"
    if not found:
        raise UserError(f"{where} has no prompt {words!a}: give an id of its rows, its beginning, or words of a prompt")
    if len(found) > 1:
        named = [f"{name[:12]} ({short(by_text[name])})" if name in by_text else name for name in found[:MAX_NAMED]]
        more = ", …" if len(found) > MAX_NAMED else ""
        raise UserError(f"several prompts of {where} fit {words!a}: {', '.join(named)}{more}; say which")
    return found[0]


def _ids(pool: ScoredPool, partitions: list[str]) -> set[str]:
    there = [name for name in partitions if name in pool.prepared.partitions]
    paths = [path for name in there for path in shard_paths(pool.prepared, name)]
    tables = read_tables(pool.workspace, paths, ["prompt_id"])
    return {prompt_id for table in tables for prompt_id in table["prompt_id"].to_pylist()}
