"""The report of a version that is already published."""

from __future__ import annotations

from typing import Any

from grape_service.digests import partition_of
from grape_service.errors import UserError
from grape_service.prepare.shards import shard_paths
from grape_service.releases.load import Release
from grape_service.report.examples import TokenBytes, examples_of_kinds, read_examples, release_rows
from grape_service.report.page import facts_of_manifest, render_page
from grape_service.scored_pool import open_scored_pool


def report_page(release: Release, anew: bool = False) -> str:
    """The page that a version was published with; where it has none, or `anew`, one from its manifest, with
    examples where the workspace still has the candidates."""
    if not anew:
        try:
            return release.storage.read(f"{release.folder}/report.html").decode()
        except FileNotFoundError:
            pass
    return render_page(facts_of_manifest(release.manifest), examples_of(release))


def examples_of(release: Release) -> list[dict[str, Any]]:
    """The report's examples read again; none where the workspace or the statistics lack them."""
    select = (release.manifest.statistics.get("report") or {}).get("select")
    pool = open_scored_pool(release)
    if not select or pool is None:
        return []
    chosen = select["examples"]
    wanted: dict[str, list[str]] = {}
    for prompt_id in dict.fromkeys(row[2] for rows in chosen.values() for row in rows):
        wanted.setdefault(partition_of(prompt_id, pool.num_partitions), []).append(prompt_id)
    prompts: dict[str, dict[str, Any]] = {}
    for partition, ids in wanted.items():
        shards, final = shard_paths(pool.prepared, partition), release_rows(release, ids)
        prompts |= read_examples(pool.workspace, partition, shards, pool.store, ids, pool.select, None, final=final)
    try:
        token_bytes: TokenBytes | None = pool.renderer().token_bytes
    except UserError:
        token_bytes = None
    return examples_of_kinds(prompts, chosen, token_bytes)
