"""The whole job in one file, without Ray or Prefect: what workers/pipeline.py does, one partition after the other.

    .venv/bin/python examples/plain_loop.py examples/quickstart/grape.yaml /tmp/plain

reads a config, does every stage in this process and writes the rows of the release to /tmp/plain/rows.parquet. They are
those of `grape run`. What a service adds is left out: retries, failures, races, checks, a report, versions, machines.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from grape_service.config.loading import load_config
from grape_service.config.policy import PolicyConfig
from grape_service.models.files import text_digests
from grape_service.prepare.counts import summarise_map
from grape_service.prepare.deal import deal_group, next_level
from grape_service.prepare.finish import finish_prepare
from grape_service.prepare.map import map_piece
from grape_service.prepare.plan import plan_prepare, rendering_of
from grape_service.prepare.reduce import reduce_partition
from grape_service.prepare.result import Prepared
from grape_service.release.rows import final_batches
from grape_service.rows.columns import MAPPED, computed_fields, needed_fields, release_schema
from grape_service.score.shards import Shards, shards_of_pool
from grape_service.score.store import ScoreStore
from grape_service.select.counts import SelectCounts
from grape_service.select.partition import SelectContext, SelectPartition, select_partition
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from grape_service.weigh.behavior import recorded_temperatures
from grape_service.weigh.counts import WeighCounts, dataset_factor
from grape_service.weigh.lookup import Stores
from grape_service.weigh.partition import WeighContext, WeighPartition, weigh_partition
from grape_service.weigh.rescore import Group, write_group_shards
from workers.run import Run
from workers.scoring.actor import ScoringActor, ScoringSpec, Unit
from workers.stages.windows import write_windows


def prepare(run: Run) -> Prepared:
    """Pool files to shards: rows are read, checked and rendered, dealt to partitions, put in order there."""
    config, storage, renderer = run.config, run.workspace, run.target_renderer
    plan = plan_prepare(config, rendering_of(renderer, run.target_files), storage)
    pieces = [map_piece(plan, piece, config, renderer, storage) for piece in plan.pieces]
    summary = summarise_map(plan, pieces, config)
    for bits in plan.level_bits[1:]:
        dealt = summary.dealt
        bounds = [deal_group(plan, dealt, bits, *group, MAPPED, storage) for group in dealt.groups(plan.fan_out)]
        summary.dealt = next_level(plan, dealt, bits, bounds)
    partitions = (reduce_partition(plan, name, config, summary, storage) for name in plan.partitions)
    return finish_prepare(plan, summary, partitions, config, storage)


def score(run: Run, policy: PolicyConfig, shards: Iterable[Shards], names: tuple[str, ...], t: float) -> None:
    """log p of each token with loss of some shards under a policy; kept in its score store."""
    texts, reuse = text_digests(run.files_of(policy).folder), run.config.workers.reuse
    actor = ScoringActor(ScoringSpec(policy, run.policy_id(policy), run.workspace, run.run_id, reuse, texts))
    actor.start()
    parts = ((part, path) for part in shards for path in part.paths)
    for number, (part, path) in enumerate(parts):
        unit = Unit(path, part.partition, part.rows, part.tokens, check=True, statistics=names)
        actor.score(number, unit, run.policy_id(policy, t), t)
    actor.close()


def select(run: Run, prepared: Prepared) -> tuple[dict[str, str], SelectCounts]:
    """GRAPE: of each prompt the candidates that the target finds most probable; a file of kept rows a partition."""
    store = ScoreStore(run.workspace, run.policy_id(run.config.target)) if run.config.select.needs_scores else None
    context = SelectContext(run.workspace, run.config, store, run.target_renderer.stop_ids, run.target_tokenizer)
    kept, total = {}, SelectCounts()
    for part in shards_of_pool(prepared):
        path = f"{run.folder}/kept/{part.partition}.parquet"
        counts = select_partition(context, SelectPartition(part.partition, part.paths, path))
        total += counts
        if counts.kept_rows:
            kept[part.partition] = path
    return kept, total


def groups_of(run: Run, kept: dict[str, str]) -> list[Group]:
    """Who scores kept rows: the target where it has not, or at a recorded temperature; each behavior policy."""
    target, behavior = run.config.target, run.config.compared_behavior
    temperatures = set() if run.config.select.needs_scores else {1.0}
    if behavior is not None and behavior.has_recorded:
        temperatures.update(*(recorded_temperatures(run.workspace, path, behavior) for path in kept.values()))
    folder, found = run.target_files.folder, sorted(temperatures)
    groups = [Group(f"target-{t:g}", target, run.policy_id(target, t), folder, t, None) for t in found]
    for place, policy in enumerate(behavior.policies() if behavior is not None else []):
        ids = sorted(run.target_renderer.stop_ids)
        ours, theirs = run.target_renderer.token_bytes(ids), run.renderer_of(policy).token_bytes(ids)
        same = frozenset(id_ for id_, one, other in zip(ids, ours, theirs, strict=True) if one == other)
        found = run.policy_id(policy), run.files_of(policy).folder, 1.0, place, same, run.aligns(policy)
        groups.append(Group(f"behavior-{place}", policy, *found))
    return groups


def weigh(run: Run, kept: dict[str, str]) -> tuple[dict[str, str], WeighCounts]:
    """PEAR: what wrote the kept rows scores them too, and each token gets its importance weight."""
    config, storage = run.config, run.workspace
    groups, computed = groups_of(run, kept), {}
    how = config.compared_behavior, config.render, run.target_renderer.turn_end_id, config.workers.shard_tokens
    for name, path in kept.items():
        out = f"{run.folder}/rescore/{name}"
        computed[name] = write_group_shards(storage, name, path, out, groups, *how, run.target_tokenizer)
    for group in groups:
        shards = [by_group[group.name].shards for by_group in computed.values()]
        score(run, group.policy, shards, config.statistics if group.is_target else (), group.temperature)
    stores = {group.name: ScoreStore(storage, group.policy_id) for group in groups}
    asked = [group for group in groups if not group.is_target]
    ours = {group.temperature: stores[group.name] for group in groups if group.is_target}
    context = WeighContext(storage, config, Stores(ours.pop(1.0, None), [stores[one.name] for one in asked], ours))
    weighed, total = {}, WeighCounts()
    for name, path in kept.items():
        weighed[name] = f"{run.folder}/weighed/{name}.parquet"
        rows = [computed[name][group.name].shards.paths for group in asked]
        total += weigh_partition(context, WeighPartition(name, path, rows, weighed[name]))
    return weighed, total


def main(config_path: str, folder: str) -> None:
    """Do the job of a config and write the rows of its release."""
    config, storage = load_config(config_path, ["score.race=off"]), Storage(folder)
    run = Run(config, config.name, "plain", storage, storage)
    prepared = prepare(run)
    shards = shards_of_pool(prepared)
    if config.select.needs_scores:
        score(run, config.target, shards, config.statistics, 1.0)
    if config.select.windows is not None:
        cut = storage, run.target_tokenizer, config.select, f"{run.folder}/windows", config.workers.shard_tokens
        score(run, config.target, [write_windows(one, *cut) for one in shards], (), 1.0)
    paths, selected = select(run, prepared)
    factor, unknown = 1.0, bool(prepared.recorded)
    if config.weights is not None:
        paths, counts = weigh(run, paths)
        factor = dataset_factor(counts, config.weights)
        unknown = bool(counts.unknown_tokens) if config.compared_behavior is not None else unknown
    tools = bool(selected.kept_with_tools) or "tool_calls" in prepared.message_fields
    needs = {"recorded": bool(prepared.recorded), "tools": tools, "prefilled": bool(selected.kept_with_prefill)}
    more = needed_fields(**needs, not_told=bool(selected.kept_not_told), says_known=unknown)
    fields = prepared.message_fields, [*prepared.other_fields, *more]
    computed = computed_fields(config.statistics, config.select.makes_select_score)
    rows = (batch for path in paths.values() for batch in final_batches(storage, path, *fields, factor, computed))
    print(write_parquet(storage, "rows.parquet", release_schema(*fields, computed), rows), "rows in", folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
