"""The weigh stage: kept rows are scored under the policies that their weights need, then weighed, as Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow.compute as pc

from grape_service.config.policy import PolicyConfig
from grape_service.estimate.eta import winners_stage
from grape_service.prepare.reduce import ShardPaths, shard_path
from grape_service.progress.reporter import reporter
from grape_service.report.statistics import WeighStatistics
from grape_service.rows.columns import SHARD
from grape_service.score.shards import Shards
from grape_service.score.store import REPEAT_SUFFIX, ScoreStore
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from grape_service.weigh.behavior import add_census, behavior_census, recorded_temperatures, refuse_missing
from grape_service.weigh.counts import WeighCounts, dataset_factor
from grape_service.weigh.lookup import Stores
from grape_service.weigh.partition import REPEAT_PARTITION, WeighContext, WeighPartition, weigh_partition
from grape_service.weigh.rescore import Group, GroupShards, write_group_shards
from workers.cluster.tasks import run_tasks, together
from workers.run import Run
from workers.scoring.engines import Engines
from workers.scoring.work import ScoreTotals
from workers.stages.accounts import check_weighed
from workers.stages.score import Scoring, score_shards
from workers.stages.select import Kept, sample_kept

T = TypeVar("T")


def policy_groups(run: Run, kept: Kept) -> list[Group]:
    """Who scores kept rows: the target where it has not, the target at recorded temperatures, behavior policies."""
    config, behavior = run.config, run.config.compared_behavior
    target, files = config.target, run.target_files
    temperatures = [] if kept.has_scores else [1.0]
    if behavior is not None and behavior.has_recorded:
        found = _on_kept(run, kept, recorded_temperatures, behavior=behavior)
        temperatures += sorted({t for of_partition in found for t in of_partition})
    groups = [
        Group(f"target-{t:g}", target, run.policy_id(target, t), files.folder, t, place=None) for t in temperatures
    ]
    for place, policy in enumerate(behavior.policies() if behavior is not None else []):
        folder, same = run.files_of(policy).folder, _same_turn_ends(run, policy)
        named = f"behavior-{place}", policy, run.policy_id(policy), folder, 1.0, place
        rendered = config.has_own_template(policy), run.renderer_of(policy).digest()
        groups.append(Group(*named, same, run.aligns(policy), *rendered))
    return groups


def _same_turn_ends(run: Run, policy: PolicyConfig) -> frozenset[int]:
    """The target's turn ends that are the same token to another policy."""
    ids = sorted(run.target_renderer.stop_ids)
    theirs = run.renderer_of(policy).token_bytes(ids)
    pairs = zip(ids, run.target_renderer.token_bytes(ids), theirs, strict=True)
    return frozenset(id_ for id_, ours, own in pairs if ours == own)


def _on_kept(run: Run, kept: Kept, function: Callable[..., T], **shared: Any) -> Iterator[T]:
    """`function(storage, kept_path, **shared)` for each kept file, in order."""
    workers = run.config.workers
    paths = ({"kept_path": path} for path in kept.paths.values())
    several = together(workers, len(kept.paths))
    return run_tasks(function, paths, workers, shared={"storage": run.workspace, **shared}, together=several)


@dataclass
class PolicyScores:
    """The shards of kept rows that were made for each group."""

    groups: list[Group] = field(default_factory=list)
    shards: dict[str, dict[str, GroupShards]] = field(default_factory=dict)  # partition -> group name -> shards
    totals: dict[str, ScoreTotals] = field(default_factory=dict)  # group name -> what scoring did


def score_behavior(run: Run, engines: Engines, kept: Kept) -> PolicyScores:
    """What the weights of kept responses need beside the target's scores of the pool, policy by policy."""
    config = run.config
    if config.weights is None:
        return PolicyScores()
    behavior = config.compared_behavior
    groups = policy_groups(run, kept)
    with run.stage("score behavior"):
        policy_scores = PolicyScores(groups)
        if groups:
            written = run_tasks(
                write_group_shards,
                (
                    {"partition": partition, "kept_path": path, "out_folder": f"{run.folder}/rescore/{partition}"}
                    for partition, path in kept.paths.items()
                ),
                config.workers,
                shared={
                    "storage": run.workspace,
                    "groups": groups,
                    "behavior": behavior,
                    "render": config.render,
                    "target_turn_end_id": run.target_renderer.turn_end_id,
                    "shard_tokens": config.workers.shard_tokens,
                    "target": run.target_tokenizer,
                },
                together=together(config.workers, len(kept.paths)),
            )
            policy_scores.shards = dict(zip(kept.paths, written, strict=True))

        def score_group(group: Group) -> None:
            shards = [by_group[group.name].shards for by_group in policy_scores.shards.values()]
            shards = [one for one in shards if one.number]
            if shards:
                stage = winners_stage(behavior, group.place, group.temperature)
                statistics = kept.target_statistics if group.is_target and group.temperature == 1.0 else ()
                share = config.workers.max_failed_share
                asked = Scoring(group.policy, stage, group.temperature, statistics, max_failed_share=share)
                policy_scores.totals[group.name] = score_shards(run, engines, asked, shards)

        # What the target scores comes first: its engines may be up.
        ours = [group for group in groups if _same_weights(run, group)]
        for group in ours:
            score_group(group)
        score_sample_again(run, engines, kept)
        for group in groups:
            if group not in ours:
                score_group(group)
    return policy_scores


def _same_weights(run: Run, group: Group) -> bool:
    return run.policy_id(group.policy) == run.policy_id(run.config.target)


@dataclass(frozen=True)
class WeighedFile:
    """One partition's rows before they become a data file."""

    partition: str
    path: str
    digest: str  # sha256


@dataclass
class Weighed:
    """Weighed rows by partition, and what scales them."""

    paths: dict[str, str]
    digests: dict[str, str]  # sha256 of each file
    counts: WeighCounts
    factor: float  # of normalize: dataset
    statistics: WeighStatistics | None = None

    def files(self) -> list[WeighedFile]:
        """The files in the order of the partitions."""
        return [WeighedFile(p, path, self.digests[p]) for p, path in self.paths.items()]


def weigh(run: Run, kept: Kept, policy_scores: PolicyScores) -> Weighed:
    """Weights for the tokens of kept rows; without `weights`, 1 each."""
    config, partitions = run.config, list(kept.paths)
    if config.weights is None:
        digests = dict(zip(partitions, _on_kept(run, kept, sha256_of), strict=True))
        counts = WeighCounts(rows=kept.counts.kept_rows, prompts=kept.counts.kept_prompts)
        return Weighed(kept.paths, digests, counts, factor=1.0)
    names = kept.statistics.names
    paths = {partition: f"{run.folder}/weighed/{partition}.parquet" for partition in partitions}
    with run.stage("weigh"):
        behavior = config.compared_behavior
        if behavior is not None and behavior.missing == "error":
            refuse_missing_behavior(run, kept)
        reporter().begin("weigh", len(partitions), "partitions")
        done = run_tasks(
            weigh_task,
            (
                {"partition": WeighPartition(name, kept.paths[name], _behavior_rows(policy_scores, name), path)}
                for name, path in paths.items()
            ),
            config.workers,
            shared={"context": WeighContext(run.workspace, config, _stores(run, policy_scores)), "names": names},
            done=lambda number: reporter().advance("weigh", number),
            together=together(config.workers, len(partitions)),
        )
        counts, statistics = WeighCounts(), WeighStatistics.empty(names)
        digests = {}
        for partition, (count, digest, found) in zip(partitions, done, strict=True):
            counts += count
            statistics += found
            digests[partition] = digest
        reporter().end("weigh")
    check_weighed(kept.counts.kept_rows, counts, list(policy_scores.totals.values()))
    return Weighed(paths, digests, counts, dataset_factor(counts, config.weights), statistics)


def sha256_of(storage: Storage, kept_path: str) -> str:
    """Hex sha256 of a file (a Ray task)."""
    return storage.sha256(kept_path)


def _stores(run: Run, policy_scores: PolicyScores) -> Stores:
    target, behaviors, at_temperature = None, [], {}
    for group in policy_scores.groups:
        store = ScoreStore(run.workspace, group.policy_id).with_folders()
        if group.is_target and group.temperature == 1.0:
            target = store
        elif group.is_target:
            at_temperature[group.temperature] = store
        else:
            behaviors.append(store)
    return Stores(target, behaviors, at_temperature, repeat_store(run).with_folders())


def _behavior_rows(policy_scores: PolicyScores, partition: str) -> list[ShardPaths]:
    """For each behavior policy the files with the rows that it scored."""
    shards = policy_scores.shards.get(partition, {})
    return [shards[group.name].shards.paths for group in policy_scores.groups if not group.is_target]


def weigh_task(
    context: WeighContext, partition: WeighPartition, names: list[str]
) -> tuple[WeighCounts, str, WeighStatistics]:
    """weigh_partition, the digest of what it wrote and its statistics for the report (a Ray task)."""
    statistics = WeighStatistics.empty(names)
    counts = weigh_partition(context, partition, observer=statistics)
    return counts, context.storage.sha256(partition.out_path), statistics


def refuse_missing_behavior(run: Run, kept: Kept) -> None:
    """Raises UserError when kept rows have no behavior policy and the config says that this is an error."""
    census: dict[str, dict[str, int]] = {}
    for found in _on_kept(run, kept, behavior_census, behavior=run.config.behavior):
        census = add_census(census, found)
    refuse_missing(census)


REPEAT_ROWS = 256
REPEAT_TOKENS = 2**17
"""At most so many kept rows are scored a second time by the target, which ought to agree with itself.

Weights are importance ratios, so what the engine's rounding alone does to them has to be known. The second scoring
packs the rows in another way: each is alone with its prompt, not among the other candidates."""


def score_sample_again(run: Run, engines: Engines, kept: Kept) -> None:
    """Score a sample of kept rows again, if the target's engine is up: for this alone none is started."""
    target = run.config.target
    sample = sample_kept(run, kept, REPEAT_ROWS, REPEAT_TOKENS) if engines.are_up(target) else None
    if sample is None:
        return
    folder = f"{run.folder}/rescore/repeat"
    write_parquet(run.workspace, shard_path(folder, 0), SHARD, [sample])
    tokens = int(pc.sum(pc.list_value_length(sample["input_ids"])).as_py())
    shard = Shards(folder, REPEAT_PARTITION, 1, sample.num_rows, tokens)
    assert run.config.weights is not None
    asked = Scoring(
        target,
        "score a sample again under the target",
        statistics=run.config.weights.statistics,
        store_id=repeat_store(run).policy_id,
    )
    score_shards(run, engines, asked, [shard])


def repeat_store(run: Run) -> ScoreStore:
    """Where second scorings by the target are kept."""
    return ScoreStore(run.workspace, f"{run.policy_id(run.config.target)}{REPEAT_SUFFIX}")
