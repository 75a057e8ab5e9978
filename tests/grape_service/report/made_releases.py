"""Releases of one small pool at two targets, made by the real stages in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from grape_service.config.schema import Config
from grape_service.prepare.reduce import shard_paths
from grape_service.prepare.result import PartitionTotals, Prepared
from grape_service.release.claim import claim_version
from grape_service.release.load import Release, load
from grape_service.release.manifest import ManifestFields, Parents, PolicyUse
from grape_service.release.rows import final_batches
from grape_service.release.writer import publish, write_part
from grape_service.report.statistics import SelectStatistics
from grape_service.report.sums import source_names
from grape_service.rows.columns import release_schema
from grape_service.score.store import ScoreStore
from grape_service.select.partition import SelectContext, SelectPartition, select_partition
from grape_service.storage.storage import Storage
from tests.made_rows import Row, put_scores, put_shards

Score = Callable[[int, int], float]
"""A token's log-probability, by the number of the prompt and of the candidate."""


def pool_rows(num_prompts: int, each: int = 3) -> list[Row]:
    rows = []
    for prompt in range(num_prompts):
        for place in range(each):
            rows.append(Row(f"p{prompt:03}", f"c{place}", source=f"s{place}", num_loss=4 + place))
    return rows


def make_release(folder: Path, target: str, score: Score, num_prompts: int = 30, **select: object) -> Release:
    """A version of `pool` below `folder`, of a workspace that all releases there share."""
    workspace, output = Storage(str(folder / "workspace")), Storage(str(folder / "datasets"))
    rows = pool_rows(num_prompts)
    prepared = Prepared("prepared-1", 1, rows=len(rows))
    prepared.partitions["b"] = PartitionTotals(1, len(rows), num_prompts, 0, 0)
    path = shard_paths(prepared, "b")[0]
    if not workspace.exists(path):
        made = put_shards(workspace, [rows])[0]
        workspace.write(path, workspace.read(made))
    workspace.write_json(f"{prepared.folder}/prepared.json", prepared.to_json())
    store = ScoreStore(workspace, target)
    scores = {row.key: [score(int(row.prompt_id[1:]), int(row.candidate_id[1:]))] * row.num_scores for row in rows}
    put_scores(store, scores)
    config = Config.model_validate(
        {
            "name": "pool",
            "pool": {"path": "pool.jsonl"},
            "target": {"model": target},
            "select": select,
            "output": {"path": output.root},
        }
    )
    statistics = SelectStatistics.empty(source_names({"s0": 1, "s1": 1, "s2": 1}))
    kept = f"kept-{target}.parquet"
    counts = select_partition(
        SelectContext(workspace, config, store, frozenset()), SelectPartition("b", [path], kept), observer=statistics
    )
    schema = release_schema([], [])
    with claim_version(output, "pool") as claim:
        entry = write_part(output, claim.folder, 0, schema, final_batches(workspace, kept, [], []))
        policy = PolicyUse(role="target", policy_id=target, model=target)
        fields = ManifestFields(
            content_digest=target,
            config=config.model_dump(mode="json"),
            counts={"select": counts.to_json()},
            statistics={"report": {"select": statistics.to_json(), "weights": None}},
            parents=Parents(policies=[policy], workspace=workspace.root, prepare_id=prepared.prepare_id),
        )
        version = publish(output, claim, schema, [entry], fields)
    return load(version.reference)
